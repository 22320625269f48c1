"""The step on a GPU: bandwidth, ratios to torch's strongest calls, host time. ``make gpu-check`` runs it.

Device time is taken from replayed graphs, so that no launch gap hides in it, and so is the ratio of one of our steps to
another; a comparison with torch is of whole steps as a user makes them, in turns. The tables and torch's side of each
comparison are those of cases.py and run.py.
"""

import argparse
import gc
import json
import math
import signal
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from cases import CLIPPED, MODELS, SCHEDULED, STORE, WATCHED
from run import Side, Step, machine, show_table
from unattended import SECONDS, notes

SHAPES = {name: MODELS[name].shapes for name in ("resnet50", "gpt2")}
SHAPES |= {"large": [(32 << 20,)] * 4, "small": [(64,)] * 3000}
TINY = {name: [(33,), (5, 7)] for name in SHAPES}  # where only the code is tried, not the device
REPEATS = 20
WARM_UP = 3
PATIENCE = 50.0  # seconds for one baseline, compiling included


@dataclass(frozen=True)
class Row:
    """What our step does, the bytes a parameter needs for it, and what it is compared with."""

    id: str
    model: str
    ours: dict[str, Any]
    bytes: int
    baselines: tuple[str, ...] = ()  # of run.BASELINES; with "compiled:" in front, under torch.compile; or of OURS
    optimizer: str = "sgd"


OURS = {"ours:plain": SCHEDULED, "ours:triton": {"backend": "triton"}}  # what of a row's step is another then
PARTS = ("direction", "direction_flat")
COMPILED = ("compiled:direction", "compiled:direction_foreach")  # torch's fused step stays a call, foreach is compiled
LATE = ("ours:triton", *COMPILED)  # what may take long, in this order after all the rest
ROWS = [
    Row("large-plain", "large", SCHEDULED, 20, ("plain", "ours:triton")),
    Row("large-watched", "large", WATCHED, 20, (*PARTS, "ours:plain", "ours:triton")),
    Row("large-clip", "large", CLIPPED, 24, ("clip",)),
    Row("large-store", "large", STORE, 28, ("previous_flat",)),
    Row("large-store-clip", "large", STORE | CLIPPED, 32),
    Row("resnet50-plain", "resnet50", SCHEDULED, 20, ("plain",)),
    Row("resnet50-watched", "resnet50", WATCHED, 20, PARTS + COMPILED),
    Row("resnet50-clip", "resnet50", CLIPPED, 24, ("clip",)),
    Row("gpt2-plain", "gpt2", SCHEDULED, 20, ("plain",)),
    Row("gpt2-watched", "gpt2", WATCHED, 20, PARTS + COMPILED),
    Row("small-plain", "small", SCHEDULED, 20, ("plain",)),
    Row("adamw-large-plain", "large", SCHEDULED, 28, ("plain",), "adamw"),
    Row("adamw-large-watched", "large", WATCHED, 28, (), "adamw"),
]


@dataclass(frozen=True)
class Mark:
    """What must be reached: by one of a row's figures, or by a baseline's time over ours."""

    rows: str  # a pattern of their ids
    figure: str
    least: float = 0.0
    most: float = math.inf


MARKS = [
    Mark("*", "launches", least=1, most=1),
    Mark("large-*", "of_copy", least=0.90),
    Mark("large-watched", "ours:plain", least=1 / 1.03),
    Mark("large-plain", "ours:triton", most=1.15),
    Mark("large-watched", "ours:triton", most=1.15),
    Mark("resnet50-*", "host_us", most=60.0),
    Mark("resnet50-*", "host_us_replayed", most=10.0),
]
for _model in ("resnet50", "gpt2"):
    MARKS += [Mark(f"{_model}-plain", "plain", least=1.0)]
    MARKS += [Mark(f"{_model}-watched", name, least=2.4) for name in PARTS]
    MARKS += [Mark(f"{_model}-watched", name, least=1.5) for name in COMPILED]


