"""The fused optimizers: torch's SGD and AdamW, with the step measured, decided and applied in one call."""

from __future__ import annotations

import inspect
import numbers
from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor

from .checks import check, check_number
from .fused import FusedOptimizer
from .layout import Rule

__all__ = ["FusedAdamW", "FusedSGD"]

T = TypeVar("T")


def _documented(kind: type[T]) -> type[T]:
    """Append FusedOptimizer's arguments and errors to the docstring, so that help() shows all of them."""
    shared = inspect.cleandoc(FusedOptimizer.__doc__ or "").partition("Args:\n")[2]
    kind.__doc__ = f"{inspect.cleandoc(kind.__doc__ or '')}\n{shared}\n"
    return kind


@_documented
class FusedSGD(FusedOptimizer):
    """``torch.optim.SGD`` with the step measured, decided and applied in one call.

    Bit for bit torch's own for-loop in float32 and float64, where torch's kernels fuse multiply-adds (any x86-64 with
    AVX2). bfloat16 and float16 parameters are computed in float32 and rounded once.

    Args:
        params: parameters or groups of them; float32, float64, bfloat16 or float16, of any dense layout.
        lr: the base rate, a float or a tensor of one element (default: 1e-3).
        momentum: the factor on the buffer (default: 0).
        dampening: the gradient enters the buffer times 1 - dampening (default: 0).
        weight_decay: added to the gradient times the parameter (default: 0).
        nesterov: step along g + momentum * buffer (default: False).
        maximize: ascend instead of descending (default: False).
        foreach, fused: accepted for torch's sake, without effect (default: None).
        differentiable: must be False.
        decoupled_weight_decay: shrink the parameter by lr * weight_decay instead (default: False).
        zero_init_momentum: start the buffer at zero, as in NSHB, not at the first gradient (default: False).
        normalize: divide the step by the length of the momentum buffer over all parameters, p <- p - lr m / |m|
            (without momentum: of the gradient), so that every step is as long as its rate. All groups need the same
            momentum and dampening; with dampening, ``zero_init_momentum=True``; no Nesterov, no coupled weight decay,
            no ``max_grad_norm`` (default: False).
    """

    _rule = Rule.SGD
    _states = ("momentum_buffer", None, None)
    _hyper_names = (
        "weight_decay",
        "maximize",
        "momentum",
        "dampening",
        "nesterov",
        "decoupled_weight_decay",
        "zero_init_momentum",
    )

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        zero_init_momentum: bool = False,
        normalize: bool = False,
        schedule: Any = None,
        max_grad_norm: float | None = None,
        track: Iterable[str] = (),
        prev_grad: str = "store",
        process_group: Any = None,
        backend: str | None = None,
        history_size: int | None = 1024,
        state_dtype: torch.dtype | None = None,
        master_weights: bool = False,
        stochastic_rounding: bool = False,
        skip_nonfinite: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "foreach": foreach,
            "differentiable": differentiable,
            "fused": fused,
            "decoupled_weight_decay": decoupled_weight_decay,
            "zero_init_momentum": zero_init_momentum,
        }
        super().__init__(
            params,
            defaults,
            schedule=schedule,
            max_grad_norm=max_grad_norm,
            track=track,
            prev_grad=prev_grad,
            process_group=process_group,
            backend=backend,
            history_size=history_size,
            state_dtype=state_dtype,
            master_weights=master_weights,
            stochastic_rounding=stochastic_rounding,
            skip_nonfinite=skip_nonfinite,
            normalize=normalize,
        )

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        check_number("momentum", group["momentum"], 0.0)
        check_number("dampening", group["dampening"])
        check(
            not group["nesterov"] or (group["momentum"] > 0 and group["dampening"] == 0),
            "nesterov=True needs momentum > 0 and dampening = 0",
        )
        if self._options.normalize:
            check(not group["nesterov"], "normalize=True goes along the momentum buffer, so nesterov must be False")
            check(
                group["weight_decay"] == 0 or group["decoupled_weight_decay"],
                "normalize=True takes no weight decay inside the gradient; use decoupled_weight_decay=True",
            )
            check(
                group["momentum"] == 0 or group["dampening"] == 0 or group["zero_init_momentum"],
                "normalize=True with dampening needs zero_init_momentum=True",
            )

    def _check_together(self, groups: list[dict[str, Any]]) -> None:
        pairs = {(group["momentum"], group["dampening"] if group["momentum"] else 0) for group in groups}
        check(
            not self._options.normalize or len(pairs) == 1,
            f"normalize=True needs the same momentum and dampening in all groups, got {sorted(pairs)}",
        )

    def _hyper(self, group: dict[str, Any]) -> list[float]:
        return [float(group[name]) for name in self._hyper_names]

    def _state_keys(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("momentum_buffer",) if group["momentum"] != 0 else ()

    def _updates_in(self, state: dict[str, Any]) -> float:
        return float(state.get("momentum_buffer") is not None)


@_documented
class FusedAdamW(FusedOptimizer):
    """``torch.optim.AdamW`` with the step measured, decided and applied in one call.

    Torch's update within rounding: the roots here are correctly rounded, torch's on the CPU are one unit off now and
    then. bfloat16 and float16 parameters are computed in float32 and rounded once.

    Args:
        params: parameters or groups of them; float32, float64, bfloat16 or float16, of any dense layout.
        lr: the base rate, a float or a tensor of one element (default: 1e-3).
        betas: the factors on the running means of g and g^2 (default: (0.9, 0.999)).
        eps: added to the root of the second moment (default: 1e-8).
        weight_decay: shrinks the parameter by lr * weight_decay (default: 1e-2).
        amsgrad: divide by the largest second moment so far (default: False).
        maximize: ascend instead of descending (default: False).
        foreach, capturable, fused: accepted for torch's sake, without effect.
        differentiable: must be False.
    """

    _rule = Rule.ADAMW
    _states = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    _required = ("step", "exp_avg", "exp_avg_sq")
    _hyper_names = ("weight_decay", "maximize", "betas", "eps", "amsgrad")

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        schedule: Any = None,
        max_grad_norm: float | None = None,
        track: Iterable[str] = (),
        prev_grad: str = "store",
        process_group: Any = None,
        backend: str | None = None,
        history_size: int | None = 1024,
        state_dtype: torch.dtype | None = None,
        master_weights: bool = False,
        stochastic_rounding: bool = False,
        skip_nonfinite: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
            "decoupled_weight_decay": True,
        }
        super().__init__(
            params,
            defaults,
            schedule=schedule,
            max_grad_norm=max_grad_norm,
            track=track,
            prev_grad=prev_grad,
            process_group=process_group,
            backend=backend,
            history_size=history_size,
            state_dtype=state_dtype,
            master_weights=master_weights,
            stochastic_rounding=stochastic_rounding,
            skip_nonfinite=skip_nonfinite,
        )

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        check_number("eps", group["eps"], 0.0)
        betas = group["betas"]
        pair = isinstance(betas, tuple | list) and len(betas) == 2
        check(pair and all(isinstance(x, numbers.Real) for x in betas), f"betas must be two numbers, got {betas!r}")
        for i, beta in enumerate(betas):
            check(0.0 <= beta < 1.0, f"betas[{i}] must be in [0, 1), got {beta}")
        decoupled = group.get("decoupled_weight_decay", True) or group["weight_decay"] == 0
        check(
            decoupled, "FusedAdamW decouples the weight decay; with decoupled_weight_decay=False use torch.optim.Adam"
        )

    def _hyper(self, group: dict[str, Any]) -> list[float]:
        beta1, beta2 = group["betas"]
        decay, maximize = group["weight_decay"], group["maximize"]
        return [float(x) for x in (decay, maximize, beta1, beta2, group["eps"], group["amsgrad"], 0)]

    def _state_keys(self, group: dict[str, Any]) -> tuple[str, ...]:
        return self._states if group["amsgrad"] else self._states[:2]

    def _updates_in(self, state: dict[str, Any]) -> float:
        return float(state.get("step", 0.0))

    def _show_updates(self, state: dict[str, Any], updates: Tensor) -> None:
        state["step"] = updates
