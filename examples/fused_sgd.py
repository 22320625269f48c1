"""FusedSGD in a training loop: schedule, clipping and statistics are part of the optimizer's one call."""

from lrkernels import FusedSGD, schedules
from lrkernels.tasks import digits

STEPS = 200

task = digits()  # a small convolutional network and scikit-learn's handwritten digits
model = task.model()
optimizer = FusedSGD(
    model.parameters(),
    lr=0.1,
    momentum=0.9,
    weight_decay=5e-4,
    schedule=schedules.linear(total_steps=STEPS, warmup_steps=10),
    max_grad_norm=1.0,
    track=("grad_norm", "direction"),  # the clip takes the norm anyway; the direction is asked for
)

for step, batch in enumerate(task.batches(STEPS), start=1):
    loss = task.loss(model, batch)
    loss.backward()
    optimizer.step()  # measure, decide, apply
    optimizer.zero_grad()
    if step % 40 == 0:  # reading a statistic is what waits for the device; taking it does not
        stats = {name: float(value) for name, value in optimizer.stats.items()}
        print(
            f"step {stats['step']:3.0f}  loss {loss.item():.3f}  rate {stats['lr']:.4f}  norm {stats['grad_norm']:.3f}"
            f"  clip {stats['clip']:.3f}  cosine with the last move {stats['direction_cosine']:+.3f}"
        )

print(f"{task.metric}: {task.form.format(task.evaluate(model))}")

history = optimizer.history()  # one copy to the host: an array per statistic, oldest step first
clipped = (history["clip"] < 1).mean()
print(f"{len(history['step'])} steps on record; {clipped:.0%} of them were clipped")
# numpy.savez("run.npz", **history) keeps it, and `python -m lrkernels plot run.npz` draws it.
