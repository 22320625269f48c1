"""The four regimes of SGD with momentum, in which learning rate and batch size are planned together."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from lrkernels import FusedSGD, ScheduledBatchSampler, recipes

EPOCHS = 20

source = load_digits()
data = TensorDataset(torch.tensor(source.images, dtype=torch.float32) / 8 - 1, torch.tensor(source.target))


def full_gradient_norm(model: nn.Module) -> float:
    """The norm of the gradient over all data: what the theory bounds."""
    model.zero_grad()
    nn.functional.cross_entropy(model(data.tensors[0]), data.tensors[1]).backward()
    return float(nn.utils.get_total_norm([p.grad for p in model.parameters()]))


print(f"{'regime':<26}{'batch':<12}{'rate':<18}steps   norm of the full gradient at the end")
for kind, first_batch in (
    ("constant_batch", 32),
    ("increasing_batch", 8),
    ("increasing_batch_and_lr", 8),
    ("increasing_batch_warmup", 8),
):
    schedule, batch_sizes, total_steps = recipes.sgdm(
        kind, len(data), EPOCHS, batch_size=first_batch, max_batch_size=512, every=5, max_lr_ratio=1.8, momentum=0.9
    )
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = FusedSGD(model.parameters(), lr=0.02, momentum=0.9, schedule=schedule, history_size=None)
    sampler = ScheduledBatchSampler(RandomSampler(data), batch_sizes)
    loader = DataLoader(data, batch_sampler=sampler)
    for _ in range(EPOCHS):  # the sampler counts the epochs itself
        for images, labels in loader:
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
    rates = optimizer.history()["lr"]
    assert len(rates) == total_steps
    sizes = f"{batch_sizes(0)} to {batch_sizes(EPOCHS - 1)}"
    span = f"{rates[0]:.3f} to {rates[-1]:.3f}"
    print(f"{kind:<26}{sizes:<12}{span:<18}{total_steps:<8}{full_gradient_norm(model):.4f}")
