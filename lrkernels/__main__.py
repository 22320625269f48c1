"""The command line: ``python -m lrkernels info | demo | bench | refine NORMS -o OUT | plot HISTORY``."""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

EXTRAS = {"matplotlib", "sklearn", "tqdm"}
NORM_KEYS = {"l2": "grad_norm", "l1": "grad_norm_l1"}


def info(args: argparse.Namespace) -> int:
    """Print what is built, which backend serves which device, and versions."""
    import lrkernels

    print(lrkernels.info())
    return 0


def demo(args: argparse.Namespace) -> int:
    """Train two small models by torch's own optimizer and by FusedSGD; exit code 1 if they disagree."""
    from . import demo

    results = demo.demo(args.task, args.steps, args.seed, args.out)
    return 0 if all(result.agrees for result in results) else 1


def bench(args: argparse.Namespace) -> int:
    """Run the benchmarks of the source checkout, with whatever arguments follow."""
    script = Path(__file__).resolve().parent.parent / "benchmarks" / "run.py"
    if not script.exists():
        raise FileNotFoundError(f"the benchmarks come with the source checkout, and there is no {script}")
    return subprocess.run([sys.executable, str(script), *args.rest], check=False).returncode


def refine(args: argparse.Namespace) -> int:
    """Turn the gradient norms of a run into a schedule for the next one, and a picture beside it."""
    from .schedules import refined

    norms = read_norms(args.norms, args.norm)
    schedule = refined(norms, args.total_steps, norm=args.norm, smoothing=args.smoothing)
    values = [schedule(step) for step in range(schedule.total_steps or 0)]
    content = {
        "schedule": values,
        "source": str(args.norms),
        "norm": args.norm,
        "smoothing": args.smoothing,
        "total_steps": len(values),
    }
    picture = args.out.with_suffix(".png")
    out = args.out.with_suffix(".json") if args.out == picture else args.out
    if args.norms.resolve() in (out.resolve(), picture.resolve()):
        raise ValueError(f"{args.norms} has the norms themselves; give -o another name")
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == ".npy":
        np.save(out, values)
    else:
        out.write_text(json.dumps(content) + "\n")
    print(f"{len(values)} steps, highest at step {int(np.argmax(values))}: {out}")

    try:
        from . import plots
    except ModuleNotFoundError as error:
        _say(f"no picture without {error.name}: pip install 'lrkernels[demo]'")
        return 0
    plots.refined(norms, values, picture, norm=args.norm, smoothing=args.smoothing)
    print(f"picture: {picture}")
    return 0


def plot(args: argparse.Namespace) -> int:
    """Draw a recorded history."""
    from . import plots

    plots.histories({args.history.stem: {"": _load(args.history)}}, args.out)
    print(args.out)
    return 0


def read_norms(path: Path, norm: str = "l2") -> NDArray:
    """Read gradient norms from a history (.npz, .json), an array (.npy, .json), or text: numbers, or a table.

    Args:
        path: The file.
        norm: ``"l2"`` or ``"l1"``: read the column ``grad_norm`` or ``grad_norm_l1`` (default: ``"l2"``).

    Raises:
        ValueError: If the file has no such column, no numbers, or none at all.
    """
    key = NORM_KEYS[norm]
    columns = _load(path, key) if path.suffix in (".npz", ".npy", ".json") else _read_text(path, key)
    if key not in columns:
        raise ValueError(f"{path} has no {key!r} (it has {', '.join(columns)}); track=({key!r},) records it")
    norms = np.asarray(columns[key], dtype=float).ravel()
    if norms.size == 0:
        raise ValueError(f"{path} is empty: no gradient norms")
    return norms


