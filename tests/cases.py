"""What the tests run over, as tables: a case is one row with an id. Data only."""

from importlib.util import find_spec

import pytest
import torch
from torch.optim import lr_scheduler

from lrkernels import FusedAdamW, FusedSGD, schedules

LR = 0.05

SGD_OPTIONS = {
    "plain": {},
    "momentum": {"momentum": 0.9},
    "dampening": {"momentum": 0.9, "dampening": 0.3},
    "nesterov": {"momentum": 0.9, "nesterov": True},
    "weight_decay": {"weight_decay": 0.01},
    "momentum-weight_decay": {"momentum": 0.9, "weight_decay": 0.01},
    "decoupled": {"weight_decay": 0.1, "decoupled_weight_decay": True},
    "decoupled-momentum": {"momentum": 0.9, "weight_decay": 0.1, "decoupled_weight_decay": True},
    "maximize": {"maximize": True, "momentum": 0.9, "weight_decay": 0.01},
    "zero_init": {"momentum": 0.9, "dampening": 0.9, "zero_init_momentum": True},
    "lr_tensor": {"lr": torch.tensor(0.03), "momentum": 0.9, "weight_decay": 0.01},
    "lr_tensor64": {"lr": torch.tensor([0.03], dtype=torch.float64)},
    "lr_zero": {"lr": 0.0, "momentum": 0.9},
    "all": {
        "lr": torch.tensor(0.03),
        "momentum": 0.8,
        "weight_decay": 0.02,
        "nesterov": True,
        "maximize": True,
        "zero_init_momentum": True,
    },
    "all-dampening": {
        "momentum": 0.8,
        "dampening": 0.5,
        "weight_decay": 0.1,
        "maximize": True,
        "decoupled_weight_decay": True,
    },
}

ADAMW_OPTIONS = {
    "default": {},
    "amsgrad": {"amsgrad": True},
    "beta1_below_half": {"betas": (0.3, 0.99)},  # torch's lerp takes its other branch
    "beta1_half": {"betas": (0.5, 0.9)},
    "beta1_zero": {"betas": (0.0, 0.9)},
    "no_decay": {"weight_decay": 0.0},
    "eps": {"eps": 0.1},
    "maximize": {"maximize": True},
    "lr_tensor": {"lr": torch.tensor(0.03, dtype=torch.float64)},  # of float32, torch rounds what it makes of it
    "all": {
        "lr": torch.tensor([0.03], dtype=torch.float64),
        "betas": (0.4, 0.8),
        "eps": 1e-4,
        "weight_decay": 0.2,
        "amsgrad": True,
        "maximize": True,
    },
}


def _rows(optimizer, table):
    name = optimizer.__name__.removeprefix("Fused").lower()
    return [pytest.param(optimizer, {"lr": LR} | row, id=f"{name}-{key}") for key, row in table.items()]


OPTIONS = _rows(FusedSGD, SGD_OPTIONS) + _rows(FusedAdamW, ADAMW_OPTIONS)

OPTIMIZERS = [  # one row for each rule, for what does not depend on the other options
    pytest.param(FusedSGD, {"lr": LR, "momentum": 0.9, "weight_decay": 0.01}, id="sgd"),
    pytest.param(FusedAdamW, {"lr": LR}, id="adamw"),
]

# Around every width of a vector, a tile and a chunk.
SMALL_SIZES = [0, 1, 7, 15, 16, 17, 31, 33, 63, 64, 65, 1000, 1023, 1024, 1025]
LARGE_SIZES = [65535, 65536, 65537]
SIZES = SMALL_SIZES + LARGE_SIZES

DTYPES = [  # of the parameter, of its gradient
    pytest.param(torch.float32, torch.float32, id="float32"),
    pytest.param(torch.float64, torch.float64, id="float64"),
    pytest.param(torch.bfloat16, torch.bfloat16, id="bfloat16"),
    pytest.param(torch.float16, torch.float16, id="float16"),
    pytest.param(torch.bfloat16, torch.float32, id="bfloat16-float32_grad"),
    pytest.param(torch.float16, torch.float32, id="float16-float32_grad"),
]


def contiguous(x):
    return x.contiguous()


def transposed(x):
    return x.transpose(0, -1).contiguous().transpose(0, -1)


def permuted(x):
    return x.permute(1, 3, 0, 2).contiguous().permute(2, 0, 3, 1)


def channels_last(x):
    return x.contiguous(memory_format=torch.channels_last)


def sliced(x):
    """Every second row of a tensor whose other rows, full of sevens, are nobody's to write."""
    storage = x.new_full((2 * x.shape[0], *x.shape[1:]), 7.0)
    storage[::2] = x
    return storage[::2]


