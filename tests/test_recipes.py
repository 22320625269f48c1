"""The four regimes against the published numbers and, step by step, against the formulas written out."""

import math
import pickle
import warnings

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, SequentialSampler

from lrkernels import schedules
from lrkernels.batch_sizes import ScheduledBatchSampler, constant, exponential
from lrkernels.recipes import Recipe, self_tuning, sgdm

KINDS = ("constant_batch", "increasing_batch", "increasing_batch_and_lr", "increasing_batch_warmup")
BATCHES = [8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096]
RATES = [1.0, 1.1958132, 1.4299691, 1.7099759, 2.0448118, 2.4452128, 2.9240177, 3.4965789, 4.1812552, 5.0]


def starts_of(recipe, dataset_size, epochs):
    """Return the first step of every epoch, and the end."""
    starts = [0]
    for epoch in range(epochs):
        starts.append(starts[-1] + math.ceil(dataset_size / recipe.batch_sizes(epoch)))
    return starts


def by_epoch(recipe, dataset_size, epochs):
    """Return the multiplier of every epoch, of which each step must have the same."""
    starts = starts_of(recipe, dataset_size, epochs)
    assert starts[-1] == recipe.total_steps
    values = [recipe.schedule(start) for start in starts[:-1]]
    assert values == [recipe.schedule(end - 1) for end in starts[1:]]
    return values


