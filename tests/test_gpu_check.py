"""``make gpu-check``, as far as it goes without a GPU: the benchmark's table on the CPU, and the stages."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.skipif(not (ROOT / "benchmarks").exists(), reason="the benchmarks are not there")


@pytest.fixture
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu
    import gpu_check

    return gpu, gpu_check


def test_every_row_is_measured_against_every_baseline(benchmarks, monkeypatch, capsys):
    gpu, _ = benchmarks
    monkeypatch.setattr(gpu, "REPEATS", 5)
    monkeypatch.setattr(torch, "compile", lambda step: step)
    found = gpu.benchmark("cpu", gpu.TINY, 4096, seconds=60.0)
    assert [row["id"] for row in found["rows"]] == [row.id for row in gpu.ROWS] and not found["left_out"]
    for row, wanted in zip(found["rows"], gpu.ROWS, strict=True):
        assert row["parameters"] == 68 and row["device_ms"] > 0 and row["host_us"] > 0
        assert row["gb_per_s"] == pytest.approx(1e-6 * wanted.bytes * 68 / row["device_ms"])
        assert row["of_copy"] == pytest.approx(row["gb_per_s"] / found["machine"]["copy_gb_per_s"])
        assert set(row["baselines"]) == set(wanted.baselines)
        assert all(figures["ratio"] > 0 for figures in row["baselines"].values())
    json.dumps(found)
    gpu.show(found["rows"])
    shown = capsys.readouterr().out
    assert all(row.id in shown for row in gpu.ROWS)
    assert not gpu.benchmark("cpu", gpu.TINY, 4096, seconds=-1.0)["rows"]


def test_a_baseline_that_fails_leaves_the_others(benchmarks, monkeypatch):
    gpu, _ = benchmarks
    monkeypatch.setattr(gpu, "REPEATS", 5)

    def refuse(step):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", refuse)
    (row,) = [row for row in gpu.ROWS if row.id == "gpt2-watched"]
    said = []
    result = gpu.measure(row, gpu.TINY["gpt2"], "cpu", 1.0, said.append)
    assert "no compiler" in result["baselines"]["compiled:direction"]["error"] and len(said) == 1
    assert result["baselines"]["direction"]["ratio"] > 0


def test_the_large_rows_are_over_a_hundred_million(benchmarks):
    gpu, _ = benchmarks
    assert sum(shape[0] for shape in gpu.SHAPES["large"]) > 100_000_000
    assert len(gpu.SHAPES["small"]) == 3000 and len(gpu.SHAPES["resnet50"]) == 161


@pytest.mark.parametrize(
    "code, seconds, status, end",
    [
        ("print('fine')", 30.0, 0, "fine"),
        ("raise SystemExit(3)", 30.0, 3, ""),
        ("import time; time.sleep(60)", 1.0, 124, ""),
    ],
    ids=["passes", "fails", "takes too long"],
)
def test_stages_end_and_are_logged(benchmarks, tmp_path, code, seconds, status, end):
    _, check = benchmarks
    stage = check.Stage("stage", [sys.executable, "-c", code])
    (tmp_path / "log").write_text("")
    check.run(stage, seconds, tmp_path / "log")
    assert stage.status == status and end in stage.end
    assert stage.seconds < 30 and "== stage" in (tmp_path / "log").read_text()


def test_the_stages_fit_into_eight_minutes(benchmarks, tmp_path):
    _, check = benchmarks
    assert check.TOTAL < 480
    assert [stage.name for stage, _ in check.stages(tmp_path)] == [
        *("build", "info", "machine code", "tests", "memcheck", "racecheck", "benchmarks")
    ]
    (tests,) = [stage for stage, _ in check.stages(tmp_path) if stage.name == "tests"]
    assert "tests/test_gpu.py" in tests.command
    compile(check.SANITIZED, "sanitized", "exec")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_it_says_so():
    result = subprocess.run(
        [sys.executable, ROOT / "benchmarks/gpu_check.py"], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 1 and "gpu-check needs a CUDA device" in result.stdout
