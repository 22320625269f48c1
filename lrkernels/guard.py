"""Guard rails for unattended runs: note every step on the device, look now and then, warn, go back, or stop."""

from __future__ import annotations

import copy
import math
from collections import OrderedDict, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer

from .checkpoints import CONTROL_KEY
from .checks import check, warn
from .closed_loop import AlignmentSchedule, ClosedLoop, VolSchedule
from .layout import Control

__all__ = ["Event", "Guard"]

COLUMNS = ("loss", "grad_norm", "lr")
RATES = {"lr", "initial_lr", "max_lr", "min_lr", "base_lrs", "max_lrs", "_last_lr"}  # in groups, and torch's schedulers


def _copy(tree: Any, device: torch.device | str | None = None) -> Any:
    """Copy a checkpoint, its tensors to ``device`` (None: where each is)."""
    if isinstance(tree, Tensor):
        return tree.detach().to(device or tree.device, copy=True)
    if type(tree) in (dict, OrderedDict):
        return type(tree)((key, _copy(value, device)) for key, value in tree.items())
    if type(tree) in (list, tuple):
        return type(tree)(_copy(value, device) for value in tree)
    return copy.deepcopy(tree)


def _is_all(values: NDArray[np.float64], x: float) -> bool:
    return bool(np.isclose(values, x, rtol=1e-6, atol=0.0).all())


def _scaled(tree: Any, factor: float, inside: bool = False) -> Any:
    """Multiply every learning rate of a checkpoint."""
    if type(tree) is dict:
        return {key: _scaled(value, factor, inside or key in RATES) for key, value in tree.items()}
    if type(tree) in (list, tuple):
        return type(tree)(_scaled(value, factor, inside) for value in tree)
    return tree * factor if inside and isinstance(tree, int | float | Tensor) else tree


def _unwind(saved: dict[str, Any], loop: AlignmentSchedule) -> None:
    """Forget what alignment has learnt beyond its ``max_lr``: it would hold the rate there, however low its base is."""
    base = max(float(group["lr"]) for group in saved["param_groups"])
    if not 0.0 < loop.max_lr < math.inf or base == 0.0:
        return
    top = math.log(loop.max_lr / base)
    if (control := saved["param_groups"][0].get(CONTROL_KEY)) is not None:
        control[Control.LOG_FACTOR].clamp_(max=top)
        control[Control.NEXT_FACTOR].clamp_(max=math.exp(top))
    elif loop.kappa and (rule := saved.get("lrkernels_alignment", {}).get("rule")):
        rule["sum"] = min(rule["sum"], top / loop.kappa)


def _load_in_place(optimizer: Optimizer, saved: dict[str, Any]) -> None:
    """Load a checkpoint, bit for bit, into the tensors that are there: torch would exchange them."""
    flat = [p for group in optimizer.param_groups for p in group["params"]]
    there = {p: dict(optimizer.state.get(p, {})) for p in flat}
    rates = [group["lr"] for group in optimizer.param_groups]
    optimizer.load_state_dict(_copy(saved))
    for group, lr in zip(optimizer.param_groups, rates, strict=True):
        if isinstance(lr, Tensor):
            group["lr"] = lr.copy_(torch.as_tensor(group["lr"], device=lr.device))
    for i, p in enumerate(flat):
        for key, value in saved["state"].get(i, {}).items():
            old = there[p].get(key)
            if isinstance(old, Tensor) and isinstance(value, Tensor) and old.shape == value.shape:
                optimizer.state[p][key] = old.copy_(value)


@dataclass(frozen=True)
class Event:
    """Something the guard has noticed.

    Args:
        step: how many steps it had seen.
        kind: ``"rollback"``, ``"stop"``, ``"min_lr"``, ``"max_lr"`` or ``"grad_norm"``.
        message: the same in words.
    """

    step: int
    kind: str
    message: str


@dataclass
class _Snapshot:
    """A point of the run to go back to."""

    step: int
    params: list[tuple[Tensor, Tensor]]
    buffers: list[tuple[nn.Module, str, Tensor]]
    optimizer: dict[str, Any]
    others: list[tuple[Any, dict[str, Any]]]


