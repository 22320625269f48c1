"""Write docs/evidence.md and its pictures from the results of learning.py; too few seeds, and a study is left out.

Comments on the figures are taken from a file beside the results: the same name with .md, a heading for each study.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from studies import (
    BIASES,
    BUDGETS,
    CONSTANT,
    DECADES,
    KAPPAS,
    LINEAR,
    PHIS,
    PROBLEMS,
    REGIMES,
    SHAPES,
    STUDIES,
    Method,
    bias_grid,
    runs_of,
)

from lrkernels import plots

if TYPE_CHECKING:
    from learning import Results

ENOUGH = 5  # seeds, for anything to be said
COLOURS = ["#16425b", "#f2a65a", "#c1121f", "#5b8e7d", "#8f5ea2", "#7f7f7f", "#3aa0c9", "#b08900"]


@dataclass(frozen=True)
class Cell:
    """The same run over the seeds.

    Attributes:
        values: One for each seed.
        failed: How many ended above the loss of a uniform guess, as which they count.
        lr: The rate it was run from.
    """

    values: tuple[float, ...]
    failed: int = 0
    lr: float = math.nan

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return statistics.fmean(self.values)

    @property
    def std(self) -> float:
        """The sample standard deviation over the seeds."""
        return statistics.stdev(self.values)

    def __str__(self) -> str:
        if self.failed == len(self.values):
            return "failed"
        digits = min(max(1 - math.floor(math.log10(self.std)), 1), 5) if self.std > 0 else 3
        mark = f", {self.failed} failed" if self.failed else ""
        return f"{self.mean:.{digits}f} ({self.std:.{digits}f}{mark})"

    def minus(self, other: Cell) -> Cell:
        """The differences, seed by seed."""
        return Cell(tuple(a - b for a, b in zip(self.values, other.values, strict=True)), 0, self.lr)


class Study:
    """The results of one study.

    Args:
        results: All of them.
        name: A key of STUDIES.
    """

    def __init__(self, results: Results, name: str) -> None:
        self.results, self.name = results, name
        self.seeds = 0
        while all(run.key in results.done for run in runs_of(name, self.seeds)):
            self.seeds += 1

    def cell(self, method: Method, problem: str, lr: float, budget: float = 1.0, figure: str = "loss") -> Cell:
        """Read one run over the seeds."""
        rows = [self.results.done[method.run(problem, lr, seed, budget).key] for seed in range(self.seeds)]
        return Cell(tuple(row[figure] for row in rows), sum(row.get("failed", False) for row in rows), lr)

    def best(
        self,
        method: Method,
        problem: str,
        budget: float = 1.0,
        figure: str = "loss",
        by: Callable[[Cell], float] = lambda cell: cell.mean,
    ) -> Cell:
        """The cell of the rate with the lowest mean (or lowest ``by``)."""
        rates = PROBLEMS[problem].tuning if method.rates is None else method.rates
        return min((self.cell(method, problem, lr, budget, figure) for lr in rates), key=by)


def number(x: float) -> str:
    """As short as it gets: 1e-05 is 1e-5."""
    return f"{x:g}".replace("e-0", "e-")


def table(head: list[str], rows: Iterable[list[str]]) -> str:
    """In markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def picture(path: Path, draw: Callable[[Any], None], rows: int, columns: int, width: float, height: float) -> str:
    """Draw on a grid of axes and return the line for the document."""
    with matplotlib.rc_context(plots.STYLE):
        figure = Figure(figsize=(width, height))
        draw(figure.subplots(rows, columns, squeeze=False))
        entries: dict[str, Any] = {}
        for axes in figure.axes:
            entries |= {text: line for line, text in zip(*axes.get_legend_handles_labels(), strict=True)}
        figure.legend(entries.values(), entries, loc="outside lower center", ncols=min(len(entries), 4))
        figure.savefig(path, dpi=90)
    return f"![{path.stem}]({path.name})\n"


