"""The step on a GPU: bandwidth, ratios to torch's strongest calls, host time. ``make gpu-check`` runs it.

Device time is taken from replayed graphs, so that no launch gap hides in it; a comparison is of whole steps as a user
makes them, in turns. The tables and torch's side of each comparison are those of cases.py and run.py.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from cases import CLIPPED, MODELS, SCHEDULED, STORE, WATCHED
from run import Side, Step, machine, show_table

SHAPES = {name: MODELS[name].shapes for name in ("resnet50", "gpt2")}
SHAPES |= {"large": [(32 << 20,)] * 4, "small": [(64,)] * 3000}
TINY = {name: [(33,), (5, 7)] for name in SHAPES}  # where only the code is tried, not the device
REPEATS = 20
WARM_UP = 3


@dataclass(frozen=True)
class Row:
    """What our step does, the bytes a parameter needs for it, and torch's calls for the same work."""

    id: str
    model: str
    ours: dict[str, Any]
    bytes: int
    baselines: tuple[str, ...] = ()  # of run.BASELINES; with "compiled:" in front, under torch.compile
    optimizer: str = "sgd"


DIRECTION = ("direction", "direction_flat")
ROWS = [
    Row("large-plain", "large", SCHEDULED, 20, ("plain",)),
    Row("large-watched", "large", WATCHED, 20, DIRECTION),
    Row("large-clip", "large", CLIPPED, 24, ("clip",)),
    Row("large-store", "large", STORE, 28, ("previous_flat",)),
    Row("large-adamw-plain", "large", SCHEDULED, 28, ("plain",), "adamw"),
    Row("large-adamw-watched", "large", WATCHED, 28, (), "adamw"),
    Row("resnet50-plain", "resnet50", SCHEDULED, 20, ("plain",)),
    Row("resnet50-watched", "resnet50", WATCHED, 20, (*DIRECTION, "compiled:direction")),
    Row("resnet50-clip", "resnet50", CLIPPED, 24, ("clip",)),
    Row("gpt2-plain", "gpt2", SCHEDULED, 20, ("plain",)),
    Row("gpt2-watched", "gpt2", WATCHED, 20, (*DIRECTION, "compiled:direction")),
    Row("small-plain", "small", SCHEDULED, 20, ("plain",)),
]


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
    made = Side(who.removeprefix("compiled:"), shapes, row.optimizer, row.ours, device)
    step = torch.compile(made.step) if who.startswith("compiled:") else made.step
    for _ in range(WARM_UP):
        step()
    return made, step


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


def measure(
    row: Row, shapes: list[tuple[int, ...]], device: str, copy: float, say: Callable[[str], Any]
) -> dict[str, Any]:
    """One row of the table: our device time and bandwidth, host time, and each baseline in turns with ours."""
    clock = Clock(device)
    ours, step = side("ours", row, shapes, device)
    numel = sum(p.numel() for p in ours.params)
    replay = replayed(step, device)
    milliseconds = clock.median(replay)
    rate = 1e-6 * row.bytes * numel / milliseconds
    result: dict[str, Any] = {
        "id": row.id,
        "tensors": len(shapes),
        "parameters": numel,
        "bytes": row.bytes,
        "device_ms": milliseconds,
        "gb_per_s": rate,
        "of_copy": rate / copy,
        "host_us": host_us(step, device),
        "host_us_replayed": host_us(replay, device),
        "baselines": {},
    }
    for name in row.baselines:
        try:
            _, theirs = side(name, row, shapes, device)
            pairs = [(clock(step), clock(theirs)) for _ in range(REPEATS)][WARM_UP:]
            result["baselines"][name] = {
                "ours_ms": statistics.median(a for a, _ in pairs),
                "theirs_ms": statistics.median(b for _, b in pairs),
                "ratio": statistics.median(b / a for a, b in pairs),
            }
        except Exception as error:  # torch.compile needs a compiler that may not be there
            result["baselines"][name] = {"error": f"{type(error).__name__}: {error}"[:300]}
            say(f"{row.id} against {name}: {error}")
    return result


def show(results: list[dict[str, Any]]) -> None:
    titles = "case|tensors|device ms|GB/s|of copy|host us|replayed us|ratios"
    rows = []
    for r in results:
        ratios = [f"{name} {b['ratio']:.2f}" if "ratio" in b else f"{name} -" for name, b in r["baselines"].items()]
        figures = [f"{r[key]:.{digits}f}" for key, digits in (("device_ms", 3), ("gb_per_s", 0), ("of_copy", 3))]
        hosts = [f"{r[key]:.1f}" for key in ("host_us", "host_us_replayed")]
        rows.append([r["id"], str(r["tensors"]), *figures, *hosts, ", ".join(ratios)])
    show_table(titles, rows)


def benchmark(device: str, shapes: dict[str, list[tuple[int, ...]]], copied: int, seconds: float) -> dict[str, Any]:
    """All rows that fit into ``seconds``, with the machine's description and the copy's rate."""
    deadline = perf_counter() + seconds
    copy = copy_gb_per_s(device, copied)
    about = machine() | {
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else device,
        "copy_gb_per_s": copy,
    }
    results: list[dict[str, Any]] = []
    left_out = []
    for row in ROWS:
        if perf_counter() > deadline:
            left_out.append(row.id)
            continue
        results.append(measure(row, shapes[row.model], device, copy, lambda text: print(text, file=sys.stderr)))
    return {"machine": about, "rows": results, "left_out": left_out}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the results there")
    parser.add_argument("--seconds", type=float, default=150.0, help="start no row after these (default: 150)")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device: there is nothing to measure")
        return 1
    found = benchmark("cuda", SHAPES, 128 << 20, args.seconds)
    for key, value in found["machine"].items():
        print(f"{key}: {value}")
    show(found["rows"])
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
