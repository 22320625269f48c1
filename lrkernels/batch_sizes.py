"""Batch sizes that grow with the epoch, and the sampler that serves them.

A batch size is a callable ``epoch -> int``, epochs counted from 0; wherever one is taken, an int will do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Sampler

from .checks import check, check_whole

__all__ = [
    "ScheduledBatchSampler",
    "accumulation_steps",
    "constant",
    "exponential",
    "steps_per_epoch",
    "total_steps",
]

BatchSize = int | Callable[[int], int]


def _ceil(value: float) -> int:
    """Round up, forgiving the rounding error of a float: 10 * 1.1 is 11, not 12."""
    return value if isinstance(value, int) else math.ceil(value * (1 - 1e-12))


@dataclass(frozen=True)
class constant:
    """The same batch size in every epoch.

    Args:
        batch_size: samples per batch.

    Raises:
        ValueError: if ``batch_size`` is no whole number, or below 1.
    """

    batch_size: int

    def __post_init__(self) -> None:
        """Refuse an empty batch, and a part of a sample."""
        check_whole("batch_size", self.batch_size, 1)

    def __call__(self, epoch: int) -> int:
        """Return the batch size."""
        return self.batch_size


@dataclass(frozen=True)
class exponential:
    """Batch size that grows by a factor every few epochs.

    With ``k = epoch // every``::

        initial only          ceil(initial * growth**k)
        maximum               min(ceil(initial * growth**k), maximum)
        maximum and epochs    min(ceil(a * growth**k + initial - a), maximum)
                              a = (maximum - initial) / (growth**n - 1),  n = (epochs - every) / every

    The last form bends the growth so that the run's last rung is exactly ``maximum``.

    Args:
        initial: samples per batch in epoch 0.
        growth: factor per rung, above 1 (default: 2).
        every: epochs per rung (default: 1).
        maximum: largest batch, in samples (default: None, no bound).
        epochs: length of the run, which needs ``maximum`` (default: None).

    Raises:
        ValueError: if the formula is not defined for a setting.

    Source: Kondo, Iiduka, 2025, arXiv 2508.03105, the first and the last form; the plain cap is ours.
    """

    initial: int
    growth: float = 2
    every: int = 1
    maximum: int | None = None
    epochs: int | None = None

    def __post_init__(self) -> None:
        """Refuse settings the formula is not defined for."""
        check(self.initial >= 1, f"initial must be at least 1, got {self.initial}")
        check(
            1 < self.growth < math.inf,
            f"growth must be finite and above 1, got {self.growth}; for a fixed size use constant()",
        )
        check(self.every >= 1, f"every must be at least 1 epoch, got {self.every}")
        check(
            self.maximum is None or self.maximum >= self.initial,
            f"maximum must be at least initial={self.initial}, got {self.maximum}",
        )
        if self.epochs is not None:
            check(self.maximum is not None, "epochs needs maximum, the size to reach at the end of the run")
            check(
                self.epochs > self.every,
                f"epochs must be larger than every={self.every}, got {self.epochs}; lower every",
            )

    def __call__(self, epoch: int) -> int:
        """Return the batch size of ``epoch``."""
        rung: float = epoch // self.every
        if self.maximum is None:
            return _ceil(self.initial * self.growth**rung)
        if self.epochs is None:
            # Clamping the power rather than the size keeps it finite, however long the run is.
            rung = min(rung, math.log(self.maximum / self.initial) / math.log(self.growth))
            return _ceil(self.initial * self.growth**rung)
        # (growth**k - 1) / (growth**n - 1), written so that it is exactly 1 at k = n and cannot overflow.
        last = (self.epochs - self.every) / self.every
        rung, log = min(rung, last), math.log(self.growth)
        share = math.exp((rung - last) * log) * math.expm1(-rung * log) / math.expm1(-last * log)
        return _ceil(self.initial + (self.maximum - self.initial) * share)


def _size(batch_size: BatchSize, epoch: int) -> int:
    size = batch_size(epoch) if callable(batch_size) else batch_size
    check(
        hasattr(size, "__index__") and size >= 1,
        f"the batch size of epoch {epoch} is {size!r}; it must be an integer of at least 1",
    )
    return int(size)


def _count(samples: int, size: int, drop_last: bool) -> int:
    return samples // size if drop_last else -(-samples // size)


def steps_per_epoch(batch_size: BatchSize, dataset_size: int, epochs: int, drop_last: bool = False) -> list[int]:
    """Count the batches of each epoch: ``ceil(dataset_size / batch_size(epoch))``.

    Args:
        batch_size: samples per batch, an int or a callable ``epoch -> int``.
        dataset_size: samples per epoch. With several processes give both sizes per process, or both in total.
        epochs: length of the run.
        drop_last: leave out an epoch's last batch when it is not full (default: False).

    Raises:
        ValueError: if a size is below 1, a batch size is no integer, or ``epochs`` is below 0.
    """
    check(dataset_size >= 1, f"dataset_size must be at least 1, got {dataset_size}")
    check(epochs >= 0, f"epochs must be at least 0, got {epochs}")
    return [_count(dataset_size, _size(batch_size, epoch), drop_last) for epoch in range(epochs)]


def total_steps(batch_size: BatchSize, dataset_size: int, epochs: int, drop_last: bool = False) -> int:
    """Count the batches of a run: the sum of ``steps_per_epoch``, with the same arguments."""
    return sum(steps_per_epoch(batch_size, dataset_size, epochs, drop_last))


def accumulation_steps(batch_size: int, max_micro_batch: int) -> int:
    """Return the smallest number of equal micro-batches into which a batch that memory cannot hold divides.

    The micro-batches are equal so that the usual ``(loss / steps).backward()`` on each gives exactly the
    gradient of the whole batch. The number is thus a divisor of ``batch_size``: a prime batch size falls to
    single samples.

    Args:
        batch_size: samples per update; for an epoch's last, shorter batch give ``len(batch)``.
        max_micro_batch: the most samples that fit in memory at once.

    Raises:
        ValueError: if a size is below 1.
    """
    check(batch_size >= 1, f"batch_size must be at least 1, got {batch_size}")
    check(max_micro_batch >= 1, f"max_micro_batch must be at least 1, got {max_micro_batch}")
    fewest = _count(batch_size, max_micro_batch, drop_last=False)
    return next(steps for steps in range(fewest, batch_size + 1) if batch_size % steps == 0)


@dataclass
class _Pass:
    """One iteration over the sampler: where it began, and how far it was drawn."""

    epoch: int
    size: int
    samples: int  # of the epoch, consumed before this iteration began
    generator: torch.Tensor  # the random state from which the epoch's order was drawn
    length: int
    drawn: int = 0


class ScheduledBatchSampler(Sampler[list[int]]):
    """Batch sampler whose batch size depends on the epoch, and which resumes in mid-epoch.

    ::

        sampler = lrk.ScheduledBatchSampler(RandomSampler(data), batch_sizes.exponential(8, maximum=4096))
        loader = DataLoader(data, batch_sampler=sampler, num_workers=4)
        for epoch in range(sampler.epoch, epochs):
            for consumed, batch in enumerate(loader, 1):
                ...
                checkpoint = {"sampler": sampler.state_dict(consumed), ...}

    **Epochs.** An epoch that was iterated to its end is over, and ``epoch`` advances by itself; one that was
    left early begins again. ``set_epoch`` overrides both. The wrapped sampler's ``set_epoch``, if it has one
    (``DistributedSampler``), is called for every epoch, so nobody else needs to.

    **Resuming.** After ``load_state_dict`` the next iteration yields exactly the batches that were left, and
    ``len`` counts those; a later ``state_dict`` goes on from there, so the loop above is the same on a
    resumed run. An epoch's order is drawn at its start, and drawn again on resuming, from the ``generator``
    of the wrapped sampler or, where it has none, from torch's global CPU generator, which resuming leaves as
    it found it. The sampler's own generator is saved here; restoring the global one, for the epochs after
    this, is the checkpoint's business. Orders drawn from elsewhere (``random``, numpy) cannot be resumed.

    **Workers.** A ``DataLoader`` with workers draws batches ahead of the loop. Only the loop knows what it
    has consumed, so give that number to ``state_dict``. And take ``len`` before the loop: towards the end of
    an epoch the sampler is already at the next.

    Args:
        sampler: a sampler, or any iterable with a length, of the dataset's indices.
        batch_size: samples per batch and process, an int or a callable ``epoch -> int``.
        drop_last: leave out an epoch's last batch when it is not full (default: False).

    Attributes:
        epoch: the epoch under way or, between two, the one that comes next.

    Raises:
        ValueError: if ``sampler`` has no length, or a batch size is not an integer of at least 1.
    """

    def __init__(self, sampler: Iterable[int], batch_size: BatchSize, drop_last: bool = False) -> None:
        check(hasattr(sampler, "__len__"), f"{type(sampler).__name__} has no length; give it a __len__")
        _size(batch_size, 0)
        self.sampler: Any = sampler
        self.batch_size = batch_size
        self.drop_last = drop_last
        self.epoch = 0
        self._pass: _Pass | None = None  # the latest iteration
        self._resume: dict[str, Any] | None = None  # what was loaded and waits for the next iteration

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch the next iteration is; a position loaded in that same epoch is kept."""
        check(epoch >= 0, f"epoch must be at least 0, got {epoch}")
        self.epoch = epoch
        self._pass = None
        if self._resume is not None and self._resume["epoch"] != epoch:
            self._resume = None
        self._forward_epoch()

    def __len__(self) -> int:
        """Count the batches of the epoch; of one that was resumed, those that were left."""
        if self._pass is not None and self._pass.epoch == self.epoch:
            return self._pass.length
        left = len(self.sampler) - (self._resume["samples"] if self._resume else 0)
        return _count(max(left, 0), _size(self.batch_size, self.epoch), self.drop_last)

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the epoch's batches, or what is left of them."""
        now, indices = self._begin()
        for first in range(0, now.length * now.size, now.size):
            now.drawn += 1
            yield indices[first : first + now.size]
        if self._pass is now:
            self.epoch = now.epoch + 1

    def state_dict(self, consumed: int | None = None) -> dict[str, Any]:
        """Return the position: ``epoch``, ``samples`` consumed in it, ``generator`` state at its start.

        Args:
            consumed: batches the loop has taken since its ``iter``, as ``enumerate(loader, 1)`` counts
                (default: None, all that were drawn: right without workers, too many with them).

        Raises:
            ValueError: if ``consumed`` is below 0 or above the number of batches that were drawn.
        """
        now = self._pass
        drawn = 0 if now is None else now.drawn
        check(
            consumed is None or 0 <= consumed <= drawn,
            f"consumed is {consumed}, but {drawn} batches were drawn; count from the latest iter(loader)",
        )
        if now is not None and (consumed is not None or now.epoch == self.epoch):
            samples = now.samples + now.size * (drawn if consumed is None else consumed)
            samples = min(samples, len(self.sampler))  # the last batch may be short
            return {"epoch": now.epoch, "samples": samples, "generator": now.generator.clone()}
        if self._resume is not None:
            return dict(self._resume)
        own = self._own_generator()
        return {"epoch": self.epoch, "samples": 0, "generator": None if own is None else own.get_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go to a position that ``state_dict`` returned; the next iteration yields what was left.

        Raises:
            ValueError: if ``state_dict`` is not one of this class.
        """
        keys = {"epoch", "samples", "generator"}
        check(keys == set(state_dict), f"a state has the keys {sorted(keys)}, got {sorted(state_dict)}")
        self._resume = dict(state_dict)
        self.set_epoch(state_dict["epoch"])

    def _begin(self) -> tuple[_Pass, list[int]]:
        last = self._pass
        if last is not None and last.epoch == self.epoch and last.drawn == last.length:
            self.epoch += 1  # every batch was taken, only nobody asked for one more
        self._forward_epoch()
        resume, self._resume = self._resume or {}, None
        samples, state = resume.get("samples", 0), resume.get("generator")
        own = self._own_generator()
        generator = torch.default_generator if own is None else own
        with torch.random.fork_rng(devices=[], enabled=state is not None):
            if state is None:
                state = generator.get_state()
            else:
                generator.set_state(state.cpu())
            indices = list(self.sampler)[samples:]
        size = _size(self.batch_size, self.epoch)
        length = _count(len(indices), size, self.drop_last)
        self._pass = _Pass(self.epoch, size, samples, state, length)
        return self._pass, indices

    def _own_generator(self) -> torch.Generator | None:
        return getattr(self.sampler, "generator", None)

    def _forward_epoch(self) -> None:
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(self.epoch)
