"""Fused PyTorch optimizers whose learning rate watches training, in the memory traffic of a plain step."""

from . import batch_sizes, recipes, reference, schedules
from .batch_sizes import ScheduledBatchSampler
from .guard import Guard
from .log import log_history
from .ops import info
from .optim import FusedAdamW, FusedSGD
from .wrappers import GALA, Alignment, VolSchedLR

__version__ = "0.1.0"

__all__ = [
    "GALA",
    "Alignment",
    "FusedAdamW",
    "FusedSGD",
    "Guard",
    "ScheduledBatchSampler",
    "VolSchedLR",
    "batch_sizes",
    "info",
    "log_history",
    "recipes",
    "reference",
    "schedules",
]
