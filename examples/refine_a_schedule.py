"""Record the gradient norms of one run, and let them shape the schedule of the next."""

from lrkernels import FusedAdamW, schedules
from lrkernels.tasks import text

STEPS = 150

task = text(width=64, layers=1)  # a byte-level transformer on the source text of Python's standard library


def train(schedule: object) -> tuple[float, FusedAdamW]:
    """Return the validation loss, and the optimizer with its record of the run."""
    model = task.model()
    optimizer = FusedAdamW(
        model.parameters(),
        lr=1e-2,
        schedule=schedule,
        track=("grad_norm_l1",),  # the l1 norm for Adam; for SGD the l2 norm, "grad_norm"
        history_size=None,  # keep every step, not the last 1024 only
    )
    for batch in task.batches(STEPS):
        task.loss(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    return task.evaluate(model), optimizer


linear = schedules.linear(STEPS)
before, optimizer = train(linear)
refined = schedules.refined(optimizer.history()["grad_norm_l1"], norm="l1")
after, _ = train(refined)

parts = (0, 0.05, 0.1, 0.25, 0.5, 0.75, 0.95)
print("part of the run " + "".join(f"{part:>8.0%}" for part in parts))
for name, schedule in (("linear", linear), ("refined", refined)):
    print(f"{name:<16}" + "".join(f"{schedule(int(part * STEPS)):8.3f}" for part in parts))
print(f"{task.metric}: linear {before:.3f}, refined {after:.3f}")
# The same from files: numpy.savez("run.npz", **history), then
# `python -m lrkernels refine run.npz --norm l1 -o schedule.json`.