def curve(axes: Axes, x: list[float], cells: list[Cell], label: str, colour: str) -> None:
    """Means over x, and a band of one standard deviation."""
    mean, std = np.array([c.mean for c in cells]), np.array([c.std for c in cells])
    axes.plot(x, mean, color=colour, marker="o", markersize=3, linewidth=1.4, label=label)
    axes.fill_between(x, mean - std, mean + std, color=colour, alpha=0.15, linewidth=0)


def regret(cell: Cell, best: Cell, problem: str) -> Cell:
    """Per cent of the best cell's progress, from the loss of a uniform guess, that was not made; seed by seed."""
    scale = 100 / (PROBLEMS[problem].guess - best.mean)
    return Cell(tuple(scale * value for value in cell.minus(best).values), cell.failed, cell.lr)


def tuned(study: Study, methods: list[Method], problems: Iterable[str], figure: str = "loss") -> str:
    """A row for each method, a column for each problem: the figure at the best rate of that row."""
    rows = []
    for method in methods:
        cells = [study.best(method, problem, figure=figure) for problem in problems]
        rows.append([method.label, *(f"{cell} at {number(cell.lr)}" for cell in cells)])
    return table(["", *problems], rows)


def against(study: Study, methods: list[Method], baseline: Method, problems: Iterable[str]) -> str:
    """The same, each minus the baseline at its own best rate, seed by seed; and how many seeds it was below it."""
    rows = []
    for method in methods:
        if method == baseline:
            continue
        cells = [study.best(method, p).minus(study.best(baseline, p)) for p in problems]
        wins = [sum(value < 0 for value in cell.values) for cell in cells]
        rows.append([method.label, *(f"{c}, {w} of {study.seeds}" for c, w in zip(cells, wins, strict=True))])
    return table([f"minus {baseline.label}", *problems], rows)


def accuracies(study: Study, methods: list[Method], problems: Iterable[str]) -> str:
    """Held-out accuracy in per cent, at the rate that is best for it."""
    rows = []
    for method in methods:
        cells = []
        for problem in problems:
            best = study.best(method, problem, figure="accuracy", by=lambda cell: -cell.mean)
            cells.append(Cell(tuple(100 * value for value in best.values), best.failed, best.lr))
        rows.append([method.label, *(f"{cell} at {number(cell.lr)}" for cell in cells)])
    return table(["held-out accuracy, %", *problems], rows)


# -- one function for each study: the text below its heading -----------------------------------------------------------


def sensitivity(study: Study, folder: Path) -> str:
    parts = []
    for problem, methods in STUDIES["sensitivity"].items():
        best = study.best(next(m for m in methods if m.method == "linear"), problem)
        rows = []
        for method in methods:
            cells = {lr: study.cell(method, problem, lr) for lr in method.rates or ()}
            least = min(cells.values(), key=lambda cell: cell.mean)
            values, regrets = [""] * len(DECADES), [f"{regret(least, best, problem).mean:.1f}"]
            if len(cells) > 1:  # all but Prodigy, whose rate is not to be chosen
                values = [str(cells[lr]) for lr in DECADES]
                regrets.append(f"{max(regret(cells[lr], best, problem).mean for lr in DECADES):.1f}")
            rows.append([method.label, *values, f"{least} at {number(least.lr)}", "; ".join(regrets)])
        head = ["first rate", *map(number, DECADES), "at its best rate", "regret there; worst, %"]
        parts.append(f"{PROBLEMS[problem].title}, {PROBLEMS[problem].figure}:\n\n{table(head, rows)}")
    shown = ["fixed", "linear decay, clipped", "`alignment`, clipped", "`self_tuning`, clipped"]
    shown += ["`gala`, same batch, clipped", "schedule-free"]

    def draw(grid: Any) -> None:
        for axes, problem in zip(grid.flat, ("digits_sgd", "digits_adamw", "text_sgd", "text_adamw"), strict=True):
            methods = {m.label: m for m in STUDIES["sensitivity"][problem]}
            for label, colour in zip(shown, COLOURS, strict=False):
                cells = [study.cell(methods[label], problem, lr) for lr in DECADES]
                curve(axes, list(DECADES), cells, label.replace("`", ""), colour)
            axes.axhline(study.cell(methods["Prodigy"], problem, 1.0).mean, color="k", ls=":", lw=1, label="Prodigy")
            axes.set(xscale="log", title=PROBLEMS[problem].title, ylabel=PROBLEMS[problem].figure)
            axes.invert_xaxis()
        for axes in grid[-1]:
            axes.set_xlabel("first rate")

    parts.append(picture(folder / "evidence_sensitivity.png", draw, 2, 2, 10, 8))
    return "\n".join(parts)


