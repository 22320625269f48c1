"""Time every row of cases.CASES: our step and its baseline in turns, as ratios. Usage: README.md beside this file."""

import argparse
import gc
import json
import math
import os
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from time import perf_counter, process_time, sleep
from typing import Any

import torch
from cases import CASES, CLIPPED, HYPERS, MEMORY, MODELS, Case
from host import busy_seconds, machine
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import lrkernels

try:
    from tqdm import tqdm
except ImportError:
    tqdm = None

OURS = {"sgd": lrkernels.FusedSGD, "adamw": lrkernels.FusedAdamW}
TORCHS = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}
WARM_UP = 3
ROUNDS = 4  # of a case, each with memory of its own: a ratio hangs on where that happens to lie
COPY_BYTES = 256 << 20
QUIET = 0.03  # of the machine's CPU time may go to other processes before a figure is doubtful

# -- baselines: the same work with torch's own calls; each takes (params, optimizer) and returns the step --------------

Step = Callable[[], Any]
Form = Callable[[list[Tensor]], list[Tensor]]


def plain(params: list[Tensor], optimizer: torch.optim.Optimizer) -> Step:
    return optimizer.step


def clip(params: list[Tensor], optimizer: torch.optim.Optimizer) -> Step:
    def step() -> None:
        torch.nn.utils.clip_grad_norm_(params, CLIPPED["max_grad_norm"], foreach=True)
        optimizer.step()

    return step


def norm(tensors: list[Tensor]) -> Tensor:
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(tensors)))


def dot(lefts: list[Tensor], rights: list[Tensor]) -> Tensor:
    pairs = zip(lefts, rights, strict=True)
    return torch.stack([torch.dot(a.view(-1), b.view(-1)) for a, b in pairs]).sum()


def flat(tensors: list[Tensor]) -> list[Tensor]:
    """One tensor with a copy of all: another pass over memory, and then a few calls instead of hundreds."""
    return [torch.cat([tensor.view(-1) for tensor in tensors])]


def direction(params: list[Tensor], optimizer: torch.optim.Optimizer, form: Form = list) -> Step:
    """Norm and direction cosine: the previous direction is there, it is the momentum."""

    def step() -> Tensor:
        grads = form([p.grad for p in params])
        buffers = form([optimizer.state[p]["momentum_buffer"] for p in params]) if optimizer.state else grads
        grad_norm = norm(grads)
        cosine = dot(grads, buffers) / (grad_norm * norm(buffers))
        optimizer.step()
        return torch.stack((grad_norm, cosine))

    return step


def previous(params: list[Tensor], optimizer: torch.optim.Optimizer) -> Step:
    """Norm and dot product with the previous gradient, which is copied."""
    kept = [p.grad.clone() for p in params]

    def step() -> Tensor:
        grads = [p.grad for p in params]
        found = torch.stack((norm(grads), dot(grads, kept)))
        optimizer.step()
        torch._foreach_copy_(kept, grads)
        return found

    return step


def previous_flat(params: list[Tensor], optimizer: torch.optim.Optimizer) -> Step:
    """The same on flat gradients: the flat copy is what is kept."""
    kept = flat([p.grad for p in params])

    def step() -> Tensor:
        nonlocal kept
        grads = flat([p.grad for p in params])
        found = torch.stack((norm(grads), dot(grads, kept)))
        optimizer.step()
        kept = grads
        return found

    return step


BASELINES = {  # name: the step, how torch's optimizer is to do its part
    "plain": (plain, {"fused": True}),
    "plain_foreach": (plain, {"foreach": True}),
    "clip": (clip, {"fused": True}),
    "direction": (direction, {"fused": True}),
    "direction_foreach": (direction, {"foreach": True}),
    "direction_flat": (partial(direction, form=flat), {"fused": True}),
    "previous": (previous, {"fused": True}),
    "previous_flat": (previous_flat, {"fused": True}),
}

# -- one side of a comparison ------------------------------------------------------------------------------------------


