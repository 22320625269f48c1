"""GALA on full and on small batches: when successive gradients will do, and when a step needs two of one batch."""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from lrkernels import FusedSGD, schedules

STEPS = 150

source = load_digits()
images, labels = torch.tensor(source.images, dtype=torch.float32) / 8 - 1, torch.tensor(source.target)


def train(lr: float, mode: str, batch_size: int) -> tuple[float, float, int]:
    """Return the loss on all data, the last rate, and how often the loss of a batch was evaluated."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = FusedSGD(model.parameters(), lr=lr, schedule=schedules.gala(mode=mode))
    evaluations = 0
    for _ in range(STEPS):
        chosen = torch.randperm(len(labels))[:batch_size]

        def closure(chosen: Tensor = chosen) -> Tensor:
            nonlocal evaluations
            evaluations += 1
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(images[chosen]), labels[chosen])
            loss.backward()
            return loss

        optimizer.step(closure)
    with torch.no_grad():
        loss = nn.functional.cross_entropy(model(images), labels)
    return float(loss), float(optimizer.stats["lr"]), evaluations


for mode, batch_size, verdict in (
    ("consecutive", len(labels), "full batch: one evaluation a step is enough"),
    ("same_batch", 64, "small batches: the same batch twice a step"),
    ("consecutive", 64, "small batches, successive gradients: noise counts as curvature, the rate collapses"),
):
    print(f"\n{mode}, batch {batch_size} ({verdict})")
    for lr in (1.0, 1e-2, 1e-4):
        loss, last, evaluations = train(lr, mode, batch_size)
        print(f"  first rate {lr:<6.0e}  loss {loss:.4f}  last rate {last:.1e}  {evaluations} evaluations")