def _load(path: Path, key: str = "") -> dict[str, NDArray]:
    """The arrays of an .npz file or JSON object, or the one of an .npy file or JSON list under the name ``key``."""
    if path.suffix == ".json":
        try:
            content = json.loads(path.read_text())
            columns = content if isinstance(content, dict) else {key: content}
            return {name: np.array(column, dtype=float).reshape(-1) for name, column in columns.items()}
        except (ValueError, TypeError):
            raise ValueError(f"{path} must hold a JSON list of numbers, or an object of such lists") from None
    try:
        content = np.load(path)
    except (ValueError, EOFError, zipfile.BadZipFile):
        raise ValueError(f"{path} is not a file that numpy.savez or numpy.save wrote") from None
    if isinstance(content, np.ndarray):
        return {key: content}
    with content:
        return dict(content)


def _read_text(path: Path, key: str) -> dict[str, NDArray]:
    """The columns of a CSV file with a header, or every number of any other text."""
    text = path.read_text()
    try:
        return {key: np.array(text.replace(",", " ").split(), dtype=float)}
    except ValueError:
        header, *body = (row for row in csv.reader(text.splitlines(), skipinitialspace=True) if row)
    if key not in header:
        return {name: np.empty(0) for name in header}
    try:
        return {key: np.array([row[header.index(key)] for row in body], dtype=float)}
    except (ValueError, IndexError):
        raise ValueError(f"{path}: column {key!r} must hold one number in each row") from None


def parser() -> argparse.ArgumentParser:
    """The arguments of every command."""
    top = argparse.ArgumentParser(prog="python -m lrkernels", description="Optimizers whose rate watches training.")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(function, **options):  # type: ignore[no-untyped-def]
        sub = commands.add_parser(function.__name__, help=function.__doc__, description=function.__doc__, **options)
        sub.set_defaults(function=function)
        return sub

    command(info)

    sub = command(demo)
    sub.add_argument("--task", choices=["digits", "text", "both"], default="both")
    sub.add_argument("--steps", type=_positive, help="steps of each training (default: 300 for digits, 600 for text)")
    sub.add_argument("--seed", type=int, default=0, help="decides data order and first weights (default: 0)")
    sub.add_argument("--out", type=Path, default=Path("demo_output"), help="folder to write to (default: demo_output)")

    command(bench, add_help=False)

    sub = command(refine)
    sub.add_argument("norms", type=Path, help="a history (.npz, .json), or norms as .npy, .json, .txt or .csv")
    sub.add_argument(
        "-o", "--out", type=Path, default=Path("schedule.json"), help="JSON, or .npy (default: schedule.json)"
    )
    sub.add_argument("--norm", choices=list(NORM_KEYS), default="l2", help="l2 for SGD (default), l1 for Adam")
    sub.add_argument("--smoothing", type=float, default=0.1, help="fraction of the run in a median (default: 0.1)")
    sub.add_argument("--total-steps", type=_positive, help="length of the next run (default: the recorded one's)")

    sub = command(plot)
    sub.add_argument("history", type=Path, help="what numpy.savez(path, **optimizer.history()) wrote, or JSON")
    sub.add_argument("-o", "--out", type=Path, default=Path("history.png"), help="default: history.png")
    return top


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def _say(message: object) -> None:
    print("lrkernels:", str(message).removeprefix("lrkernels: "), file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; a user's mistake is one line on stderr and exit code 2."""
    args, rest = (top := parser()).parse_known_args(arguments)
    if rest and args.command != "bench":
        top.error(f"unrecognized arguments: {' '.join(rest)}")
    args.rest = rest
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: _say(message)
        try:
            return args.function(args)
        except ModuleNotFoundError as error:
            extra = (error.name or "").partition(".")[0]
            if extra not in EXTRAS:
                raise
            _say(f"this needs {extra}: pip install 'lrkernels[demo]'")
        except OSError as error:
            _say(f"{error.strerror}: {error.filename}" if error.filename else error)
        except ValueError as error:
            if args.function not in (refine, plot):
                raise
            _say(error)
    return 2


if __name__ == "__main__":
    sys.exit(main())
