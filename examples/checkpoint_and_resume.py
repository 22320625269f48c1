"""Save in the middle of an epoch, resume with fresh objects, and arrive at the same bits."""

import io

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from lrkernels import FusedSGD, ScheduledBatchSampler, batch_sizes, recipes

STEPS, STOP = 120, 50

source = load_digits()
data = TensorDataset(torch.tensor(source.images, dtype=torch.float32) / 8 - 1, torch.tensor(source.target))


class Training:
    """Everything that a run consists of."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
        self.optimizer = FusedSGD(
            self.model.parameters(), lr=1e-3, momentum=0.9, schedule=recipes.self_tuning(STEPS), max_grad_norm=1.0
        )
        shuffled = RandomSampler(data, generator=torch.Generator().manual_seed(0))
        self.sampler = ScheduledBatchSampler(shuffled, batch_sizes.exponential(16, maximum=64))
        self.loader = DataLoader(data, batch_sampler=self.sampler)

    def run(self, steps: int) -> dict:
        """Train for so many steps, and return a checkpoint."""
        while True:
            for consumed, (images, labels) in enumerate(self.loader, start=1):
                nn.functional.cross_entropy(self.model(images), labels).backward()
                self.optimizer.step()
                self.optimizer.zero_grad()
                steps -= 1
                if steps == 0:
                    parts = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
                    return {**parts, "sampler": self.sampler.state_dict(consumed)}

    def load(self, checkpoint: dict) -> None:
        """Continue from a checkpoint."""
        for name, state in checkpoint.items():
            getattr(self, name).load_state_dict(state)


whole = Training()
whole.run(STEPS)
file = io.BytesIO()
torch.save(Training().run(STOP), file)
file.seek(0)
resumed = Training()
resumed.load(torch.load(file))
resumed.run(STEPS - STOP)
same = all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True))
print(f"{STEPS} steps, and {STOP} + {STEPS - STOP} with a checkpoint between: {'same bits' if same else 'DIFFERENT'}")