def bias(study: Study, folder: Path) -> str:
    problems = STUDIES["bias"]
    parts, worsts = [], {}
    for method, baseline in (("self_tuning", LINEAR), ("alignment", CONSTANT)):
        grids = {p: {m.label: m for m in rows if m.method == method} for p, rows in problems.items()}
        grids = {p: grid for p, grid in grids.items() if grid}
        whole = [p for p, grid in grids.items() if len(grid) == len(KAPPAS) * len(BIASES)]
        rows = []
        for label in (m.label for m in bias_grid(method, whole[0])):
            cells: dict[str, list[Cell]] = {}
            for p, grid in grids.items():
                best = study.best(baseline, p)
                if label in grid:
                    cells[p] = [regret(study.cell(grid[label], p, lr), best, p) for lr in grid[label].rates or ()]
            means = {p: statistics.fmean(c.mean for c in row) for p, row in cells.items()}
            overall = Cell(
                tuple(statistics.fmean(c.values[seed] for p in whole for c in cells[p]) for seed in range(study.seeds))
            )
            worst = max((c for p in whole for c in cells[p]), key=lambda c: c.mean)
            worsts[label] = worst.mean
            columns = [f"{means[p]:.1f}; {max(c.mean for c in cells[p]):.1f}" if p in cells else "" for p in grids]
            rows.append([*label.split()[1:], *columns, str(overall), str(worst)])
        head = [
            "kappa",
            "bias",
            *(f"{p}: mean; worst" for p in grids),
            "mean over " + ", ".join(whole),
            "worst of them",
        ]
        name = "`recipes.self_tuning`, clipped as usual, against tuned linear decay"
        if method == "alignment":
            name = "`schedules.alignment`, left on to the end, against a tuned constant rate"
        parts.append(f"{name}; regret in %:\n\n{table(head, rows)}")

    def draw(grid: Any) -> None:
        for axes, method in zip(grid.flat, ("self_tuning", "alignment"), strict=True):
            for kappa, colour in zip(KAPPAS, COLOURS, strict=False):
                values = [worsts[f"{method} {kappa:g} {b:g}"] for b in BIASES]
                axes.plot(BIASES, values, marker="o", color=colour, label=f"kappa {kappa:g}")
            axes.set(title=method, xlabel="bias", ylabel="worst regret, %", yscale="log")

    parts.append(picture(folder / "evidence_bias.png", draw, 1, 2, 9, 4))
    return "\n".join(parts)


def shapes(study: Study, folder: Path) -> str:
    problems = list(STUDIES["schedules"])

    def draw(grid: Any) -> None:
        for axes, problem in zip(grid.flat, problems, strict=True):
            for method, colour in zip(SHAPES, COLOURS, strict=False):
                rates = list(PROBLEMS[problem].tuning)
                curve(axes, rates, [study.cell(method, problem, lr) for lr in rates], method.label, colour)
            axes.set(xscale="log", title=PROBLEMS[problem].title, ylabel=PROBLEMS[problem].figure, xlabel="rate")
            axes.set_yscale("log")

    return "\n".join(
        [
            tuned(study, SHAPES, problems),
            against(study, SHAPES, LINEAR, problems),
            accuracies(study, SHAPES, ["digits_sgd", "mlp_sgd"]),
            picture(folder / "evidence_schedules.png", draw, 2, 2, 10, 8),
        ]
    )