def sliced_columns(x):
    storage = x.new_full((*x.shape[:-1], 3 * x.shape[-1]), 7.0)
    storage[..., ::3] = x
    return storage[..., ::3]


def expanded(x):
    return x[:1].expand(x.shape)


def same(x):
    return x


LAYOUTS = [  # shape, layout of the parameter, layout of the gradient
    pytest.param((4, 3, 5, 6), contiguous, contiguous, id="contiguous"),
    pytest.param((40, 30), transposed, transposed, id="transposed"),
    pytest.param((40, 30), transposed, contiguous, id="transposed-contiguous_grad"),
    pytest.param((40, 30), contiguous, transposed, id="contiguous-transposed_grad"),
    pytest.param((4, 3, 5, 6), permuted, permuted, id="permuted"),
    pytest.param((4, 3, 5, 6), permuted, channels_last, id="permuted-channels_last_grad"),
    pytest.param((4, 3, 5, 6), channels_last, channels_last, id="channels_last"),
    pytest.param((4, 3, 5, 6), channels_last, contiguous, id="channels_last-contiguous_grad"),
    pytest.param((4, 3, 5, 6), contiguous, channels_last, id="contiguous-channels_last_grad"),
    pytest.param((4, 3, 1, 1), channels_last, contiguous, id="strides_of_one_element_mean_nothing"),
    pytest.param((4, 3, 5, 6), sliced, contiguous, id="sliced"),
    pytest.param((4, 3, 5, 6), sliced, sliced, id="sliced-sliced_grad"),
    pytest.param((4, 3, 5, 6), sliced_columns, channels_last, id="sliced_columns-channels_last_grad"),
    pytest.param((4, 3, 5, 6), contiguous, sliced_columns, id="contiguous-sliced_columns_grad"),
    pytest.param((4, 3, 5, 6), contiguous, expanded, id="contiguous-expanded_grad"),
    pytest.param((40, 30), transposed, expanded, id="transposed-expanded_grad"),
    pytest.param((0, 5), transposed, contiguous, id="empty"),
    pytest.param((), same, same, id="0-dim"),
]


def every_third(step):
    return 0.5 ** (step // 3)


SCHEDULES = {
    "constant": schedules.constant(),
    "linear": schedules.linear(20, warmup_steps=5),
    "cosine": schedules.cosine(20, warmup_steps=3, final=0.1),
    "polynomial": schedules.polynomial(20, power=2.0),
    "inverse_sqrt": schedules.inverse_sqrt(4),
    "exponential": schedules.exponential(0.9, every=2),
    "staircase": schedules.staircase(1.2, 4, maximum=2.0),
    "wsd": schedules.wsd(20, 4, 8, decay="sqrt"),
    "uba": schedules.uba(20, phi=5.0, warmup_steps=2, final=0.01),
    "table": schedules.table([0.5, 1.0, 0.75, 0.1]),
    "warmup": schedules.warmup(5, schedules.inverse_sqrt(), start=0.1),
    "join": schedules.join([schedules.linear(6), schedules.cosine(10)], [8]),
    "product": schedules.product(schedules.linear(20), schedules.exponential(0.9)),
    "function": every_third,
}
if find_spec("scipy"):  # a machine with a GPU may have nothing but torch and pytest
    SCHEDULES["refined"] = schedules.refined([3.0, 2.0, 2.5, 2.0, 1.5, 1.4], total_steps=20)

TORCH_SCHEDULERS = {
    "StepLR": lambda optimizer: lr_scheduler.StepLR(optimizer, 7, gamma=0.3),
    "CosineAnnealingWarmRestarts": lambda optimizer: lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 9),
    "ReduceLROnPlateau": lambda optimizer: lr_scheduler.ReduceLROnPlateau(optimizer, patience=2, factor=0.5),
    "OneCycleLR": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=41),
    "SequentialLR": lambda optimizer: lr_scheduler.SequentialLR(
        optimizer,
        [lr_scheduler.LinearLR(optimizer, 0.1, total_iters=5), lr_scheduler.ExponentialLR(optimizer, 0.95)],
        [5],
    ),
}

CLOSED_LOOPS = {
    "alignment-lag0": schedules.alignment(kappa=0.3, lag=0),
    "alignment-lag1": schedules.alignment(kappa=0.3, bias=0.05, min_lr=1e-3, max_lr=0.3),
    "alignment-freeze": schedules.alignment(kappa=0.3, freeze_after=10),
    "alignment-linear": schedules.product(
        schedules.alignment(kappa=0.5, min_lr=0.04, max_lr=0.06), schedules.linear(30)
    ),
    "gala": schedules.gala(delta=0.1, max_lr=1.0, mode="consecutive"),
    "volsched": schedules.volsched(30, window=4, warmup_steps=5, warmup_start=0.1, sensitivity=0.5),
}