class Clock:
    """Milliseconds of work on a device: between two events there, or by the host's clock on the CPU."""

    def __init__(self, device: str) -> None:
        self.cuda = device.startswith("cuda")

    def __call__(self, work: Callable[[], Any]) -> float:
        """Time it once."""
        if not self.cuda:
            start = perf_counter()
            work()
            return 1e3 * (perf_counter() - start)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    def median(self, work: Callable[[], Any], repeats: int = REPEATS) -> float:
        """Time it often, and leave the first out."""
        return statistics.median([self(work) for _ in range(repeats)][WARM_UP:])


def copy_gb_per_s(device: str, numel: int) -> float:
    """A copy within the device, bytes read plus bytes written."""
    source, target = (torch.ones(numel, device=device) for _ in range(2))
    return 8e-6 * numel / Clock(device).median(lambda: target.copy_(source))


def replayed(step: Step, device: str) -> Step:
    """The step in a graph; the step itself on the CPU."""
    if not device.startswith("cuda"):
        return step
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def side(who: str, row: Row, shapes: list[tuple[int, ...]], device: str) -> tuple[Side, Step]:
    """Parameters and the step on them, after some to get ready: "ours", or one of a row's baselines."""
    ours = OURS[who] if who == "ours:plain" else row.ours | OURS.get(who, {})
    made = Side(who.removeprefix("compiled:"), shapes, row.optimizer, ours, device)
    step = torch.compile(made.step) if who.startswith("compiled:") else made.step
    for _ in range(WARM_UP):
        step()
    return made, step


def launches(step: Step, device: str) -> int | None:
    """Kernels of a step, as the profiler counts them; None on the CPU."""
    if not device.startswith("cuda"):
        return None
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    there = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return sum(not event.is_user_annotation and not event.name.startswith("Mem") for event in there)


def host_us(step: Step, device: str) -> float:
    """Microseconds until the call returns, the device being idle."""
    times = []
    for _ in range(REPEATS):
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        start = perf_counter()
        step()
        times.append(1e6 * (perf_counter() - start))
    return statistics.median(times[WARM_UP:])


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in what takes longer: torch.compile may."""

    def ring(*_: Any) -> None:
        raise TimeoutError(f"not done in {seconds:.0f} s")

    signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def against(
    name: str, row: Row, shapes: list[tuple[int, ...]], device: str, step: Step, replay: Step
) -> dict[str, Any]:
    """Our step and a baseline's in turns; what went wrong where that cannot be."""
    try:
        with within(PATIENCE):
            _, theirs = side(name, row, shapes, device)
            if name in OURS:
                step, theirs = replay, replayed(theirs, device)
            clock = Clock(device)
            pairs = [(clock(step), clock(theirs)) for _ in range(REPEATS)][WARM_UP:]
    except Exception as error:  # torch.compile needs a compiler that may not be there, and Triton may not be
        print(f"{row.id} against {name}: {error}", file=sys.stderr)
        return {"error": f"{type(error).__name__}: {error}"[:300]}
    return {
        "ours_ms": statistics.median(a for a, _ in pairs),
        "theirs_ms": statistics.median(b for _, b in pairs),
        "ratio": statistics.median(b / a for a, b in pairs),
    }


def measure(row: Row, shapes: list[tuple[int, ...]], device: str, copy: float) -> dict[str, Any]:
    """One row of the table: launches, device time and bandwidth, host time, and the baselines in turns with ours."""
    gc.collect()
    ours, step = side("ours", row, shapes, device)
    replay = replayed(step, device)
    names = [name for name in row.baselines if name not in LATE]
    baselines = {name: against(name, row, shapes, device, step, replay) for name in names}
    numel = sum(p.numel() for p in ours.params)
    milliseconds = Clock(device).median(replay)
    rate = 1e-6 * row.bytes * numel / milliseconds
    return {
        "id": row.id,
        "tensors": len(shapes),
        "parameters": numel,
        "bytes": row.bytes,
        "launches": launches(step, device),
        "device_ms": milliseconds,
        "gb_per_s": rate,
        "of_copy": rate / copy,
        "host_us": host_us(step, device),
        "host_us_replayed": host_us(replay, device),
        "baselines": baselines,
    }


def measure_late(name: str, row: Row, shapes: list[tuple[int, ...]], device: str) -> dict[str, Any]:
    """One baseline of a row, in turns with ours."""
    gc.collect()
    _, step = side("ours", row, shapes, device)
    return against(name, row, shapes, device, step, replayed(step, device))