def refinement(study: Study, folder: Path) -> str:
    problems = list(STUDIES["refined"])
    methods = STUDIES["refined"][problems[0]]
    degenerate = []

    def draw(grid: Any) -> None:
        for axes, problem in zip(grid.flat, problems, strict=True):
            lr = study.best(methods[-1], problem).lr
            rows = [study.results.done[methods[-1].run(problem, lr, s).key]["shape"] for s in range(study.seeds)]
            mean, std = np.mean(rows, axis=0), np.std(rows, axis=0, ddof=1)
            x = np.linspace(0, 1, len(mean))
            axes.plot(x, 1 - x, color=COLOURS[-3], linestyle="--", label="linear decay")
            axes.plot(x, mean, color=COLOURS[0], label="refined, mean and standard deviation over seeds")
            axes.fill_between(x, mean - std, mean + std, color=COLOURS[0], alpha=0.2, linewidth=0)
            axes.set(title=f"{PROBLEMS[problem].title}, rate {number(lr)}", xlabel="share of the run")

    image = picture(folder / "evidence_refined.png", draw, 2, 2, 10, 6.5)
    for problem in problems:
        runs = [methods[-1].run(problem, lr, s) for lr in PROBLEMS[problem].tuning for s in range(study.seeds)]
        count = sum(study.results.done[run.key]["degenerate"] for run in runs)
        degenerate.append(f"{problem} {count} of {len(runs)}")
    return "\n".join(
        [
            tuned(study, methods, problems),
            against(study, methods, LINEAR, problems),
            f"Refined schedules that `refined` itself called degenerate: {', '.join(degenerate)}.\n",
            image,
        ]
    )


def uba(study: Study, folder: Path) -> str:
    parts = []
    for problem, methods in STUDIES["uba"].items():
        rows = []
        linear = methods[-1]
        for method in methods:
            cells = [study.best(method, problem, budget) for budget in BUDGETS]
            differences = [c.minus(study.best(linear, problem, b)) for c, b in zip(cells, BUDGETS, strict=True)]
            label = f"{method.label} (the cosine)" if method.settings.get("phi") == 2 else method.label
            values = [f"{cell} at {number(cell.lr)}" for cell in cells]
            rows.append([label, *values, *([""] * 3 if method is linear else map(str, differences))])
        head = ["", *(f"{b:.0%} of the steps" for b in BUDGETS), *(f"{b:.0%}, minus linear" for b in BUDGETS)]
        parts.append(f"{PROBLEMS[problem].title}, {PROBLEMS[problem].figure}:\n\n{table(head, rows)}")

    def draw(grid: Any) -> None:
        for axes, (problem, methods) in zip(grid.flat, STUDIES["uba"].items(), strict=True):
            for budget, colour in zip(BUDGETS, COLOURS, strict=False):
                name = f"{budget:.0%} of the steps"
                curve(axes, list(PHIS), [study.best(m, problem, budget) for m in methods[:-1]], name, colour)
                linear = study.best(methods[-1], problem, budget).mean
                axes.axhline(linear, color=colour, linestyle="--", linewidth=1, label="linear decay")
            axes.set(xscale="log", yscale="log", title=problem, xlabel="phi", ylabel=PROBLEMS[problem].figure)

    parts.append(picture(folder / "evidence_uba.png", draw, 1, 3, 11, 4))
    return "\n".join(parts)


