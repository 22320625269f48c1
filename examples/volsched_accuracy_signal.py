"""VolSched: the accuracy of each training batch is the signal, and its volatility moves the rate."""

import torch
from torch import nn

from lrkernels import FusedSGD, schedules
from lrkernels.tasks import digits

STEPS, WINDOW = 400, 20

task = digits()
torch.manual_seed(0)
model = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
optimizer = FusedSGD(
    model.parameters(),
    lr=0.1,
    momentum=0.9,
    weight_decay=1e-4,
    schedule=schedules.volsched(total_steps=STEPS, window=WINDOW, min_lr=1e-4, warmup_steps=20),
)

for images, labels in task.batches(STEPS):
    logits = model(images)
    nn.functional.cross_entropy(logits, labels).backward()
    optimizer.observe((logits.argmax(-1) == labels).float().mean())  # a tensor on the device: nothing waits
    optimizer.step()
    optimizer.zero_grad()

rates = optimizer.history()["lr"]
cosine = schedules.cosine(STEPS - 20)
print("  step     rate   cosine alone")
for step in range(20, STEPS, 4 * WINDOW):  # the rate moves every WINDOW steps after the warm-up
    print(f"{step:6}   {rates[step]:.4f}   {0.1 * cosine(step - 20):.4f}")
print(f"{task.metric}: {task.form.format(task.evaluate(model))}")
