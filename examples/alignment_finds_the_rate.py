"""First rates five decades apart: a schedule keeps to the one it is given, `alignment` moves it to where it trains."""

import torch
from torch import nn

from lrkernels import FusedSGD, recipes, schedules
from lrkernels.tasks import digits

STEPS = 300

task = digits()


def train(lr: float, schedule: object) -> tuple[float, float]:
    """Return the accuracy, and the largest rate that the schedule came to."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = FusedSGD(
        model.parameters(),
        lr=lr,
        momentum=0.9,
        schedule=schedule,
        max_grad_norm=1.0,  # so that a first rate that is far too high does no harm
    )
    for batch in task.batches(STEPS):
        task.loss(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    return task.evaluate(model), optimizer.history()["lr"].max()


print("first rate   linear decay   self-tuning: alignment for half of the run, then a linear decay")
for lr in (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5):
    plain, _ = train(lr, schedules.linear(STEPS))
    tuned, highest = train(lr, recipes.self_tuning(STEPS))
    print(f"{lr:<10.0e}   {plain:<12.1%}   {tuned:.1%}, highest rate {highest:.2g}")