class Side:
    """Parameters, and a step on them by ``who``: "ours" or one of BASELINES."""

    def __init__(
        self, who: str, shapes: list[tuple[int, ...]], optimizer: str, ours: dict[str, Any], device: str = "cpu"
    ) -> None:
        seed = torch.Generator(device).manual_seed(0)

        def draw(scale: float) -> list[Tensor]:
            return [scale * torch.randn(shape, generator=seed, device=device) for shape in shapes]

        self.params = [torch.nn.Parameter(x) for x in draw(0.1)]
        self.source = draw(0.01)
        self.new_gradients()
        if who.startswith("ours"):
            self.step = OURS[optimizer](self.params, **HYPERS[optimizer], **{"backend": "native", **ours}).step
        else:
            make_step, how = BASELINES[who]
            self.step = make_step(self.params, TORCHS[optimizer](self.params, **HYPERS[optimizer], **how))

    def new_gradients(self) -> None:
        """As between two steps of training: the old gradients are let go, and backward makes new tensors."""
        for p in self.params:
            p.grad = None
        for p, values in zip(self.params, self.source, strict=True):
            p.grad = values.clone()

    def timed_turn(self, steps: int) -> float:
        """Seconds of a step alone, over so many on the same gradients."""
        self.new_gradients()
        start = perf_counter()
        for _ in range(steps):
            self.step()
        return (perf_counter() - start) / steps


