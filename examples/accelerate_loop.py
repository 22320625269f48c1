"""accelerate: prepared, accumulated, clipped by the optimizer itself; statistics come from the one that was made."""

from accelerate import Accelerator
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from lrkernels import FusedSGD, schedules
from lrkernels.tasks import digits

STEPS, ACCUMULATED = 100, 2

task = digits()  # a small convolutional network and scikit-learn's handwritten digits
accelerator = Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATED)
fused = FusedSGD(
    (network := task.model()).parameters(),
    lr=0.1,
    momentum=0.9,
    schedule=schedules.linear(STEPS, warmup_steps=10),  # counts completed updates, whatever is accumulated or skipped
    max_grad_norm=1.0,
)
scheduler = LambdaLR(fused, lambda step: 0.999**step)  # torch's may stay: both multiply
batches = DataLoader(list(task.batches(STEPS * ACCUMULATED)), batch_size=None)
model, optimizer, batches, scheduler = accelerator.prepare(network, fused, batches, scheduler)

for batch in batches:
    with accelerator.accumulate(model):
        accelerator.backward(task.loss(model, batch))
        optimizer.step()
        scheduler.step()  # in float16 not where optimizer.step_was_skipped
        optimizer.zero_grad()

print(f"{int(fused.stats['step'])} updates of {ACCUMULATED} batches each, the last one at {fused.stats['lr']:.5f}")
print(f"{task.metric}: {task.form.format(task.evaluate(network))}")
