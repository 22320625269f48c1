"""Measure what each method claims on runs of about a second, and write docs/evidence.md. See README.md beside it.

The result of a run is one line of the results file, written at once; runs that are there are not run again.
"""

import argparse
import concurrent.futures
import itertools
import json
import math
import os
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import evidence
import torch
from host import busy_seconds, machine
from studies import COSTS, RESULT_FIELDS, STUDIES, Method, Run, closure_of, runs_of, set_up, task_of, train
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "learning-2026-11-22.jsonl"
ROUNDS, WARM_UP = 30, 3  # of the cost of a step


class Results:
    """The results file. One line for each run, for each cost, and for each time the program was started.

    Attributes:
        done: What came out, by ``Run.key``.
        starts: Machine, versions, date and command of each start.
        costs: What ``measure_costs`` returns, the newest of each problem and method.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.done: dict[str, dict[str, Any]] = {}
        self.starts: list[dict[str, Any]] = []
        self.costs: dict[tuple[str, str], dict[str, Any]] = {}
        for line in path.read_text().splitlines() if path.exists() else []:
            try:
                self._take(json.loads(line))
            except json.JSONDecodeError:
                continue  # cut off when the program was killed

    def _take(self, row: dict[str, Any]) -> None:
        if "started" in row:
            self.starts.append(row["started"])
        elif "cost" in row:
            self.costs[row["cost"]["problem"], row["cost"]["method"]] = row["cost"]
        else:
            run = {k: v for k, v in row.items() if k not in RESULT_FIELDS}
            self.done[json.dumps(run, sort_keys=True)] = {k: v for k, v in row.items() if k in RESULT_FIELDS}

    def append(self, row: dict[str, Any]) -> None:
        """Write a line."""
        self._take(row)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab+") as file:
            if file.seek(0, os.SEEK_END) and (file.seek(-1, os.SEEK_END), file.read())[1] != b"\n":
                file.write(b"\n")  # after a line that was cut off
            file.write(json.dumps(row).encode() + b"\n")


def pending(studies: Iterable[str], seeds: int, results: Results) -> list[Run]:
    """What is not there yet: all studies with seed 0, then all with seed 1, ..."""
    runs = {run.key: run for seed in range(seeds) for study in studies for run in runs_of(study, seed)}
    return [run for key, run in runs.items() if key not in results.done]


def one_thread() -> None:
    torch.set_num_threads(1)


def execute(runs: list[Run], results: Results, workers: int = 1, minutes: float = math.inf) -> None:
    """Train, and write each result at once; stops when the time is up."""
    deadline = perf_counter() + 60 * minutes
    with tqdm(total=len(runs), unit="run", smoothing=0.02, mininterval=1.0) as bar:

        def keep(run: Run, result: dict[str, Any]) -> None:
            results.append(run.record | result)
            bar.set_description(f"seed {run.seed}, {run.problem}, {run.method}", refresh=False)
            bar.update()

        if workers == 1:
            one_thread()
            for run in runs:
                if perf_counter() >= deadline:
                    return
                keep(run, train(run))
            return
        spawn = torch.multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(workers, spawn, one_thread) as pool:
            todo = iter(runs if deadline > perf_counter() else [])
            waiting = {pool.submit(train, run): run for run in itertools.islice(todo, 2 * workers)}
            while waiting:
                ready, _ = concurrent.futures.wait(waiting, return_when=concurrent.futures.FIRST_COMPLETED)
                for future in ready:
                    keep(waiting.pop(future), future.result())
                    if perf_counter() < deadline:
                        waiting |= {pool.submit(train, run): run for run in itertools.islice(todo, 1)}


class Side:
    """A model in training by one method, and its steps' seconds: of the whole step, and of what is not its first pass.

    What is not the first evaluation of the closure, forward and backward, is the optimizer's: gala's second one too.
    """

    def __init__(self, method: Method, problem: str) -> None:
        self.run = method.run(problem, 1.0 if method.method == "prodigy" else 1e-3, seed=0)
        self.task = task_of(self.run)
        self.model = self.task.model()
        steps = ROUNDS + WARM_UP
        self.setup = set_up(self.run, list(self.model.parameters()), steps)
        self.batches = self.task.batches(steps)
        self.whole: list[float] = []
        self.own: list[float] = []

    def step(self) -> None:
        """Train on the next batch."""
        passes = []
        closure = closure_of(self.model, self.setup, next(self.batches))

        def timed() -> Any:
            start = perf_counter()
            loss = closure()
            passes.append(perf_counter() - start)
            return loss

        start = perf_counter()
        self.setup.optimizer.step(timed)
        if self.setup.after:
            self.setup.after()
        self.whole.append(perf_counter() - start)
        self.own.append(self.whole[-1] - passes[-1])


def measure_costs(problem: str, methods: list[Method]) -> list[dict[str, Any]]:
    """Steps of all methods in turns; ratios to the first method's step of the same round, median and quartiles."""
    one_thread()
    sides = {method.label: Side(method, problem) for method in methods}
    order = list(sides.values())
    since, busy, own = perf_counter(), busy_seconds(), process_time()
    for _ in tqdm(range(ROUNDS + WARM_UP), desc=f"cost, {problem}", unit="round"):
        for side in order:
            side.step()
        order = [*order[1:], order[0]][::-1]  # nobody always follows the same one
    others = (busy_seconds() - busy - process_time() + own) / (perf_counter() - since) / (os.cpu_count() or 1)
    plain = sides[methods[0].label]
    rows = []
    for label, side in sides.items():
        row: dict[str, Any] = {
            "problem": problem,
            "method": label,
            "rounds": ROUNDS,
            "others": round(max(others, 0), 3),
        }
        for name in ("whole", "own"):
            pairs = zip(getattr(side, name)[WARM_UP:], getattr(plain, name)[WARM_UP:], strict=True)
            quartiles = statistics.quantiles([mine / its for mine, its in pairs], n=4)
            row |= {name: [round(q, 4) for q in quartiles]}
            row |= {f"{name}_ms": round(1e3 * statistics.median(getattr(side, name)[WARM_UP:]), 4)}
        rows.append(row)
    return rows


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measure what each method claims. See benchmarks/README.md.")
    names = [*STUDIES, "cost"]
    parser.add_argument("--study", nargs="+", choices=names, default=names, help=f"(default: all, {', '.join(names)})")
    parser.add_argument("--seeds", type=int, default=5, help="(default: 5)")
    parser.add_argument("--workers", type=int, default=1, help="processes of one thread each (default: 1)")
    parser.add_argument("--budget", type=float, default=math.inf, metavar="MINUTES", help="stop after that time")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="PATH", help=f"(default: {RESULTS.name})")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", metavar="FOLDER", help="(default: docs)")
    parser.add_argument("--report", action="store_true", help="only write evidence.md and its pictures")
    args = parser.parse_args(arguments)
    if args.seeds < 1 or args.workers < 1 or args.budget < 0:
        parser.error("--seeds and --workers must be at least 1, --budget at least 0")
    results = Results(args.results)
    if not args.report:
        runs = pending([name for name in args.study if name != "cost"], args.seeds, results)
        costs = COSTS if "cost" in args.study else {}
        if runs or costs:
            results.append({"started": machine()})
        started = perf_counter()
        execute(runs, results, args.workers, args.budget)
        for problem, methods in costs.items():
            if perf_counter() - started < 60 * args.budget:
                for row in measure_costs(problem, methods):
                    results.append({"cost": row})
    evidence.write(results, args.docs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
