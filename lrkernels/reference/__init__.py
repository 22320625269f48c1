"""The methods in slow, plain form and the papers' own symbols: what to read, and what the rest is tested by.

One file per method: ``refinement``, ``uba``, ``volsched``, ``gala``, ``sgdm``, ``alignment``.
``ReferenceSGD`` and ``ReferenceAdamW`` take the same arguments as the fused optimizers and run on the host,
tensor by tensor.
"""

from . import sgdm
from .alignment import Alignment, alignment_lr, cosine
from .gala import Gala, gala_lr
from .optimizers import ReferenceAdamW, ReferenceSGD, clip_factor
from .refinement import last_iterate_bound, linear_decay, refined, running_median, schedule_from_weights
from .uba import chebyshev_steps, uba, uba_angle, uba_shape
from .volsched import VolSched, cosine_decay, decay_ratio, volsched_multiplier

__all__ = [
    "Alignment",
    "Gala",
    "ReferenceAdamW",
    "ReferenceSGD",
    "VolSched",
    "alignment_lr",
    "chebyshev_steps",
    "clip_factor",
    "cosine",
    "cosine_decay",
    "decay_ratio",
    "gala_lr",
    "last_iterate_bound",
    "linear_decay",
    "refined",
    "running_median",
    "schedule_from_weights",
    "sgdm",
    "uba",
    "uba_angle",
    "uba_shape",
    "volsched_multiplier",
]