def copy_bandwidth(times: int = 5) -> float:
    """GB/s of a copy too large for any cache, bytes read plus bytes written."""
    source, target = torch.ones(COPY_BYTES // 4), torch.ones(COPY_BYTES // 4)
    seconds = []
    for _ in range(times):
        start = perf_counter()
        target.copy_(source)
        seconds.append(perf_counter() - start)
    return 2 * COPY_BYTES / statistics.median(seconds) / 1e9


def wait_for_quiet(deadline: float) -> None:
    while perf_counter() < deadline:
        busy = busy_seconds()
        sleep(2)
        if busy_seconds() - busy <= 2 * QUIET * (os.cpu_count() or 1):
            return


def rounds_of(pairs: int) -> list[int]:
    """The pairs of each round: as many as can be in each, and one at least."""
    return [len(range(first, pairs, ROUNDS)) for first in range(min(ROUNDS, pairs))]


def time_round(case: Case, pairs: int, ours_first: bool, tick: Callable[[], Any]) -> list[tuple[float, float]]:
    """Make both sides anew, and time their steps in turns, A B B A A B ...: the seconds of ours and of the baseline."""
    gc.collect()
    names = ("ours", case.baseline) if ours_first else (case.baseline, "ours")
    sides = {who: Side(who, MODELS[case.model].shapes, case.optimizer, case.ours) for who in names}
    ours, baseline = sides["ours"], sides[case.baseline]
    gc.disable()
    times: dict[Side, list[float]] = {ours: [], baseline: []}
    for pair in range(WARM_UP + pairs):
        for side in (ours, baseline) if pair % 2 else (baseline, ours):
            times[side].append(side.timed_turn(MODELS[case.model].steps))
        tick()
    gc.enable()
    for a, b in zip(ours.params, baseline.params, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4, msg=f"{case.id}: the two sides did different work")
    return list(zip(times[ours][WARM_UP:], times[baseline][WARM_UP:], strict=True))


def compare(case: Case, pairs: int, tick: Callable[[], Any]) -> dict[str, Any]:
    """Time rounds of pairs of steps, and take the median of the ratios within the pairs."""
    bandwidth = copy_bandwidth()
    since, busy, own = perf_counter(), busy_seconds(), process_time()
    rounds = [time_round(case, count, n % 2 == 0, tick) for n, count in enumerate(rounds_of(pairs))]
    others = (busy_seconds() - busy - process_time() + own) / (perf_counter() - since) / (os.cpu_count() or 1)
    times = [pair for each in rounds for pair in each]
    low, median, high = statistics.quantiles([baseline / ours for ours, baseline in times], n=4)
    seconds = statistics.median(ours for ours, _ in times)
    rate = case.bytes * sum(map(math.prod, MODELS[case.model].shapes)) / seconds / 1e9
    return {
        "id": case.id,
        "baseline": case.baseline,
        "pairs": pairs,
        "ours_ms": seconds * 1e3,
        "baseline_ms": statistics.median(baseline for _, baseline in times) * 1e3,
        "ratio": median,
        "quartiles": [low, high],
        "mark": case.mark,
        "met": None if case.mark is None else median >= case.mark,
        "gb_per_s": rate,
        "of_copy": rate / bandwidth,
        "others": max(others, 0.0),
    }


# -- memory ------------------------------------------------------------------------------------------------------------


def allocated(work: Callable[[], Any]) -> tuple[Any, int, int]:
    """Do ``work``: its result, and how many bytes torch's allocator holds more than before, at its end and at most."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = work()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return result, now, peak


def measure_memory(work: str, who: str, optimizer: str, ours: dict[str, Any]) -> dict[str, Any]:
    """Bytes per parameter: held between steps beside parameters and gradients, and the peak of a step above that."""

    def train() -> Side:
        side = Side(who, MODELS["resnet50"].shapes, optimizer, ours)
        for _ in range(WARM_UP):
            side.timed_turn(steps=1)
        side.new_gradients()
        return side

    side, held, _ = allocated(train)
    _, _, peak = allocated(side.step)
    numel = sum(p.numel() for p in side.params)
    row = {"work": work, "optimizer": optimizer, "who": who}
    return {**row, "held": held / numel - 12, "step": peak / numel}  # 12: parameters, gradients, and their source


# -- tables ------------------------------------------------------------------------------------------------------------


def show_table(titles: str, rows: list[list[str]]) -> None:
    cells = [titles.split("|"), *rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    for row in cells:
        text = [c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        print("  ".join(text).rstrip())
    print()


def show(results: list[dict[str, Any]], memory: list[dict[str, Any]]) -> None:
    verdicts = {None: "", True: "met", False: "MISSED"}
    titles = "case|baseline|ours ms|baseline ms|ratio|quartiles|mark|  |GB/s|of copy|others"
    rows = []
    for r in results:
        times = [f"{r['ours_ms']:.3f}", f"{r['baseline_ms']:.3f}", f"{r['ratio']:.2f}"]
        mark = [f"{r['mark']:.2f}" if r["mark"] else "", verdicts[r["met"]]]
        rate = [f"{r['gb_per_s']:.1f}", f"{r['of_copy']:.2f}", f"{r['others']:.0%}"]
        rows.append([r["id"], r["baseline"], *times, "{:.2f}-{:.2f}".format(*r["quartiles"]), *mark, *rate])
    if rows:
        show_table(titles, rows)
    if memory:
        print("Memory on resnet50, bytes per parameter beside parameters and gradients:")
        rows = [[f"{m['optimizer']} {m['work']}", m["who"], f"{m['held']:.1f}", f"{m['step']:.2f}"] for m in memory]
        show_table("work|by|held|peak of a step above that", rows)


def main() -> int:
    parser = argparse.ArgumentParser(description="Time our steps against torch's, as ratios. See benchmarks/README.md.")
    ids = [*(case.id for case in CASES), "memory"]
    parser.add_argument("--case", nargs="+", metavar="ID", choices=ids, default=ids, help=", ".join(ids))
    parser.add_argument("--pairs", type=int, help="pairs of steps for each case (default: by the model)")
    parser.add_argument("--threads", type=int, default=2, help="(default: 2)")
    patience = "seconds to wait, for each case, until other processes leave the machine alone (default: 0)"
    parser.add_argument("--patience", type=float, default=0.0, help=patience)
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the results there")
    parser.add_argument("--check", action="store_true", help="exit 1 when a mark is missed")
    args = parser.parse_args()
    if args.pairs is not None and args.pairs < 2:
        parser.error("--pairs must be at least 2")

    torch.set_num_threads(args.threads)
    about = machine()
    print(*(f"{key}: {value}" for key, value in about.items()), "", sep="\n")
    cases = [(case, args.pairs or MODELS[case.model].pairs) for case in CASES if case.id in args.case]
    total = sum(WARM_UP + count for _, pairs in cases for count in rounds_of(pairs))
    bar = tqdm(total=total, unit="pair", leave=False, disable=None) if tqdm else None
    results = []
    for case, pairs in cases:
        if bar:
            bar.set_description(case.id)
        deadline = perf_counter() + args.patience
        attempts = []
        while not attempts or (attempts[-1]["others"] > QUIET and perf_counter() < deadline):
            wait_for_quiet(deadline)
            attempts.append(compare(case, pairs, bar.update if bar and not attempts else lambda: None))
        results.append(min(attempts, key=lambda result: result["others"]))
    if bar:
        bar.close()
    memory = [measure_memory(*row) for row in MEMORY] if "memory" in args.case else []
    show(results, memory)
    if args.json:
        about["load_average_after"] = os.getloadavg()
        args.json.write_text(json.dumps({"machine": about, "cases": results, "memory": memory}, indent=1) + "\n")
    missed = [r["id"] for r in results if r["met"] is False]
    if missed:
        print(f"missed: {', '.join(missed)}")
    return int(args.check and bool(missed))


if __name__ == "__main__":
    sys.exit(main())