def regimes(study: Study, folder: Path) -> str:
    methods = STUDIES["regimes"]["mlp_sgd"]
    rates = methods[0].rates or ()

    def norms(method: Method, lr: float) -> np.ndarray:
        rows = [study.results.done[method.run("mlp_sgd", lr, s).key]["norms"] for s in range(study.seeds)]
        return np.array(rows, dtype=float)

    rows = []
    for method in methods:
        cells = [Cell(tuple(norms(method, lr)[:, -5:].mean(1).tolist()), 0, lr) for lr in rates]
        accuracy = study.best(method, "mlp_sgd", figure="accuracy", by=lambda cell: -cell.mean)
        accuracy = Cell(tuple(100 * value for value in accuracy.values), 0, accuracy.lr)
        steps = study.results.done[method.run("mlp_sgd", rates[0], 0).key]["steps"]
        rows.append([method.label, str(steps), *map(str, cells), f"{accuracy} at {number(accuracy.lr)}"])
    head = ["regime, decay of the rate", "steps", *(f"norm, lr {number(lr)}" for lr in rates), "held-out accuracy, %"]

    def draw(grid: Any) -> None:
        for axes, lr in zip(grid.flat, rates, strict=True):
            for title, colour in zip(REGIMES, COLOURS, strict=False):
                method = next(m for m in methods if m.label == f"{title}, constant")
                logs = np.log10(norms(method, lr))
                mean, std = logs.mean(0), logs.std(0, ddof=1)
                x = np.arange(1, len(mean) + 1)
                axes.plot(x, 10**mean, color=colour, label=method.label)
                axes.fill_between(x, 10 ** (mean - std), 10 ** (mean + std), color=colour, alpha=0.15, linewidth=0)
            axes.set(yscale="log", title=f"lr {number(lr)}", xlabel="epoch")
        grid[0, 0].set_ylabel("norm of the full gradient")

    return "\n".join([table(head, rows), picture(folder / "evidence_regimes.png", draw, 1, 3, 11, 4)])


def volatility(study: Study, folder: Path) -> str:
    problems = list(STUDIES["volsched"])
    methods = STUDIES["volsched"][problems[0]]
    cosine = methods[0]
    rows = []
    for method in methods[1:]:
        row = [method.label]
        for problem in problems:
            pair = [study.best(m, problem, figure="accuracy", by=lambda cell: -cell.mean) for m in (method, cosine)]
            difference = pair[0].minus(pair[1])
            wins = sum(value > 0 for value in difference.values)
            row.append(f"{Cell(tuple(100 * v for v in difference.values))}, {wins} of {study.seeds}")
        rows.append(row)
    return "\n".join(
        [
            accuracies(study, methods, problems),
            table(["accuracy minus cosine's, points; seeds above it", *problems], rows),
            tuned(study, methods, problems),
        ]
    )


def costs(results: Results) -> str:
    parts = []
    for problem in dict.fromkeys(problem for problem, _ in results.costs):
        mine = [row for (p, _), row in results.costs.items() if p == problem]
        rows = []
        for row in mine:
            ratios = [f"{row[k][1]:.2f} ({row[k][0]:.2f} to {row[k][2]:.2f})" for k in ("whole", "own")]
            rows.append([row["method"], *ratios, f"{row['own_ms']:.2f}"])
        head = ["", "whole step", "all but the first forward and backward", "the same, ms"]
        share = f"{mine[0]['rounds']} rounds; other processes had {mine[0]['others']:.0%} of the machine's CPU time"
        parts.append(f"{PROBLEMS[problem].title} ({share}):\n\n{table(head, rows)}")
    return "\n".join(parts)


# -- the document ------------------------------------------------------------------------------------------------------

