"""Pictures of recorded histories and of refined schedules (matplotlib, no display needed)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from numpy.typing import ArrayLike, NDArray

from .schedules import running_median

__all__ = ["histories", "refined"]

History = Mapping[str, ArrayLike]

# What a history may hold, in the order of the panels: its key and the label of its axis.
PANELS = {
    "lr": "learning rate",
    "grad_norm": "gradient norm $|g_t|$",
    "grad_norm_l1": "gradient norm $|g_t|_1$",
    "cosine": "alignment\ncosine of $g_t$ and $g_{t-1}$",
    "direction_cosine": "direction\ncosine of $g_t$ and last update",
    "curvature": "curvature",
    "loss": "training loss (nats)",
}
# Lines that coincide must both be seen: the first is broad and pale, the next ones thin and dark.
LINES: list[dict[str, Any]] = [
    {"color": "#f2a65a", "linewidth": 5.0, "solid_capstyle": "round"},
    {"color": "#16425b", "linewidth": 1.3},
]
STYLE: Any = {
    "axes.axisbelow": True,
    "axes.edgecolor": "#888888",
    "axes.grid": True,
    "axes.labelsize": 10,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "figure.constrained_layout.use": True,
    "font.size": 10,
    "grid.color": "#e6e6e6",
    "legend.frameon": False,
    "savefig.dpi": 150,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
}


def histories(
    columns: Mapping[str, Mapping[str, History]], path: str | Path, max_grad_norm: float | None = None
) -> None:
    """Draw recorded histories over the steps: one column per task, one panel per quantity, one line per run.

    The quantities are those that every history holds. Noisy ones are drawn step by step (faint) and as a running mean.

    Args:
        columns: title -> run's name -> history, as ``FusedSGD.history()`` returns it, ``"loss"`` may be added.
        path: the picture to write.
        max_grad_norm: marks the norm to which gradients were clipped (default: None).

    Raises:
        ValueError: if there is nothing to draw.
    """
    everything = [history for runs in columns.values() for history in runs.values()]
    keys = [key for key in PANELS if all(np.isfinite(history.get(key, np.nan)).any() for history in everything)]
    if not keys:
        raise ValueError(f"lrkernels: nothing to draw, a history holds some of {', '.join(PANELS)}")
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(1.2 + 5.6 * len(columns), 0.9 + 2.1 * len(keys)))
        grid = figure.subplots(len(keys), len(columns), sharex="col", squeeze=False)
        for column, (title, runs) in zip(grid.T, columns.items(), strict=True):
            column[0].set_title(title)
            column[-1].set_xlabel("step")
            for axes, key in zip(column, keys, strict=True):
                _panel(axes, key, runs)
                if key == "grad_norm" and max_grad_norm is not None:
                    axes.axhline(max_grad_norm, color="#c1121f", linewidth=1, linestyle=(0, (4, 3)))
                    place: Any = {"transform": axes.get_yaxis_transform(), "ha": "right", "va": "bottom"}
                    axes.text(1, max_grad_norm, "clipped above", color="#c1121f", size=9, **place)
        handles = [axes.get_legend_handles_labels() for axes in grid.flat]
        legend = {text: line for lines, texts in handles for line, text in zip(lines, texts, strict=True)}
        if len(legend) > 1:
            figure.legend(legend.values(), legend, loc="outside upper right", ncols=len(legend))
        figure.align_ylabels(grid)
        _save(figure, path)


def refined(
    norms: ArrayLike, schedule: ArrayLike, path: str | Path, *, norm: str = "l2", smoothing: float = 0.1
) -> None:
    """Draw the gradient norms of a run, as recorded and smoothed, above the schedule refined from them.

    Args:
        norms: the recorded norms, one per step.
        schedule: the refined multipliers, one per step of the run to come.
        path: the picture to write.
        norm: the kind of norm, for the label (default: ``"l2"``).
        smoothing: width of the running median, as given to ``schedules.refined`` (default: 0.1).
    """
    norms, schedule = np.asarray(norms, dtype=float), np.asarray(schedule, dtype=float)
    finite = norms[np.isfinite(norms)]
    smooth, width = running_median(finite, smoothing)
    blue = LINES[1]["color"]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 5.6))
        above, below = figure.subplots(2, 1)
        above.plot(finite, color=blue, alpha=0.35, linewidth=0.8, label="recorded")
        above.plot(smooth, color=blue, linewidth=1.8, label=f"running median of {width} steps")
        _log_if_wide(above, finite)
        above.set(title="Recorded run", ylabel=PANELS["grad_norm_l1" if norm == "l1" else "grad_norm"], xlabel="step")
        linear = np.linspace(1, 0, len(schedule))
        below.plot(linear, color="#999999", linewidth=1.2, linestyle=(0, (4, 3)), label="linear decay")
        below.plot(schedule, color=blue, linewidth=1.8, label="refined")
        below.set(title="Schedule for the next run", ylabel="multiplier of the rate", xlabel="step", ylim=(0, 1.05))
        for axes in (above, below):
            axes.margins(x=0.01)
            axes.legend()
        figure.align_ylabels()
        _save(figure, path)


def _panel(axes: Axes, key: str, runs: Mapping[str, History]) -> None:
    """One quantity of every run of a task."""
    drawn: list[NDArray] = []
    for number, (name, history) in enumerate(runs.items()):
        values = np.asarray(history.get(key, ()), dtype=float)
        steps = np.asarray(history.get("step", np.arange(len(values))))[: len(values)]
        line = LINES[min(number, 1)] if len(runs) > 1 else LINES[1]
        smooth = values if key == "lr" else _running_mean(values)
        if smooth is not values and number == len(runs) - 1:
            axes.plot(
                steps,
                values,
                color=line["color"],
                alpha=0.3,
                linewidth=0.6,
                label=f"{name}, each step".removeprefix(", "),
            )
        axes.plot(steps, smooth, label=name or "running mean", **line)
        drawn.append(values[np.isfinite(values)])
    axes.set_ylabel(PANELS[key])
    axes.margins(x=0.01)
    if key.endswith("cosine"):
        axes.axhline(0, color="#888888", linewidth=0.8, zorder=1)
    elif key == "lr":
        axes.set_ylim(bottom=0)
    else:
        _log_if_wide(axes, np.concatenate(drawn))


def _log_if_wide(axes: Axes, values: NDArray) -> None:
    """A logarithmic axis, with legible ticks, for values that are positive and span more than a decade."""
    low, high = np.min(values, initial=np.inf), np.max(values, initial=0)
    if 0 < 10 * low < high:
        axes.set_yscale("log")
        if high < 300 * low:
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_major_formatter("{x:g}")


def _running_mean(values: NDArray) -> NDArray:
    """A weighted mean (Hann) over about a twentieth of the run around each step; narrower at the ends."""
    window = np.hanning(max(1, len(values) // 20) + 2)[1:-1]
    finite = np.isfinite(values)
    total = np.convolve(np.where(finite, values, 0.0), window, "same")
    return total / np.maximum(np.convolve(finite, window, "same"), 1e-9)


def _save(figure: Figure, path: str | Path) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
