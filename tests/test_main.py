"""The command line: what it reads, writes and prints, and one clear line for each mistake."""

import csv
import json
import subprocess
import sys

import numpy as np
import pytest

import lrkernels
from lrkernels import __main__ as command_line
from lrkernels.__main__ import main

NORMS = [8, 4, 2, 1, 1, 1, 1, 2, 1, 0.5]
# Refined from NORMS without smoothing, l2.
REFINED = [0.0181107955, 0.0719696970, 0.2803030303, 1, 0.8787878788]
REFINED += [0.7575757576, 0.6363636364, 0.1515151515, 0.4848484848, 0]


def write(path, norms, key="grad_norm"):
    """Write norms in the format that the file's name asks for."""
    if path.suffix == ".npz":
        np.savez(path, lr=np.ones(len(norms)), **{key: np.array(norms)})
    elif path.suffix == ".npy":
        np.save(path, norms)
    elif path.suffix == ".json":
        path.write_text(json.dumps(norms if path.stem == "list" else {"step": list(range(len(norms))), key: norms}))
    elif path.name == "header.csv":
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([["step", key], *enumerate(norms)])
    else:
        path.write_text(", ".join(map(str, norms)) if path.suffix == ".csv" else "\n".join(map(str, norms)))
    return path


def picture(path):
    """The pixels of a picture, checked to be more than an empty frame."""
    image = pytest.importorskip("matplotlib.image").imread(path)[..., :3]
    assert image.shape[0] > 500 and image.shape[1] > 500
    assert 0.005 < (image.mean(-1) < 0.8).mean() < 0.5
    return image


@pytest.mark.parametrize("name", ["run.npz", "run.npy", "run.txt", "run.csv", "header.csv", "run.json", "list.json"])
def test_refine_writes_the_known_schedule(tmp_path, name, capsys):
    pytest.importorskip("matplotlib")
    source, out = write(tmp_path / name, NORMS), tmp_path / "new" / "schedule.json"
    assert main(["refine", str(source), "-o", str(out), "--smoothing", "0"]) == 0
    content = json.loads(out.read_text())
    assert content.pop("schedule") == pytest.approx(REFINED, rel=1e-6, abs=1e-12)
    assert content == {"source": str(source), "norm": "l2", "smoothing": 0.0, "total_steps": 10}
    picture(out.with_suffix(".png"))
    assert "highest at step 3" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("out", "written", "read"),
    [
        ("schedule.npy", "schedule.npy", np.load),
        ("schedule.png", "schedule.json", lambda path: json.loads(path.read_text())["schedule"]),
    ],
    ids=["an array", "named as its picture"],
)
def test_refine_loses_no_schedule_to_its_name(tmp_path, out, written, read):
    pytest.importorskip("matplotlib")
    source = write(tmp_path / "run.txt", NORMS)
    assert main(["refine", str(source), "-o", str(tmp_path / out), "--smoothing", "0"]) == 0
    assert read(tmp_path / written) == pytest.approx(REFINED, rel=1e-6, abs=1e-12)
    picture(tmp_path / "schedule.png")


@pytest.mark.parametrize("out", ["run.json", "run.png"])
def test_refine_does_not_write_over_the_norms(tmp_path, out, capsys):
    source = tmp_path / "run.json"
    source.write_text(json.dumps(NORMS))
    assert main(["refine", str(source), "-o", str(tmp_path / out), "--smoothing", "0"]) == 2
    assert "give -o another name" in capsys.readouterr().err
    assert json.loads(source.read_text()) == NORMS


def test_refine_takes_l1_norms_and_another_length(tmp_path):
    source, out = write(tmp_path / "run.npz", NORMS, "grad_norm_l1"), tmp_path / "schedule.json"
    arguments = ["refine", str(source), "-o", str(out), "--norm", "l1", "--smoothing", "0", "--total-steps", "19"]
    assert main(arguments) == 0
    weights = 1 / np.array(NORMS)
    expected = weights * (weights.sum() - weights.cumsum())
    content = json.loads(out.read_text())
    assert content["total_steps"] == 19 and content["norm"] == "l1"
    assert content["schedule"][::2] == pytest.approx(expected / expected.max())
    assert lrkernels.schedules.table(content["schedule"])(19) == 0


def test_refine_passes_warnings_on(tmp_path, capsys):
    source = write(tmp_path / "run.txt", [*NORMS, float("nan")])
    assert main(["refine", str(source), "-o", str(tmp_path / "schedule.json"), "--smoothing", "0"]) == 0
    assert "lrkernels: dropped 1 of 11" in capsys.readouterr().err
    assert json.loads((tmp_path / "schedule.json").read_text())["schedule"] == pytest.approx(REFINED, rel=1e-6)


def test_plot_draws_a_history(tmp_path):
    history = {"step": np.arange(50), "lr": np.linspace(1, 0, 50), "cosine": np.sin(np.arange(50))}
    np.savez(tmp_path / "run.npz", **history)
    np.savez(tmp_path / "more.npz", **history, grad_norm=np.geomspace(100, 1, 50))
    for name in ("run", "more"):
        assert main(["plot", str(tmp_path / f"{name}.npz"), "-o", str(tmp_path / f"{name}.png")]) == 0
    assert picture(tmp_path / "more.png").shape[0] > picture(tmp_path / "run.png").shape[0]