SECTIONS: dict[str, tuple[str, str, Callable[[Study, Path], str]]] = {
    "sensitivity": (
        "How much the first rate matters",
        """\
The claim of GALA's paper is that its rate is far less sensitive to the first one than SGD and Adam are; ours, that
`alignment` is so at the price of a plain step. Every method starts from 1, 0.1, ... 1e-6. `self_tuning` is
`alignment` for half of the run, then frozen and decayed linearly (kappa 0.2, bias 0). Prodigy and schedule-free are
those of their packages as their authors recommend: Prodigy with lr 1, with and without a cosine; schedule-free with a
warm-up, here of a twentieth of the run. Neither is clipped. To be tuned, linear decay and schedule-free were also run
from 3, 0.3, 0.03 and 0.003, schedule-free from 10 too. Regret: how much less far than tuned linear decay the run came
from the loss of a uniform guess, in per cent; of the best rate, and of the worst from 1 to 1e-6.""",
        sensitivity,
    ),
    "bias": (
        "What kappa and bias of alignment should be",
        """\
Every pair from three first rates: 1 (AdamW: 0.1), 1e-3 and 1e-6. Regret is as above; the tuned rates are half a
decade apart. A regret below 0 beats the tuned baseline.""",
        bias,
    ),
    "schedules": (
        "Linear decay against other shapes",
        """\
The paper (arXiv 2310.07831): linear decay is the best schedule that does not look at gradients; it beats cosine
slightly and the others clearly, when each is tuned. Each shape is tuned over the same rates: 3 to 0.01 for SGD, 0.3
to 0.001 for AdamW, half a decade apart. The second table is the difference to linear decay seed by seed, each at its
own best rate, and on how many seeds it ended lower.""",
        shapes,
    ),
    "refined": (
        "Refined schedules against linear decay",
        """\
The paper: a schedule refined from the gradient norms of an earlier run beats linear decay. The norms (l2 for SGD, l1
for AdamW) are from a run with linear decay, from the same rate, with another seed's data and weights.""",
        refinement,
    ),
    "uba": (
        "UBA over phi and budgets",
        """\
The paper (arXiv 2505.24452): one curve with phi suits every budget, better than cosine and others. Each phi and
budget is tuned over four rates, half a decade apart; phi = 2 is the cosine.""",
        uba,
    ),
    "regimes": (
        "Rate and batch size together",
        """\
The paper (arXiv 2508.03105): a constant batch leaves a floor of noise; a growing batch converges, faster with a
growing rate, and best with a warm-up. The norm of the full gradient, averaged over the last 5 of 40 epochs; batch
128 in (i), from 8 to 1024 in the others, doubled every 4 epochs; the rate grows to 5 times `lr`. Equal epochs are
not equal steps: see the column. The pictures' bands are standard deviations of the logarithm.""",
        regimes,
    ),
    "volsched": (
        "VolSched against cosine, exponential and plateau",
        """\
The paper (arXiv 2507.10575): 1.4 to 1.7 points of accuracy above cosine and plateau (CIFAR-100, ResNets). The
published window, 50 of 19,550 steps, is shorter than two steps of these runs. So the number of decisions is set
instead, 20 or 50 a run where the paper has 391, and the sensitivity w is the published 0.05, or 1, which is about
0.05 times 391/20, so that the decisions can move the rate as far altogether, or 0.2 between them. The lowest rate is
a thousandth of the first, as published. The signal is the accuracy of the training batch. Plateau is torch's
`ReduceLROnPlateau`, patience 1, shown the mean training loss of each twentieth of the run; exponential falls to a
hundredth. Each is tuned over 0.3, 0.1 and 0.03, by the figure of its table; nothing is clipped.""",
        volatility,
    ),
}
INTRODUCTION = """# Evidence

What each method claims, measured on problems small enough that two cores repeat everything in about an hour:

```
pip install --no-build-isolation '.[evidence]'
python benchmarks/learning.py --workers 2    # can be stopped; goes on where it was
python benchmarks/learning.py --report       # only writes this document
```

Runs of a second say little about training for a week. They show whether a claim survives on small problems, and with
how much noise. What contradicts a paper is reported as it came out.

Numbers are means over {seeds} seeds, with the sample standard deviation in brackets. A seed decides split, first
weights and batches, the same for every method, so differences are taken seed by seed. "Failed" is a run that ended
above the loss of a uniform guess, because it diverged or hardly moved; it counts as that loss. Rates were chosen by
the mean of the very figure that is shown, for every method alike. No weight decay; one thread; momentum 0.9 except in
the logistic regression, which has none. "Clipped" is `max_grad_norm=1`, the usual on all problems but the logistic
regression.
"""


