"""What all test files share: backends, seeds, the steps from a case to tensors to compare, and what notes a wait."""

import copy
import functools
import itertools

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from lrkernels import FusedAdamW, FusedSGD, ops

try:
    import hypothesis

    hypothesis.settings.register_profile("lrkernels", deadline=None, derandomize=True)
    hypothesis.settings.load_profile("lrkernels")
except ImportError:  # a machine with a GPU may have nothing but pytest; the tests marked gpu do without
    hypothesis = None
pytest.register_assert_rewrite("jobs", "processes")  # or their failures would not say what was compared
torch.set_num_threads(1)  # most tensors here are small; a test of its own asks for more

BACKENDS = [ops.EAGER] if ops._C is None else [ops.NATIVE, ops.EAGER]
TORCH = {FusedSGD: torch.optim.SGD, FusedAdamW: torch.optim.AdamW}


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def failures(request, tmp_path_factory):
    """What each case of a world raised, of those that pytest has selected; they run once."""
    import processes  # needs what is here

    items = request.session.items
    return functools.cache(lambda world: processes.failures_of(world, items, tmp_path_factory.mktemp(f"world{world}")))


def random_tensors(shapes, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def parameters(shapes, dtype=torch.float32, layout=torch.clone, seed=0):
    return [torch.nn.Parameter(layout(x)) for x in random_tensors(shapes, dtype, seed)]


def gradients(shapes, steps, dtype=torch.float32, layout=torch.clone, seed=1):
    """One list of gradients for each step; they agree somewhat from step to step."""
    common = random_tensors(shapes, dtype, seed)
    noise = (random_tensors(shapes, dtype, seed + 1 + step) for step in range(steps))
    return [[layout(c + n) for c, n in zip(common, row, strict=True)] for row in noise]


def set_grads(params, grads):
    for p, grad in zip(params, grads, strict=True):
        if grad is not None and grad.dtype != p.dtype:
            p.grad_dtype = grad.dtype
        p.grad = grad


def train(optimizer, params, grads, schedulers=()):
    """Step once for each list of gradients."""
    for row in grads:
        set_grads(params, row)
        optimizer.step()
        for scheduler in schedulers:
            scheduler.step()
    return optimizer


def fused(kind, params, options, **more):
    """Make an optimizer from a row of a table, whose tensors stay as they are."""
    return kind(params, **copy.deepcopy(options), **more)


class TorchLoop:
    """torch.optim's own for-loop on float32 or float64 copies; 16-bit parameters and states are rounded once a step."""

    def __init__(self, kind, params, options):
        options = copy.deepcopy(options)
        self.decoupled = options.pop("decoupled_weight_decay", False)
        self.zero_init = options.pop("zero_init_momentum", False)
        self.decay = options.pop("weight_decay", 0.0) if self.decoupled else 0.0
        self.params = params
        wide = [torch.float64 if p.dtype == torch.float64 else torch.float32 for p in params]
        self.copies = [p.detach().to(dtype, copy=True) for p, dtype in zip(params, wide, strict=True)]
        self.optimizer = TORCH[kind](self.copies, foreach=False, **options)

    def step(self):
        state = self.optimizer.state
        for p, c in zip(self.params, self.copies, strict=True):
            c.grad = None if p.grad is None else p.grad.to(c.dtype)
            if c.grad is not None and self.decoupled:
                c.mul_(1.0 - self.optimizer.param_groups[0]["lr"] * self.decay)
            if c.grad is not None and self.zero_init and not state[c]:
                state[c]["momentum_buffer"] = torch.zeros_like(c)
        self.optimizer.step()
        for p, c in zip(self.params, self.copies, strict=True):
            for key, value in state[c].items():
                if key != "step" and value is not None:
                    value.copy_(value.to(p.dtype))
            p.data.copy_(c)
            c.copy_(p.data)

    def states(self):
        rows = [(p, self.optimizer.state[c]) for p, c in zip(self.params, self.copies, strict=True)]
        return [{key: value.to(p.dtype) for key, value in row.items() if value is not None} for p, row in rows]


def states(optimizer, params):
    """Return what a step left in each parameter's state, by torch's names."""
    return [
        {key: value.clone() for key, value in optimizer.state[p].items() if key not in ("step", "prev_grad")}
        for p in params
    ]


def tensors(tree):
    """Return the tensors of nested lists and dicts, in order."""
    if isinstance(tree, torch.Tensor):
        return [tree.detach()]
    if isinstance(tree, dict):
        return tensors([tree[key] for key in sorted(tree, key=str)])
    if isinstance(tree, list | tuple):
        return list(itertools.chain.from_iterable(map(tensors, tree)))
    return []


def bits(tree):
    """Return the bits of every tensor: NaN equals itself, -0 is not 0."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return [t.contiguous().view(integers[t.element_size()]).tolist() for t in tensors(tree)]


def everything(optimizer, params):
    """Return all that a refused step must leave as it is: parameters, their states, and what else there is."""
    states = [dict(optimizer.state[p]) if p in optimizer.state else {} for p in params]
    counts = [optimizer._counts[p] for p in params if p in optimizer._counts]
    kept = [grad for grad in optimizer._kept.grads if grad is not None]
    controller = optimizer._controller
    return bits(params), bits(states), bits([counts, kept, controller.control, controller.history])


def assert_same_bits(got, want):
    got, want = tensors(got), tensors(want)
    assert [(t.dtype, t.shape) for t in got] == [(t.dtype, t.shape) for t in want]
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
        unequal = a.contiguous().view(integer) != b.contiguous().view(integer)
        assert not unequal.any(), (
            f"tensor {i}: {unequal.sum()} of {a.numel()} differ, {a[unequal][:3]} {b[unequal][:3]}"
        )


def assert_close(got, want, rtol, atol=0.0):
    torch.testing.assert_close(tensors(got), tensors(want), rtol=rtol, atol=atol)


class Reads(TorchDispatchMode):
    """Notes every operation that waits for a tensor's value."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "_local_scalar_dense" in str(func) or "nonzero" in str(func):
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


WAITS = {"item", "tolist", "numpy", "cpu", "is_nonzero", "__float__", "__int__", "__bool__", "__index__", "__array__"}


class Waits(TorchFunctionMode):
    """Counts what would wait for a device: values that come to the host."""

    count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.count += getattr(func, "__name__", "") in WAITS
        return func(*args, **(kwargs or {}))