def marks(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each mark in each row that it is for: what was measured, and whether that is enough; None where nothing was."""
    found = []
    for result in results:
        ratios = {name: figures.get("ratio") for name, figures in result["baselines"].items()}
        for mark in MARKS:
            if fnmatch(result["id"], mark.rows):
                value = (result | ratios).get(mark.figure)
                met = None if value is None else mark.least <= value <= mark.most
                found.append({"id": result["id"], "figure": mark.figure, "measured": value, "met": met})
                found[-1] |= {"least": mark.least, "most": None if mark.most == math.inf else mark.most}
    return found


def show(found: dict[str, Any]) -> None:
    """Print the rows, the marks, and what there was no time for."""
    results = found["rows"]
    titles = "case|tensors|launches|device ms|GB/s|of copy|host us|replayed us|ratios"
    rows = []
    for r in results:
        ratios = [f"{name} {b['ratio']:.2f}" if "ratio" in b else f"{name} -" for name, b in r["baselines"].items()]
        figures = [f"{r[key]:.{digits}f}" for key, digits in (("device_ms", 3), ("gb_per_s", 0), ("of_copy", 3))]
        hosts = [f"{r[key]:.1f}" for key in ("host_us", "host_us_replayed")]
        rows.append([r["id"], str(r["tensors"]), str(r["launches"] or "-"), *figures, *hosts, ", ".join(ratios)])
    show_table(titles, rows)
    verdicts = {None: "not measured", True: "met", False: "MISSED"}
    rows = []
    for m in marks(results):
        bounds = [f"at {key} {m[key]:.3g}" for key in ("least", "most") if m[key]]
        measured = "-" if m["measured"] is None else f"{m['measured']:.3f}"
        rows.append([m["id"], m["figure"], ", ".join(bounds), measured, verdicts[m["met"]]])
    show_table("case|mark||measured|", rows)
    if found["left_out"]:
        print(f"left out: {', '.join(found['left_out'])}")


def benchmark(
    device: str,
    shapes: dict[str, list[tuple[int, ...]]],
    copied: int,
    seconds: float,
    save: Callable[[dict[str, Any]], Any] = lambda found: None,
    before: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """All that fits into ``seconds``, with the machine's description and the copy's rate; saved after each.

    ``before`` is what a process has saved that did not come to its end. What it has begun is not begun again.
    """
    deadline = perf_counter() + seconds
    copy = copy_gb_per_s(device, copied)
    about = machine() | {
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else device,
        "copy_gb_per_s": copy,
    }
    rows: dict[str, dict[str, Any]] = {row["id"]: row for row in (before or {"rows": []})["rows"]}
    done = {*rows, *(f"{id} against {name}" for id, row in rows.items() for name in row["baselines"])}
    found: dict[str, Any] = {"machine": about, "left_out": []}
    late = [(row, name) for name in LATE for row in ROWS if name in row.baselines]
    for row, name in [*((row, "") for row in ROWS), *late]:
        work = f"{row.id} against {name}" if name else row.id
        if perf_counter() > deadline or work in notes.before or (name and row.id not in rows):
            found["left_out"] += [] if work in done else [work]
        elif name:
            notes.begin(work, PATIENCE + SECONDS)
            rows[row.id]["baselines"][name] = measure_late(name, row, shapes[row.model], device)
        else:
            notes.begin(work)
            rows[row.id] = measure(row, shapes[row.model], device, copy)
        found |= {"rows": list(rows.values()), "marks": marks(list(rows.values()))}
        save(found)
    notes.end()
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the results there")
    parser.add_argument("--seconds", type=float, default=150.0, help="start no row after these (default: 150)")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device: there is nothing to measure")
        return 1

    def save(found: dict[str, Any]) -> None:
        if args.json:
            args.json.write_text(json.dumps(found, indent=1) + "\n")

    before = json.loads(args.json.read_text()) if notes.before and args.json and args.json.exists() else None
    found = benchmark("cuda", SHAPES, 512 << 20, args.seconds, save, before)
    for key, value in found["machine"].items():
        print(f"{key}: {value}")
    show(found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
