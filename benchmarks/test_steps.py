"""The rows of cases.CASES under pytest-benchmark, ours and the baseline as a group each: ``pytest benchmarks``."""

import pytest
import torch
from cases import CASES, MODELS
from run import WARM_UP, Side


@pytest.mark.parametrize("who", ["ours", "baseline"])
@pytest.mark.parametrize("case", CASES, ids=[case.id for case in CASES])
def test_step(benchmark, case, who):
    torch.set_num_threads(2)
    model = MODELS[case.model]
    side = Side("ours" if who == "ours" else case.baseline, model.shapes, case.optimizer, case.ours)
    benchmark.group = case.id
    turn = {"setup": side.new_gradients} if model.steps == 1 else {"iterations": model.steps}
    benchmark.pedantic(side.step, rounds=model.pairs, warmup_rounds=WARM_UP, **turn)