@pytest.mark.parametrize("kind, steps", [*zip(KINDS, [117_300] + [374_760] * 3, strict=True)])
def test_published_runs(kind, steps):
    recipe = sgdm(kind, 50_000, 300)
    schedule, batch_sizes, total_steps = recipe
    assert recipe == (recipe.schedule, recipe.batch_sizes, recipe.total_steps)
    assert total_steps == schedule.total_steps == steps
    sizes = [batch_sizes(epoch) for epoch in range(0, 300, 30)]
    assert sizes == ([128] * 10 if kind == "constant_batch" else BATCHES)
    values = by_epoch(recipe, 50_000, 300)
    expected = {
        "increasing_batch_and_lr": [rate for rate in RATES for _ in range(30)],
        "increasing_batch_warmup": [rate for rate in RATES for _ in range(3)] + [5.0] * 270,
    }.get(kind, [1.0] * 300)
    assert values == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    "ratio, momentum, converges",
    [
        (2, 0.9, True),
        (5, 0.9, True),
        (10, 0.9, False),
        (10, 0.87, True),
        (1, 0.9, False),
        (600, 0, False),
        (500, 0, True),
    ],
)
def test_convergence_condition(ratio, momentum, converges):
    """Gamma is 1.08, 1.196, 1.2915; the bound is 1.2346 at .9, 1.3212 at .87, and growth, 2, at 0."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        recipe = sgdm("increasing_batch_and_lr", 50_000, 300, max_lr_ratio=ratio, momentum=momentum)
    assert by_epoch(recipe, 50_000, 300)[-1] == ratio
    messages = [(str(warning.message), warning.category, warning.filename) for warning in caught]
    if converges:
        assert messages == []
    else:
        ((message, category, filename),) = messages
        assert message.startswith("lrkernels: the rate grows by gamma = ") and "change max_lr_ratio" in message
        assert category is UserWarning and filename == __file__


# Formulas of the decays, as written: step t of T, epoch e of M.
DECAYS = {
    "constant": lambda t, T, e, M, final: 1.0,
    "inverse_sqrt": lambda t, T, e, M, final: 1 / math.sqrt(t + 1),
    "cosine": lambda t, T, e, M, final: final + (1 - final) / 2 * (1 + math.cos(math.pi * e / M)),
    "linear": lambda t, T, e, M, final: 1 - (1 - final) * t / T,
    "polynomial": lambda t, T, e, M, final: final + (1 - final) * (1 - t / T) ** 2,
}


@pytest.mark.parametrize("kind", KINDS[:2])
@pytest.mark.parametrize("decay", DECAYS)
@given(st.integers(1, 500), st.integers(2, 25), st.integers(1, 40), st.sampled_from([0.0, 0.1]))
def test_decays_follow_the_formulas(decay, kind, dataset_size, epochs, batch_size, final):
    recipe = sgdm(kind, dataset_size, epochs, batch_size=batch_size, lr_decay=decay, final=final, max_batch_size=64)
    starts = starts_of(recipe, dataset_size, epochs)
    T = recipe.total_steps
    assert T == starts[-1] == recipe.schedule.total_steps
    for e in range(epochs):
        for t in {starts[e], (starts[e] + starts[e + 1]) // 2, starts[e + 1] - 1}:
            assert recipe.schedule(t) == pytest.approx(DECAYS[decay](t, T, e, epochs, final), rel=1e-12)
    assert recipe.schedule(T + 1000) == recipe.schedule(T)


@given(st.integers(3, 60), st.integers(1, 20), st.floats(1.01, 20), st.integers(1, 3000))
def test_growing_rate_follows_the_formula_and_ends_at_the_maximum(epochs, every, ratio, dataset_size):
    assume(every < epochs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        recipe = sgdm("increasing_batch_and_lr", dataset_size, epochs, every=every, max_lr_ratio=ratio)
    gamma = ratio ** (every / (epochs - every))
    expected = [min(gamma ** (epoch // every), ratio) for epoch in range(epochs)]
    values = by_epoch(recipe, dataset_size, epochs)
    assert values == pytest.approx(expected, rel=1e-12)
    assert values[-1] == ratio
    assert recipe.batch_sizes == exponential(8, 2, every, 4096, epochs)


@pytest.mark.parametrize("decay", ["constant", "cosine"])
@given(st.integers(2, 12), st.integers(1, 11), st.integers(1, 20), st.sampled_from([0.0, 0.3]))
def test_warmup_follows_the_formula(decay, W, w, rest, final):
    assume(w < W)
    epochs, ratio = W + rest, 4.0
    recipe = sgdm(
        "increasing_batch_warmup",
        1000,
        epochs,
        warmup_epochs=W,
        warmup_every=w,
        max_lr_ratio=ratio,
        lr_decay=decay,
        final=final,
    )
    g = ratio ** (w / (W - w))
    rise = [min(g ** (e // w), ratio) for e in range(W)]
    fall = [final + (ratio - final) / 2 * (1 + math.cos(math.pi * e / rest)) for e in range(rest)]
    expected = rise + (fall if decay == "cosine" else [ratio] * rest)
    assert by_epoch(recipe, 1000, epochs) == pytest.approx(expected, rel=1e-12)


def test_settings_reach_the_batch_sizes():
    def sizes(*args, **kwargs):
        return sgdm(*args, **kwargs).batch_sizes

    assert sizes("constant_batch", 100, 5, batch_size=32) == constant(32)
    assert sizes("increasing_batch", 100, 40) == exponential(8, 2, 4, 4096, 40)
    assert sizes("increasing_batch", 100, 40, max_batch_size=None, growth=3, every=2) == exponential(8, 3, 2)
    assert sizes("increasing_batch", 100, 9, batch_size=4, max_batch_size=50) == exponential(4, 2, 1, 50, 9)


def test_power_and_drop_last():
    recipe = sgdm("constant_batch", 10, 2, batch_size=4, lr_decay="polynomial", power=3, drop_last=True)
    assert recipe.total_steps == 4
    assert [recipe.schedule(step) for step in range(5)] == [1, 0.75**3, 0.5**3, 0.25**3, 0]
    # Batches 2, 4, 8, 16 of 8 samples: 4, 2, 1 and, with drop_last, no step.
    recipe = sgdm("increasing_batch", 8, 4, batch_size=2, max_batch_size=16, lr_decay="cosine", drop_last=True)
    epochs = [0, 0, 0, 0, 1, 1, 2]
    expected = [(1 + math.cos(math.pi * epoch / 4)) / 2 for epoch in epochs]
    assert [recipe.schedule(step) for step in range(recipe.total_steps)] == pytest.approx(expected)


@pytest.mark.parametrize("kind", KINDS)
def test_recipes_are_values(kind):
    recipe = sgdm(kind, 640, 20, lr_decay="cosine" if kind != "increasing_batch_and_lr" else "constant")
    copy = pickle.loads(pickle.dumps(recipe))
    assert isinstance(copy, Recipe) and copy == recipe
    assert [copy.schedule(step) for step in range(50)] == [recipe.schedule(step) for step in range(50)]
    assert recipe != sgdm(kind, 641, 20) and isinstance(recipe.schedule, schedules.Schedule)


def test_a_training_loop_sees_the_rates_and_batches_of_each_epoch():
    schedule, batch_sizes, total_steps = sgdm(
        "increasing_batch_and_lr", 24, 4, batch_size=2, max_batch_size=16, max_lr_ratio=1.5
    )
    sampler = ScheduledBatchSampler(SequentialSampler(range(24)), batch_sizes)
    loader = DataLoader(torch.arange(24.0), batch_sampler=sampler)
    weight = torch.nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    seen = []
    for _ in range(4):
        epoch = set()
        for batch in loader:
            (weight * batch.mean()).backward()
            epoch.add((len(batch), round(optimizer.param_groups[0]["lr"], 7)))
            optimizer.step()
            scheduler.step()
        seen.append(epoch)
    assert scheduler.last_epoch == total_steps == 12 + 6 + 3 + 2
    assert seen == [{(2, 0.1)}, {(4, 0.1144714)}, {(8, 0.1310371)}, {(16, 0.15), (8, 0.15)}]


ERRORS = [
    (("big_batch", 10, 10), {}, "kind must be one of constant_batch, .*, got 'big_batch'"),
    (
        ("constant_batch", 10, 10),
        {"lr_decay": "step"},
        "lr_decay of constant_batch must be one of .*, got 'step'",
    ),
    (
        ("increasing_batch_and_lr", 10, 10),
        {"lr_decay": "linear"},
        "lr_decay of .*_and_lr must be one of constant, got",
    ),
    (
        ("increasing_batch_warmup", 10, 10),
        {"lr_decay": "linear"},
        "lr_decay of .* one of constant, cosine, got 'linear'",
    ),
    (
        ("increasing_batch_and_lr", 10, 10),
        {"max_lr_ratio": 0},
        "max_lr_ratio must be finite and above 0, got 0",
    ),
    (("increasing_batch_and_lr", 10, 10), {"momentum": 1}, "momentum must be at least 0 and below 1, got 1"),
    (("increasing_batch", 10, 5), {"every": 5}, "epochs must be larger than every=5, got 5; lower every"),
    (
        ("increasing_batch_and_lr", 10, 5),
        {"every": 5, "max_batch_size": None},
        "a rate cannot grow every 5 epochs within 5; lower the interval",
    ),
    (
        ("increasing_batch_warmup", 10, 50),
        {"warmup_epochs": 3, "warmup_every": 3},
        "a rate cannot grow every 3 epochs within 3; lower the interval",
    ),
    (
        ("increasing_batch_warmup", 10, 20),
        {"warmup_epochs": 20},
        "warmup_epochs must be below epochs=20, got 20",
    ),
    (("increasing_batch", 10, 10), {"max_batch_size": 0}, "maximum must be at least initial=8, got 0"),
    (("constant_batch", 10, 10), {"drop_last": True}, "the run has no step; .* or lower batch_size"),
    (("constant_batch", 0, 10), {}, "dataset_size must be at least 1, got 0"),
]


@pytest.mark.parametrize("args, kwargs, message", ERRORS, ids=[message[:50] for *_, message in ERRORS])
def test_errors_name_the_remedy(args, kwargs, message):
    with pytest.raises(ValueError, match="^lrkernels: " + message):
        sgdm(*args, **kwargs)


@pytest.mark.parametrize("total_steps, half", [(10, 5), (11, 5), (2, 1)])
def test_self_tuning(total_steps, half):
    recipe = self_tuning(total_steps)
    open_loop, closed_loop = schedules.split(recipe)
    assert closed_loop == schedules.alignment(freeze_after=half)
    last = total_steps - half
    expected = [1.0] * half + [1 - step / last for step in range(last)] + [0.0, 0.0]
    assert [open_loop(step) for step in range(total_steps + 2)] == pytest.approx(expected)
    assert open_loop.total_steps == total_steps
    assert pickle.loads(pickle.dumps(recipe)) == recipe


def test_self_tuning_passes_settings_on():
    _, closed_loop = schedules.split(self_tuning(100, kappa=0.3, bias=0.02, lag=0, max_lr=1.0))
    assert closed_loop == schedules.alignment(0.3, 0.02, 0, freeze_after=50, max_lr=1.0)
    with pytest.raises(ValueError, match=r"^lrkernels: total_steps must be at least 2, got 1"):
        self_tuning(1)
