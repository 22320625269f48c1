"""What the benchmarks run over, as tables: a comparison is one row of CASES. Data only."""

from dataclasses import dataclass, field
from typing import Any

from lrkernels import schedules


def resnet50_shapes() -> list[tuple[int, ...]]:
    shapes: list[tuple[int, ...]] = [(64, 3, 7, 7), (64,), (64,)]
    inputs = 64
    for blocks, width, outputs in ((3, 64, 256), (4, 128, 512), (6, 256, 1024), (3, 512, 2048)):
        for block in range(blocks):
            kernels = [(width, inputs, 1, 1), (width, width, 3, 3), (outputs, width, 1, 1)]
            if block == 0:
                kernels.append((outputs, inputs, 1, 1))
            for kernel in kernels:
                shapes += [kernel, kernel[:1], kernel[:1]]  # and its batch norm
            inputs = outputs
    return [*shapes, (1000, 2048), (1000,)]


def gpt2_shapes(width: int = 768, layers: int = 12) -> list[tuple[int, ...]]:
    norm = [(width,), (width,)]
    linears = [(width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)]
    attention, projection, widen, narrow = ([weight, weight[1:]] for weight in linears)
    layer = [*norm, *attention, *projection, *norm, *widen, *narrow]
    return [(50257, width), (1024, width), *layer * layers, *norm]


@dataclass(frozen=True)
class Model:
    """The shapes of a model's parameters, and how many pairs of turns make a steady median."""

    shapes: list[tuple[int, ...]]
    pairs: int
    steps: int = 1  # of a turn; more than one are made on the same gradients, in a row


MODELS = {
    "resnet50": Model(resnet50_shapes(), pairs=40),  # 161 tensors, 25.6 M
    "gpt2": Model(gpt2_shapes(), pairs=10),  # 148 tensors, 124.4 M
    "small": Model([(64,)] * 500, pairs=400),  # nothing but the cost of a call, as after a backward pass
    "repeated": Model([(64,)] * 500, pairs=40, steps=20),  # the same once everything is in the caches
    "large": Model([(32 << 20,)], pairs=30),  # one tensor, nothing but memory traffic
}

HYPERS: dict[str, dict[str, Any]] = {
    "sgd": {"lr": 1e-3, "momentum": 0.9, "weight_decay": 5e-4},
    "adamw": {"lr": 1e-3, "weight_decay": 5e-4},
}


@dataclass(frozen=True)
class Case:
    """Ours against one of run.BASELINES, on the same shapes, gradients and hyper-parameters."""

    id: str
    model: str
    baseline: str
    mark: float | None  # how many times as fast as the baseline it must be; None: no promise
    bytes: int  # per float32 parameter: what the method has to move at least
    ours: dict[str, Any] = field(default_factory=dict)
    optimizer: str = "sgd"


SCHEDULED = {"schedule": schedules.linear(total_steps=1_000_000)}  # so long that both sides make equal steps
WATCHED = {"track": ("grad_norm", "direction")}
CLIPPED = {"max_grad_norm": 1.0}
STORE = {"track": ("alignment",), "prev_grad": "store"}
SWAP = {"track": ("alignment",), "prev_grad": "swap"}

CASES = [
    Case("resnet50-plain", "resnet50", "plain", 1.0, 20, SCHEDULED),
    Case("resnet50-watched", "resnet50", "plain", 0.95, 20, WATCHED),
    Case("resnet50-watched-parts", "resnet50", "direction", 2.4, 20, WATCHED),
    Case("resnet50-watched-flat", "resnet50", "direction_flat", None, 20, WATCHED),
    Case("resnet50-clip", "resnet50", "clip", 1.6, 24, CLIPPED),
    Case("resnet50-store", "resnet50", "previous", 2.0, 28, STORE),
    Case("resnet50-store-flat", "resnet50", "previous_flat", None, 28, STORE),
    Case("resnet50-swap", "resnet50", "previous", 2.2, 24, SWAP),
    Case("resnet50-swap-flat", "resnet50", "previous_flat", None, 24, SWAP),
    Case("small-plain", "small", "plain", 5.0, 20, SCHEDULED),
    Case("small-plain-foreach", "small", "plain_foreach", None, 20, SCHEDULED),
    Case("small-watched", "small", "direction", 20.0, 20, WATCHED),
    Case("small-watched-flat", "small", "direction_flat", None, 20, WATCHED),
    Case("small-clip", "small", "clip", 20.0, 24, CLIPPED),
    Case("small-store", "small", "previous", 20.0, 28, STORE),
    Case("small-store-flat", "small", "previous_flat", None, 28, STORE),
    Case("small-swap", "small", "previous", 20.0, 24, SWAP),
    Case("small-swap-flat", "small", "previous_flat", None, 24, SWAP),
    Case("repeated-plain", "repeated", "plain", 5.0, 20, SCHEDULED),
    Case("repeated-watched", "repeated", "direction", 20.0, 20, WATCHED),
    Case("repeated-clip", "repeated", "clip", 20.0, 24, CLIPPED),
    Case("repeated-store", "repeated", "previous", 20.0, 28, STORE),
    Case("repeated-swap", "repeated", "previous", 20.0, 24, SWAP),
    Case("adamw-resnet50-plain", "resnet50", "plain", 1.0, 28, SCHEDULED, "adamw"),
    Case("adamw-resnet50-watched", "resnet50", "plain", 1.0, 28, WATCHED, "adamw"),
    Case("adamw-small-plain", "small", "plain", 1.0, 28, SCHEDULED, "adamw"),
    Case("adamw-small-watched", "small", "plain", 1.0, 28, WATCHED, "adamw"),
    Case("gpt2-plain", "gpt2", "plain", None, 20, SCHEDULED),
    Case("gpt2-watched", "gpt2", "plain", None, 20, WATCHED),
    Case("large-plain", "large", "plain", None, 20, SCHEDULED),
    Case("large-watched", "large", "plain", None, 20, WATCHED),
]

# Peak memory, on resnet50: what is done, who does it ("ours", or one of run.BASELINES), the optimizer, our arguments.
MEMORY: list[tuple[str, str, str, dict[str, Any]]] = [
    ("plain step", "ours", "sgd", SCHEDULED),
    ("plain step", "plain", "sgd", {}),
    ("plain step", "plain_foreach", "sgd", {}),
    ("clip", "ours", "sgd", CLIPPED),
    ("clip", "clip", "sgd", {}),
    ("norm and direction", "ours", "sgd", WATCHED),
    ("norm and direction", "direction", "sgd", {}),
    ("previous gradient", "ours, store", "sgd", STORE),
    ("previous gradient", "ours, bfloat16", "sgd", STORE | {"prev_grad": "bfloat16"}),
    ("previous gradient", "ours, swap", "sgd", SWAP),
    ("previous gradient", "previous", "sgd", {}),
    ("previous gradient", "previous_flat", "sgd", {}),
    ("plain step", "ours", "adamw", SCHEDULED),
    ("plain step", "plain", "adamw", {}),
    ("plain step", "plain_foreach", "adamw", {}),
]
