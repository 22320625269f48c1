"""float16 under torch's gradient scaler: skipped steps change nothing, nothing waits, TensorBoard gets every step."""

import tempfile

import torch
from torch.utils.tensorboard import SummaryWriter

from lrkernels import FusedSGD, log_history, schedules
from lrkernels.tasks import digits

STEPS = 80

task = digits()  # a small convolutional network and scikit-learn's handwritten digits
model = task.model()
optimizer = FusedSGD(
    model.parameters(), lr=0.1, momentum=0.9, schedule=schedules.linear(STEPS, warmup_steps=10), max_grad_norm=1.0
)
scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)  # too much, so that the first steps overflow

with tempfile.TemporaryDirectory() as folder, SummaryWriter(folder) as writer:  # for a run of yours: one that stays
    for step, batch in enumerate(task.batches(STEPS), start=1):
        with torch.autocast("cpu", dtype=torch.float16):
            loss = task.loss(model, batch)
        scaler.scale(loss).backward()
        scaler.step(optimizer)  # unscales, clips, updates or skips, in one call
        scaler.update()
        optimizer.zero_grad()
        if step % 40 == 0:  # within history_size steps
            print(f"step {step:3d}: {log_history(writer, optimizer)} completed steps written")

print(f"{int(optimizer.stats['skipped'])} steps skipped, {int(optimizer.stats['step'])} of the schedule's {STEPS} made")
print(f"{task.metric}: {task.form.format(task.evaluate(model))}")