def problems_table() -> str:
    shown = [name for name in PROBLEMS if any(name in study for study in STUDIES.values())]
    rows = []
    for name in shown:
        problem = PROBLEMS[name]
        task = problem.task(0)
        parameters = sum(p.numel() for p in task.model().parameters())
        batch = len(next(task.batches(1))[0])
        rows.append([f"`{name}`", problem.title, str(parameters), f"{problem.steps} of {batch}", problem.figure])
    return table(["problem", "", "parameters", "steps and batch", "figure"], rows)


def comments(path: Path) -> dict[str, str]:
    """What somebody wrote about these results: heading -> text."""
    if not path.exists():
        return {}
    sections = ("\n" + path.read_text()).split("\n## ")[1:]
    return {head.strip(): body.strip() for head, _, body in (section.partition("\n") for section in sections)}


def write(results: Results, folder: Path) -> None:
    """Write evidence.md and the pictures into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    studies = {name: Study(results, name) for name in SECTIONS}
    ready = [study.seeds for study in studies.values() if study.seeds >= ENOUGH]
    seeds = "to ".join(dict.fromkeys([str(min(ready)), str(max(ready))])) if ready else str(ENOUGH)
    said = comments(results.path.with_suffix(".md"))
    parts = [INTRODUCTION.format(seeds=seeds), problems_table(), DATA]
    if "summary" in said:
        parts += [f"## In short\n\n{said['summary']}\n"]
    for name, (title, text, section) in SECTIONS.items():
        study = studies[name]
        parts.append(f"## {title}\n\n{text}\n")
        if study.seeds < ENOUGH:
            parts.append(f"Not yet run: {study.seeds} of {ENOUGH} seeds are complete.\n")
            continue
        if name in said:
            parts.append(f"**What came out** ({study.seeds} seeds in every cell). {said[name]}\n")
        else:
            parts.append(f"{study.seeds} seeds in every cell.\n")
        parts.append(section(study, folder))
    parts.append(f"## What a step costs\n\n{COST}")
    parts += [f"{said['cost']}\n"] if "cost" in said else []
    parts.append(costs(results) if results.costs else "Not yet measured.\n")
    parts.append(f"## Machine\n\n{about(results)}")
    (folder / "evidence.md").write_text("\n".join(parts).rstrip() + "\n")


DATA = """\
Digits are scikit-learn's 1797 images of 8 x 8 pixels, a fifth held out; the text is the source of Python's standard
library, byte by byte, its last tenth held out; the logistic regression is on scikit-learn's 569 breast cancer
patients.
"""
COST = """\
Steps of all methods in turns, on one thread: the time of a whole training step, and of all of it but the first
forward and backward (so `gala`'s second evaluation counts), over that of the plain step of the same round; medians,
quartiles in brackets. Prodigy's and schedule-free's are their packages' own steps, as they come.
"""


def about(results: Results) -> str:
    if not results.starts:
        return "Not recorded.\n"
    last = results.starts[-1]
    cpu = sum(row["cpu"] for row in results.done.values())
    packages = f"Python {last['python']}, torch {last['torch']}, lrkernels {last['lrkernels']}"
    others = f"prodigyopt {version('prodigyopt')}, schedulefree {version('schedulefree')}"
    lines = [
        f"{last['cpu']}, {last['cores']} cores shared with others; {last['system']}. {packages}, {others}.",
        f"{len(results.done)} runs, {cpu / 3600:.1f} hours of CPU time, begun {results.starts[0]['date'][:16]} UTC and",
        f"last gone on with {last['date'][:16]} UTC by `{last['command']}`. The results are",
        f"`benchmarks/results/{results.path.name}`, one line for each run.",
    ]
    return "\n".join(lines) + "\n"