class Guard:
    """Watch a run that nobody watches: warn, go back to the last good point at a lower rate, or stop.

    One call a step, right after the optimizer's and before that of a scheduler, which sets the next rate::

        guard = lrk.Guard(optimizer, model)
        for batch in loader:
            loss = ...
            loss.backward()
            optimizer.step()
            guard.step(loss)
            optimizer.zero_grad()

    A step notes loss, gradient norm and rate where they are, and nothing waits. Every ``check_every`` steps one copy
    brings them to the host, and the guard

    - goes back when the run has diverged: at a loss that is not finite, or after ``patience`` losses in a row above
      ``m + threshold * max(|m|, largest - m)``, where ``m`` is the median and ``largest`` the largest of the last
      ``memory`` good losses. Parameters, module buffers and the state of the optimizer and of ``others`` become what
      they were in the snapshot, bit for bit and in place, and every rate ``lr_factor`` times what it was there. Data
      and random numbers go on. After ``max_rollbacks`` times the next is the last: it raises.
    - warns, once until it is over, when a closed-loop schedule has been at ``min_lr`` or ``max_lr`` for all of these
      steps, and when a gradient norm is above ``norm_threshold`` times the median of the last ``memory``.
    - takes a snapshot, if the last one is ``snapshot_every`` steps old and these steps were good. The old one stays
      until the new one has proved itself: the steps after it were good too. The first is taken when the guard is made.

    Norm and rate are those of ``optimizer.stats`` where it has them, else there is no norm, and ``group["lr"]``.
    ``optimizer.history()`` of a fused optimizer starts anew at a rollback, ``history()`` of the guard goes on. With
    several processes give each the same loss, the mean over them all: they must decide alike.

    Args:
        optimizer: one of ours or of torch's.
        model: the module, or modules, whose buffers (BatchNorm's statistics, ...) go back too (default: None).
        others: what else has ``state_dict`` and ``load_state_dict`` and is to go back: torch's schedulers,
            ``GradScaler``, averaged weights (default: none).
        check_every: steps between two looks (default: 50).
        patience: how many losses in a row, far above the median, are a divergence (default: 10).
        threshold: how far that is (default: 1).
        norm_threshold: how many times the median a gradient norm may be (default: 10).
        memory: how many good losses, and norms, the medians are taken over (default: 200).
        snapshot_every: steps between two snapshots, or a little more: they are taken at a look (default: 500).
        snapshot_device: where snapshots are kept (default: None, beside what they are copies of). ``"cpu"`` spares the
            device's memory.
        max_rollbacks: how many times to go back before giving up (default: 3).
        lr_factor: what a rollback multiplies the rates by (default: 0.5).
        history_size: steps that ``history()`` goes back (default: 10 000, None keeps all).

    Raises:
        ValueError: if an argument is out of range.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        model: nn.Module | Iterable[nn.Module] | None = None,
        others: Sequence[Any] = (),
        *,
        check_every: int = 50,
        patience: int = 10,
        threshold: float = 1.0,
        norm_threshold: float = 10.0,
        memory: int = 200,
        snapshot_every: int = 500,
        snapshot_device: torch.device | str | None = None,
        max_rollbacks: int = 3,
        lr_factor: float = 0.5,
        history_size: int | None = 10_000,
    ) -> None:
        check(hasattr(optimizer, "param_groups"), f"Guard watches an optimizer, got {type(optimizer).__name__}")
        check(check_every >= 1 and snapshot_every >= 1, "check_every and snapshot_every must be >= 1")
        check(1 <= patience <= memory, f"need 1 <= patience <= memory, got {patience} and {memory}")
        check(threshold > 0 and norm_threshold > 1, "need threshold > 0 and norm_threshold > 1")
        check(max_rollbacks >= 0, f"max_rollbacks must be >= 0, got {max_rollbacks}")
        check(0 < lr_factor <= 1, f"lr_factor must be in (0, 1], got {lr_factor}")
        check(history_size is None or history_size >= 1, f"history_size must be >= 1 or None, got {history_size}")
        self.optimizer = optimizer
        self.modules = [] if model is None else [model] if isinstance(model, nn.Module) else list(model)
        self.others = list(others)
        self.check_every, self.patience, self.threshold = check_every, patience, threshold
        self.norm_threshold, self.snapshot_every = norm_threshold, snapshot_every
        self.snapshot_device, self.max_rollbacks, self.lr_factor = snapshot_device, max_rollbacks, lr_factor
        self.steps = 0
        self.rollbacks = 0
        self.events: list[Event] = []
        self._episodes: set[str] = set()  # what has been warned of, and goes on
        self._losses: deque[float] = deque(maxlen=memory)
        self._norms: deque[float] = deque(maxlen=memory)
        self._far = 0  # losses in a row far above the median
        self._rows: deque[list[float]] = deque(maxlen=history_size)
        self._noted: list[list[float | Tensor]] = []  # the steps since the last look
        self._good = self._snapshot()  # to go back to
        self._next: _Snapshot | None = None  # and from when the next steps have been good too

    # -- every step ---------------------------------------------------------------------------------------------------

    def step(self, loss: float | Tensor) -> bool:
        """Note a step that the optimizer has done, and look at the last ones if it is time.

        Args:
            loss: of this step; a tensor of one element is not waited for.

        Returns:
            Whether the run went back.

        Raises:
            RuntimeError: if it has diverged once more after ``max_rollbacks``; parameters and state are good.
        """
        stats = getattr(self.optimizer, "stats", None)
        norm, lr = (stats.get("grad_norm"), stats.get("lr")) if isinstance(stats, Mapping) else (None, None)
        row = (loss, math.nan if norm is None else norm, self.optimizer.param_groups[0]["lr"] if lr is None else lr)
        # copies: a captured graph writes every loss to the same tensor
        self._noted.append([x.detach().clone() if isinstance(x, Tensor) else x for x in row])
        self.steps += 1
        return len(self._noted) == self.check_every and self.check()

    def check(self) -> bool:
        """Look at the steps since the last look: ``step`` calls it; so may you, before you save a checkpoint.

        Returns:
            Whether the run went back.

        Raises:
            RuntimeError: as ``step``.
        """
        rows = self._unread()
        self._noted.clear()
        self._rows.extend([*row, 0.0] for row in rows)
        losses, norms, rates = np.array(rows).reshape(-1, len(COLUMNS)).T
        if reason := self._divergence(losses):
            self._go_back(reason)
            return True
        self._watch_norms(norms)
        if len(rows) == self.check_every:
            self._watch_rates(rates)
        if self._far == 0 and rows:
            if self._next is not None:
                self._good, self._next = self._next, None
            if self.steps - self._good.step >= self.snapshot_every:
                self._next = self._snapshot()
        return False

    def _unread(self) -> list[list[float]]:
        tensors = [x for row in self._noted for x in row if isinstance(x, Tensor)]
        device = max((x.device for x in tensors), key=lambda device: device.type != "cpu", default=None)
        values = iter(torch.stack([x.to(device).reshape(()) for x in tensors]).tolist() if tensors else ())
        return [[next(values) if isinstance(x, Tensor) else float(x) for x in row] for row in self._noted]

    def history(self) -> dict[str, NDArray[Any]]:
        """Return ``loss``, ``grad_norm``, ``lr`` and ``rollback``, whether the run went back after the step, as arrays.

        One value for each of the last ``history_size`` steps, oldest first; nan where something is not known.
        """
        rows = np.array([*self._rows, *([*row, 0.0] for row in self._unread())]).reshape(-1, len(COLUMNS) + 1)
        columns = dict(zip((*COLUMNS, "rollback"), rows.T.copy(), strict=True))
        return {**columns, "rollback": columns["rollback"].astype(bool)}

    # -- looking ------------------------------------------------------------------------------------------------------

    def _divergence(self, losses: Iterable[float]) -> str | None:
        """Return why the run has diverged, or None; good losses go to memory."""
        limit = math.inf
        for loss in losses:
            if not math.isfinite(loss):
                return f"the loss is {loss}"
            if limit == math.inf and len(self._losses) >= self.patience:
                m = float(np.median(self._losses))
                limit = m + self.threshold * max(abs(m), max(self._losses) - m)
            if loss <= limit:
                self._far = 0
                self._losses.append(loss)
                continue
            self._far += 1
            if self._far == self.patience:
                return f"the loss has been above {limit:.4g} for {self.patience} steps, at last {loss:.4g}"
        return None

    def _watch_norms(self, norms: NDArray[np.float64]) -> None:
        norms = norms[np.isfinite(norms)]
        if norms.size and len(self._norms) >= self.patience:
            m = float(np.median(self._norms))
            self._episode(
                "grad_norm",
                norms.max() > self.norm_threshold * m,
                f"the gradient norm has risen to {norms.max():.4g}, from a median of {m:.4g}",
            )
        self._norms.extend(norms.tolist())

    def _watch_rates(self, rates: NDArray[np.float64]) -> None:
        """Warn at the bounds of a closed loop, whose rate an open-loop schedule may multiply."""
        for watcher in (self.optimizer, *self.others):
            loop = getattr(watcher, "closed_loop", None)
            if not isinstance(loop, ClosedLoop):
                continue
            multipliers = np.ones(len(rates))
            if open_loop := getattr(watcher, "open_loop", None):
                last = int(self.optimizer.stats["step"])  # type: ignore[attr-defined]
                multipliers = np.array([open_loop(max(0, last - i)) for i in range(len(rates), 0, -1)])
            if not multipliers.all():
                continue
            # the bounds of gala and volsched are of the rate that group["lr"] multiplies, which rollbacks lower
            scales = {1.0} if isinstance(loop, AlignmentSchedule) else {1.0, self.lr_factor**self.rollbacks}
            for name in ("min_lr", "max_lr"):
                bound = getattr(loop, name)
                ends_there = name == "min_lr" and isinstance(loop, VolSchedule)  # by its own decay
                self._episode(
                    name,
                    not ends_there and any(_is_all(rates / multipliers, bound * scale) for scale in scales),
                    f"the learning rate has been at {name} = {bound:g} for {len(rates)} steps: the schedule would go "
                    "beyond it; choose another bound, or another first rate",
                )

    def _episode(self, kind: str, on: bool | np.bool_, message: str) -> None:
        """Warn at the beginning of something, and not again before it is over."""
        if on and kind not in self._episodes:
            self._note(kind, message)
            warn(f"step {self.steps}: {message}")
        (self._episodes.add if on else self._episodes.discard)(kind)

    def _note(self, kind: str, message: str) -> None:
        self.events.append(Event(self.steps, kind, message))

    # -- going back ---------------------------------------------------------------------------------------------------

    def _snapshot(self) -> _Snapshot:
        device = self.snapshot_device
        params = [p for group in self.optimizer.param_groups for p in group["params"]]
        buffers = [
            (module, name, buffer)
            for root in self.modules
            for module in root.modules()
            for name, buffer in module.named_buffers(recurse=False)
        ]
        return _Snapshot(
            self.steps,
            [(p, _copy(p, device)) for p in params],
            [(module, name, _copy(buffer, device)) for module, name, buffer in buffers],
            _copy(self.optimizer.state_dict(), device),
            [(other, _copy(other.state_dict(), device)) for other in self.others],
        )

    @torch.no_grad()
    def _restore(self, good: _Snapshot) -> None:
        for p, value in good.params:
            p.copy_(value)
        for module, name, value in good.buffers:
            getattr(module, name).copy_(value)
        _load_in_place(self.optimizer, good.optimizer)
        for other, state in good.others:
            other.load_state_dict(_copy(state))
        self.optimizer.zero_grad()

    def _go_back(self, reason: str) -> None:
        good = self._good
        self._next, self._far = None, 0
        stop = self.rollbacks == self.max_rollbacks
        if not stop:
            self.rollbacks += 1
            loop = getattr(self.optimizer, "closed_loop", None)
            if isinstance(loop, AlignmentSchedule):
                _unwind(good.optimizer, loop)
            good.optimizer = _scaled(good.optimizer, self.lr_factor)
            good.others = [(other, _scaled(state, self.lr_factor)) for other, state in good.others]
        self._restore(good)
        self._rows[-1][-1] = 1.0
        if stop:
            message = f"training has diverged again after {self.rollbacks} rollbacks: {reason}"
            self._note("stop", message)
            raise RuntimeError(
                f"lrkernels: step {self.steps}: {message}. Parameters and state are those of step {good.step}; try a "
                "lower rate, a warm-up, or max_grad_norm"
            )
        message = f"{reason}; went back to step {good.step}, with {self.lr_factor:g} times its learning rate"
        self._note("rollback", message)
        warn(f"step {self.steps}: {message}")
