"""How benchmarks/run.py comes to the figures of a row; the steps themselves are the benchmarks' own matter."""

import statistics
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"

pytestmark = pytest.mark.skipif(not BENCHMARKS.exists(), reason="the benchmarks are not there")


@pytest.fixture
def run(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.delitem(sys.modules, "cases", raising=False)  # there is one of that name here, too
    monkeypatch.delitem(sys.modules, "run", raising=False)
    import run

    return run


@pytest.mark.parametrize("pairs, rounds", [(10, [3, 3, 2, 2]), (8, [2, 2, 2, 2]), (3, [1, 1, 1])], ids=str)
def test_a_case_is_timed_in_rounds_with_new_sides(run, monkeypatch, pairs, rounds):
    """Whose memory comes first alternates; the warm-up of each round is left out, and all its other pairs count."""
    made, ticks, ratios = [], [], []

    class Side:
        def __init__(self, who, *_):
            made.append(who)
            self.who, self.params, self.steps = who, [torch.zeros(1)], 0

        def timed_turn(self, steps):
            assert steps == 1
            self.steps += 1
            if self.who == "ours":
                return 1.0
            if self.steps <= run.WARM_UP:
                return 1e6
            ratios.append(1.0 + len(made) + 0.125 * self.steps)
            return ratios[-1]

    monkeypatch.setattr(run, "Side", Side)
    monkeypatch.setattr(run, "copy_bandwidth", lambda: 1.0)
    row = run.compare(run.CASES[0], pairs, lambda: ticks.append(None))
    assert made == (["ours", "plain", "plain", "ours"] * 2)[: 2 * len(rounds)]
    assert run.rounds_of(pairs) == rounds and len(ticks) == pairs + run.WARM_UP * len(rounds)
    assert len(ratios) == pairs
    low, median, high = statistics.quantiles(ratios, n=4)
    assert (row["ratio"], row["quartiles"]) == (median, [low, high])
