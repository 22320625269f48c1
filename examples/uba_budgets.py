"""UBA: one number, phi, says how early the rate falls, and the budget says over how many steps."""

import torch
from torch import nn

from lrkernels import FusedSGD, schedules
from lrkernels.tasks import digits

BUDGETS = (25, 50, 100, 200)

task = digits()


def train(schedule: schedules.Schedule, steps: int) -> float:
    """Return the accuracy after so many steps."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = FusedSGD(model.parameters(), lr=0.1, momentum=0.9, schedule=schedule)
    for batch in task.batches(steps):
        task.loss(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    return task.evaluate(model)


print("the rate at each eighth of the budget, then the accuracy after budgets of", *BUDGETS, "steps")
for phi in (0.5, 2.0, 5.0, 20.0):  # 2 is the cosine; less stays high and drops late, more falls early
    shape = schedules.uba(total_steps=8, phi=phi)
    rates = " ".join(f"{shape(step):.2f}" for step in range(9))
    scores = [train(schedules.uba(total_steps=steps, phi=phi), steps) for steps in BUDGETS]
    print(f"phi {phi:>4}: {rates}   " + " ".join(f"{score:.1%}" for score in scores))