@pytest.mark.parametrize(
    ("arguments", "content", "message"),
    [
        ("refine run.npz", None, "No such file or directory: run.npz"),
        ("refine run.npz", {"lr": [1.0]}, "run.npz has no 'grad_norm' (it has lr)"),
        ("refine run.npz --norm l1", {"grad_norm": [1.0]}, "run.npz has no 'grad_norm_l1' (it has grad_norm)"),
        ("refine run.npz", {"grad_norm": []}, "run.npz is empty"),
        ("refine run.npz", "no archive", "run.npz is not a file that numpy.savez"),
        ("refine run.npy", "", "run.npy is not a file that numpy.savez"),
        ("refine run.json", "[1, ", "run.json must hold a JSON list of numbers"),
        ("refine run.json", '{"grad_norm": ["x"]}', "run.json must hold a JSON list of numbers"),
        ("refine run.json", '{"lr": [1]}', "run.json has no 'grad_norm' (it has lr)"),
        ("plot run.json", '{"step": [1], "other": [1]}', "nothing to draw"),
        ("refine run.txt", "", "run.txt is empty"),
        ("refine run.csv", "step,loss\n0,2.5\n", "run.csv has no 'grad_norm' (it has step, loss)"),
        ("refine run.csv", "step,grad_norm\n0\n", "run.csv: column 'grad_norm' must hold one number in each row"),
        ("refine run.txt", "1 -2", "grad_norms must not be negative"),
        ("refine run.txt --smoothing 2", "1 2", "smoothing must be a fraction"),
        ("plot run.npz", None, "No such file or directory: run.npz"),
        ("plot run.npz", {"other": [1.0]}, "nothing to draw"),
        ("plot run.txt", "1 2", "run.txt is not a file that numpy.savez"),
    ],
)
def test_mistakes_are_one_line(tmp_path, monkeypatch, capsys, arguments, content, message):
    monkeypatch.chdir(tmp_path)
    name = arguments.split()[1]
    if isinstance(content, dict):
        np.savez(name, **content)
    elif content is not None:
        (tmp_path / name).write_text(content)
    assert main(arguments.split()) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"lrkernels: {message}") and captured.err.count("\n") == 1
    assert captured.out == "" and {path.name for path in tmp_path.iterdir()} <= {name}


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["info", "--more"], ["demo", "--steps", "0"]])
def test_unknown_arguments_are_refused(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert "usage: python -m lrkernels" in capsys.readouterr().err


@pytest.fixture
def no_matplotlib(monkeypatch):
    for name in ("demo", "plots"):
        monkeypatch.delitem(sys.modules, f"lrkernels.{name}", raising=False)
        monkeypatch.delattr(lrkernels, name, raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)


@pytest.mark.parametrize("arguments", ["demo --steps 2", "plot run.npz"])
def test_a_missing_extra_is_named(no_matplotlib, tmp_path, monkeypatch, capsys, arguments):
    monkeypatch.chdir(tmp_path)
    assert main(arguments.split()) == 2
    assert capsys.readouterr().err == "lrkernels: this needs matplotlib: pip install 'lrkernels[demo]'\n"


def test_refine_works_without_matplotlib(no_matplotlib, tmp_path, capsys):
    source, out = write(tmp_path / "run.txt", NORMS), tmp_path / "schedule.json"
    assert main(["refine", str(source), "-o", str(out), "--smoothing", "0"]) == 0
    assert json.loads(out.read_text())["schedule"] == pytest.approx(REFINED, rel=1e-6)
    assert capsys.readouterr().err == "lrkernels: no picture without matplotlib: pip install 'lrkernels[demo]'\n"


def test_bench_runs_the_script_of_the_checkout(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(command_line, "__file__", str(tmp_path / "lrkernels" / "__main__.py"))
    assert main(["bench"]) == 2
    assert "the benchmarks come with the source checkout" in capfd.readouterr().err
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "run.py").write_text("import sys; print(sys.argv[1:]); sys.exit(3)")
    assert main(["bench", "--quick", "-o", "out", "--help"]) == 3
    assert capfd.readouterr().out == "['--quick', '-o', 'out', '--help']\n"


def test_info_runs_as_a_module():
    run = subprocess.run([sys.executable, "-m", "lrkernels", "info"], capture_output=True, text=True, check=True)
    assert lrkernels.__version__ in run.stdout and "torch" in run.stdout


NOT_BUILT = """
import sys


class Missing:
    def find_spec(name, *_):
        if name == "lrkernels._C":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Missing)
import lrkernels

print(lrkernels.info())
"""


def test_info_says_that_the_kernels_are_not_built():
    run = subprocess.run([sys.executable, "-c", NOT_BUILT], capture_output=True, text=True, check=True)
    assert "cpu     eager: not available (ModuleNotFoundError: No module named 'lrkernels._C')" in run.stdout
