"""The demo: real tasks trained side by side, with torch's own parts and with ``FusedSGD`` doing the same."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.utils import clip_grad_norm_
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from . import FusedSGD, plots, schedules, tasks

__all__ = ["EagerSGD", "Result", "Run", "compare", "demo"]

MAX_GRAD_NORM = 1.0
TASKS: dict[str, Callable[[int], tasks.Task]] = {"digits": tasks.digits, "text": tasks.text}
# Both runs do the same arithmetic but sum the gradient norm in another order, and training amplifies that last bit:
# over six seeds by at most 0.0003 in the final metrics, which another seed alone moves by 0.01 and more.
AGREEMENT = 0.01


class EagerSGD:
    """What a training script does today: torch's SGD, clipping and schedule, and extra calls to watch.

    Args:
        params: The parameters to train.
        lr: The rate that the schedule multiplies.
        schedule: ``step -> multiplier``.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float, schedule: Callable[[int], float]) -> None:
        self.params = list(params)
        self.optimizer = torch.optim.SGD(self.params, lr=lr, momentum=0.9, weight_decay=5e-4)
        self.scheduler = LambdaLR(self.optimizer, schedule)
        self.previous = [torch.zeros_like(p) for p in self.params]
        self.log: list[tuple[float | torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def step(self) -> None:
        """Record rate, norm and alignment; clip; update; advance the schedule."""
        grads = [p.grad for p in self.params if p.grad is not None]
        pairs = zip(grads, self.previous, strict=True)
        alignment = torch.stack([torch.dot(g.flatten(), q.flatten()) for g, q in pairs]).sum()
        torch._foreach_copy_(self.previous, grads)
        grad_norm = clip_grad_norm_(self.params, MAX_GRAD_NORM)
        self.log.append((self.scheduler.get_last_lr()[0], grad_norm, alignment))
        self.optimizer.step()
        self.scheduler.step()

    def zero_grad(self) -> None:
        """Drop the gradients."""
        self.optimizer.zero_grad()

    def history(self) -> dict[str, NDArray]:
        """What was recorded, under the names of ``FusedSGD.history``."""
        lr, grad_norm, alignment = (np.array(column, dtype=float) for column in zip(*self.log, strict=True))
        lengths = grad_norm * np.concatenate([[0.0], grad_norm[:-1]])
        cosine = np.divide(alignment, lengths, out=np.zeros_like(lengths), where=lengths > 0)
        step = np.arange(1.0, len(lr) + 1)
        return {"step": step, "lr": lr, "grad_norm": grad_norm, "alignment": alignment, "cosine": cosine}


@dataclass
class Run:
    """One model in training, with a clock on it."""

    name: str
    model: nn.Module
    optimizer: EagerSGD | FusedSGD
    batches: Iterator[tasks.Batch]
    losses: list[float] = field(default_factory=list)
    optimizer_seconds: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    metric: float = float("nan")

    def step(self, task: tasks.Task) -> None:
        """Train on the next batch."""
        start = perf_counter()
        loss = task.loss(self.model, next(self.batches))
        loss.backward()
        before = perf_counter()
        self.optimizer.step()
        after = perf_counter()
        self.optimizer.zero_grad()
        self.losses.append(loss.item())
        self.step_seconds.append(perf_counter() - start)
        self.optimizer_seconds.append(after - before)

    def history(self) -> dict[str, NDArray]:
        """The optimizer's history and the loss of each step."""
        return {**self.optimizer.history(), "loss": np.array(self.losses)}


@dataclass
class Result:
    """Two finished runs of one task: torch's, then ours."""

    task: tasks.Task
    eager: Run
    fused: Run

    @property
    def metrics(self) -> tuple[float, float]:
        """What each run achieved."""
        return self.eager.metric, self.fused.metric

    @property
    def agrees(self) -> bool:
        """Whether both runs end with the same metric, up to the noise of rounding."""
        return abs(self.fused.metric - self.eager.metric) <= AGREEMENT

    @property
    def caption(self) -> str:
        """The result in two lines."""
        eager, fused = map(self.task.form.format, self.metrics)
        return f"{self.task.name}, {self.task.model_name}\n{self.task.metric}: torch {eager}, fused {fused}"

    def __str__(self) -> str:
        runs = (self.eager, self.fused)
        sizes = [p.numel() for p in self.eager.model.parameters()]
        apart = np.abs(np.subtract(self.eager.losses, self.fused.losses))
        title = f"{self.task.name}: {self.task.model_name}, {sum(sizes):,} parameters in {len(sizes)} tensors"
        verdict = "agree" if self.agrees else "DISAGREE"
        rows = [
            ("", *(run.name for run in runs), "ratio"),
            (self.task.metric, *map(self.task.form.format, self.metrics), verdict),
        ]
        for label, times in (
            ("optimizer alone, ms per step", [median(run.optimizer_seconds) for run in runs]),
            ("whole training, ms per step", [median(run.step_seconds) for run in runs]),
        ):
            rows.append((label, *(f"{1e3 * t:.3f}" for t in times), f"{times[0] / times[1]:.2f} x"))
        lines = [f"{a:<30}{b:>18}{c:>18}   {d}".rstrip() for a, b, c, d in rows]
        early = f"{apart[:50].max():.0e} in the first {min(50, len(apart))} steps"
        lines.append(f"training losses differ by at most {early}, {apart.max():.0e} in all {len(apart)}")
        return "\n  ".join([title, *lines])


@contextmanager
def _one_thread() -> Iterator[None]:
    """Models this small gain little from more threads, and on a busy machine lose much by waiting for them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@_one_thread()
def compare(task: tasks.Task, steps: int) -> Result:
    """Train twice from the same weights on the same batches, a step of each in turn; on one thread."""
    schedule = schedules.linear(total_steps=steps, warmup_steps=steps // 20)
    models = task.model(), task.model()
    eager = EagerSGD(models[0].parameters(), lr=task.lr, schedule=schedule)
    fused = FusedSGD(
        models[1].parameters(),
        lr=task.lr,
        momentum=0.9,
        weight_decay=5e-4,
        schedule=schedule,
        max_grad_norm=MAX_GRAD_NORM,
        track=("alignment",),
    )
    runs = [
        Run("torch.optim.SGD", models[0], eager, task.batches(steps)),
        Run("FusedSGD", models[1], fused, task.batches(steps)),
    ]
    for step in _progress(steps, task.name):
        for run in runs if step % 2 else runs[::-1]:  # neither always finds the caches warm
            run.step(task)
    for run in runs:
        run.metric = task.evaluate(run.model)
    return Result(task, *runs)


def demo(task: str = "both", steps: int | None = None, seed: int = 0, out: str | Path = "demo_output") -> list[Result]:
    """Run the demo, print what came out, and write a picture and the recorded histories.

    Args:
        task: ``"digits"``, ``"text"`` or ``"both"`` (default).
        steps: Steps of each training (default: each task's own).
        seed: Decides data order and first weights (default: 0).
        out: The folder to write to (default: ``demo_output``).
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    print("SGD with momentum, a linear schedule, clipping to norm 1, gradient norm and alignment on record:")
    print(f"by torch's own parts and by FusedSGD, on one thread; torch {torch.__version__}.")
    results = []
    for name in TASKS if task == "both" else [task]:
        problem = TASKS[name](seed)
        results.append(result := compare(problem, steps or problem.steps))
        print(f"\n{result}")
        history: dict[str, Any] = result.fused.history()
        np.savez(out / f"{name}.npz", **history)
    columns = {r.caption: {run.name: run.history() for run in (r.eager, r.fused)} for r in results}
    plots.histories(columns, out / "demo.png", MAX_GRAD_NORM)
    print("\nThe picture:", out / "demo.png", "- the histories:", *(out / f"{r.task.name}.npz" for r in results))
    return results


def _progress(steps: int, name: str) -> Iterator[int]:
    """Count steps with a bar on a terminal, and with a line at each quarter elsewhere."""
    bar = tqdm(range(steps), desc=name, unit="step", leave=False, disable=None)
    for step in bar:
        yield step
        if bar.disable and 4 * (step + 1) // steps > 4 * step // steps:
            print(f"{name}: step {step + 1} of {steps}", file=sys.stderr, flush=True)
