"""Parameters of 16 bits: wider states, float32 masters, rounding at random; steps skipped or normalised."""

import copy
import math

import pytest
import torch
from conftest import assert_same_bits, gradients, parameters, set_grads, tensors, train

import lrkernels as lrk
from lrkernels import FusedAdamW, FusedSGD, schedules
from lrkernels.reference import ReferenceAdamW, ReferenceSGD

SHAPES = [(33, 5), (7,), (), (1025,)]
HALVES = pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
PAIRS = pytest.mark.parametrize(
    ("fused", "reference", "options"),
    [
        pytest.param(FusedSGD, ReferenceSGD, {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01}, id="sgd"),
        pytest.param(FusedAdamW, ReferenceAdamW, {"lr": 0.01, "amsgrad": True}, id="adamw"),
    ],
)
MODES = pytest.mark.parametrize(
    "mode",
    [
        {"state_dtype": torch.float32},
        {"state_dtype": torch.float32, "master_weights": True},
        {"master_weights": True},
        {"state_dtype": torch.float32, "stochastic_rounding": True},
        {"stochastic_rounding": True, "max_grad_norm": 0.5, "skip_nonfinite": True},
        {"master_weights": True, "schedule": schedules.alignment(kappa=0.1), "track": "alignment"},
    ],
    ids=lambda mode: "-".join(mode),
)


def kept(optimizer, params):
    return [{k: v for k, v in optimizer.state[p].items() if k != "step"} for p in params]


@PAIRS
@MODES
@HALVES
def test_low_precision_is_the_reference_bit_for_bit(fused, reference, options, mode, half, backend):
    params = parameters(SHAPES, half)
    copies = [p.detach().clone().requires_grad_() for p in params]
    ours, theirs = fused(params, **options, **mode, backend=backend), reference(copies, **options, **mode)
    grads = gradients(SHAPES, 12, half)
    train(ours, params, grads)
    train(theirs, copies, grads)
    assert_same_bits(params, copies)
    assert_same_bits(kept(ours, params), kept(theirs, copies))
    for name in theirs.stats:
        assert float(ours.stats[name]) == pytest.approx(theirs.stats[name], rel=1e-6, abs=1e-9), name


@PAIRS
@HALVES
def test_states_have_the_dtype_asked_for(fused, reference, options, half, backend):
    for wanted in (None, torch.float32):
        params = parameters(SHAPES, half)
        optimizer = fused(params, **options, state_dtype=wanted, backend=backend)
        train(optimizer, params, gradients(SHAPES, 1, half))
        names = {key: value.dtype for key, value in optimizer.state[params[0]].items() if key != "step"}
        assert names and set(names.values()) == {wanted or half}


@PAIRS
@HALVES
def test_masters_train_as_float32_parameters_do(fused, reference, options, half, backend):
    """The master follows exactly the run of a float32 parameter that gets the same gradients."""
    params = parameters(SHAPES, half)
    wide = [p.detach().float().requires_grad_() for p in params]
    grads = gradients(SHAPES, 10, half)
    optimizer = fused(params, **options, master_weights=True, state_dtype=torch.float32, backend=backend)
    train(optimizer, params, grads)
    train(fused(wide, **options, backend=backend), wide, [[g.float() for g in step] for step in grads])
    assert_same_bits([optimizer.state[p]["master_param"] for p in params], wide)
    assert_same_bits(params, [w.to(half) for w in wide])


def test_float32_parameters_need_no_master(backend):
    params = parameters([(5,)], torch.float32) + parameters([(5,)], torch.bfloat16, seed=3)
    optimizer = FusedSGD(params, momentum=0.9, master_weights=True, backend=backend)
    train(optimizer, params, [[torch.ones(5), torch.ones(5, dtype=torch.bfloat16)]])
    assert ["master_param" in optimizer.state[p] for p in params] == [False, True]


def test_small_updates_are_lost_to_the_nearest_value_only(backend):
    """A thousand steps of a 40th of the spacing: nearest stays at 1, at random and masters arrive at 0.9."""
    arrived = {}
    for name, mode in [
        ("nearest", {}),
        ("random", {"stochastic_rounding": True}),
        ("master", {"master_weights": True}),
    ]:
        p = torch.ones(4096, dtype=torch.bfloat16, requires_grad=True)
        optimizer = FusedSGD([p], lr=1e-4, backend=backend, **mode)
        for _ in range(1000):
            p.grad = torch.ones_like(p)
            optimizer.step()
        arrived[name] = p.detach().double().mean().item()
    assert arrived["nearest"] == 1.0
    assert arrived["master"] == pytest.approx(0.9, abs=0.004)  # within the spacing
    assert arrived["random"] == pytest.approx(0.9, abs=0.002)  # the mean of 4096


@PAIRS
def test_rounding_at_random_repeats_itself(fused, reference, options, backend):
    runs = []
    for _ in range(2):
        params = parameters(SHAPES, torch.bfloat16)
        train(fused(params, **options, stochastic_rounding=True, backend=backend), params, gradients(SHAPES, 5))
        runs.append(params)
    assert_same_bits(*runs)


@PAIRS
@MODES
def test_a_checkpoint_goes_on_bit_for_bit(fused, reference, options, mode, backend, tmp_path):
    grads = gradients(SHAPES, 9, torch.bfloat16)
    whole = parameters(SHAPES, torch.bfloat16)
    train(fused(whole, **options, **mode, backend=backend), whole, grads)

    params = parameters(SHAPES, torch.bfloat16)
    first = fused(params, **options, **mode, backend=backend)
    train(first, params, grads[:4])
    torch.save((first.state_dict(), params), tmp_path / "run.pt")
    saved, params = torch.load(tmp_path / "run.pt", weights_only=False)
    untouched = copy.deepcopy(saved)
    second = fused(params, **options, **mode, backend=backend)
    second.load_state_dict(saved)
    train(second, params, grads[4:])
    assert_same_bits(params, whole)
    assert_same_bits(tensors(saved), tensors(untouched))


def test_masters_are_not_thrown_away(backend):
    params = parameters(SHAPES, torch.bfloat16)
    optimizer = FusedSGD(params, master_weights=True, backend=backend)
    train(optimizer, params, gradients(SHAPES, 1, torch.bfloat16))
    other = FusedSGD(parameters(SHAPES, torch.bfloat16), backend=backend)
    with pytest.raises(ValueError, match=r"lrkernels: the checkpoint has float32 masters.*master_weights=True"):
        other.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"state_dtype": torch.int8}, "state_dtype must be None or one of"),
        ({"master_weights": True, "stochastic_rounding": True}, "choose one"),
        ({"normalize": True, "max_grad_norm": 1.0}, "nothing to clip"),
        ({"normalize": True, "nesterov": True, "momentum": 0.9}, "nesterov must be False"),
        ({"normalize": True, "weight_decay": 0.1}, "decoupled_weight_decay=True"),
        ({"normalize": True, "momentum": 0.9, "dampening": 0.5}, "zero_init_momentum=True"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=f"lrkernels: .*{message}"):
        FusedSGD(parameters([(3,)]), **options)


# ----------------------------------------------------------------------------------------------------------------------
# skip_nonfinite


@PAIRS
@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("prev_grad", ["store", "swap"])
@pytest.mark.parametrize("bad", [0, 3])
def test_a_step_that_is_not_finite_changes_nothing(fused, reference, options, value, prev_grad, bad, backend):
    """The run is the one that never saw the bad batch, at the first step too; only the count of skips differs."""
    more = {"skip_nonfinite": True, "track": "alignment", "prev_grad": prev_grad, "backend": backend}
    more["schedule"] = schedules.product(schedules.alignment(kappa=0.1), schedules.linear(20))
    grads = gradients(SHAPES, 6)
    clean, params = parameters(SHAPES), parameters(SHAPES)
    calm, ours = fused(clean, **options, **more), fused(params, **options, **more)
    theirs = reference([p.detach().clone().requires_grad_() for p in params], **options, **more)
    for step, given in enumerate(grads):
        if step == bad:
            broken = [g.clone() for g in given]
            broken[-1][17] = value
            before = copy.deepcopy((params, ours.state_dict()["state"]))
            for optimizer in (ours, theirs):
                set_grads(optimizer.param_groups[0]["params"], broken)
                optimizer.step()
            assert_same_bits(tensors([params, ours.state_dict()["state"]]), tensors(list(before)))
            assert float(ours.stats["skipped"]) == theirs.stats["skipped"] == 1
            if prev_grad == "swap":
                ours.zero_grad()
        for optimizer in (calm, ours, theirs):
            set_grads(optimizer.param_groups[0]["params"], given)
            optimizer.step()
            optimizer.zero_grad()
    assert_same_bits(params, clean)
    assert_same_bits(params, theirs.param_groups[0]["params"])
    assert float(ours.stats["step"]) == 6
    here, there = ours.history(), calm.history()
    assert all((here[name] == there[name]).all() for name in here if name != "skipped")


# ----------------------------------------------------------------------------------------------------------------------
# normalize

NORMALIZED = {
    "plain": {},
    "momentum": {"momentum": 0.9},
    "paper": {"momentum": 0.9, "dampening": 0.9, "zero_init_momentum": True},
    "decay-maximize": {
        "momentum": 0.8,
        "weight_decay": 0.1,
        "decoupled_weight_decay": True,
        "maximize": True,
        "dampening": 0.3,
        "zero_init_momentum": True,
    },
}


@pytest.mark.parametrize("options", NORMALIZED.values(), ids=NORMALIZED)
def test_normalised_steps_are_the_formula(options, backend):
    """M <- momentum m + (1 - dampening) g; p <- p - lr m / |m|, written out in float64; a gradient that comes late."""
    params = parameters(SHAPES, torch.float64)
    x = [p.detach().clone() for p in params]
    m = [torch.zeros_like(p) for p in x]
    optimizer = FusedSGD(params, lr=0.1, normalize=True, **options, backend=backend)
    momentum, dampening = options.get("momentum", 0.0), options.get("dampening", 0.0)
    sign, decay = -1.0 if options.get("maximize") else 1.0, options.get("weight_decay", 0.0)
    for step, given in enumerate(gradients(SHAPES, 8, torch.float64)):
        given = [None if i == 1 and step < 3 else g for i, g in enumerate(given)]
        set_grads(params, given)
        optimizer.step()
        here = [i for i, g in enumerate(given) if g is not None]
        for i in here:
            m[i] = momentum * m[i] + (1 - dampening if momentum else 1.0) * sign * given[i]
        length = math.sqrt(sum(float(m[i].square().sum()) for i in here))
        for i in here:
            x[i] = x[i] * (1 - 0.1 * decay) - 0.1 * m[i] / length
        torch.testing.assert_close(params, x, rtol=1e-12, atol=1e-14)
        if decay == 0:
            assert float(optimizer.stats["lr"]) == 0.1


@pytest.mark.parametrize("options", NORMALIZED.values(), ids=NORMALIZED)
@pytest.mark.parametrize(
    "schedule",
    [None, schedules.alignment(kappa=0.1), schedules.gala(mode="consecutive"), schedules.linear(50)],
    ids=["none", "alignment", "gala", "linear"],
)
def test_normalised_steps_are_the_reference_within_rounding(options, schedule, backend):
    params = parameters(SHAPES)
    copies = [p.detach().clone().requires_grad_() for p in params]
    ours = FusedSGD(params, lr=0.1, normalize=True, schedule=schedule, **options, backend=backend)
    theirs = ReferenceSGD(copies, lr=0.1, normalize=True, schedule=schedule, **options)
    grads = gradients(SHAPES, 10)
    train(ours, params, grads)
    train(theirs, copies, grads)
    torch.testing.assert_close(params, copies, rtol=1e-5, atol=1e-6)
    assert float(ours.stats["lr"]) == pytest.approx(theirs.stats["lr"], rel=1e-4)


def test_a_zero_gradient_moves_nothing_when_normalised(backend):
    (p,) = parameters([(4,)])
    before = p.detach().clone()
    optimizer = FusedSGD([p], lr=0.1, momentum=0.9, normalize=True, backend=backend)
    p.grad = torch.zeros_like(p)
    optimizer.step()
    assert_same_bits([p], [before])


def test_normalised_groups_go_together(backend):
    a, b = parameters([(3,), (4,)])
    with pytest.raises(ValueError, match="lrkernels: normalize=True needs the same momentum and dampening"):
        FusedSGD([{"params": [a], "momentum": 0.9}, {"params": [b]}], normalize=True)
    optimizer = FusedSGD([{"params": [a]}, {"params": [b]}], momentum=0.9, normalize=True, backend=backend)
    optimizer.param_groups[0]["momentum"] = 0.5
    a.grad, b.grad = torch.ones_like(a), torch.ones_like(b)
    before = a.detach().clone()
    with pytest.raises(ValueError, match="same momentum and dampening"):
        optimizer.step()
    assert_same_bits([a], [before])


def test_gala_finds_the_rate_of_normalised_steps(backend):
    """On a quadratic, full gradient: from a far too small first rate it gets to the minimum's neighbourhood."""
    curvature = torch.tensor([1.0, 4.0, 9.0])
    p = torch.tensor([3.0, 2.0, 1.0], requires_grad=True)
    optimizer = FusedSGD([p], lr=1e-4, normalize=True, schedule=lrk.schedules.gala(mode="consecutive"), backend=backend)
    start = float((curvature * p.detach().square()).sum() / 2)
    for _ in range(200):
        p.grad = curvature * p.detach()
        optimizer.step()
    assert float((curvature * p.detach().square()).sum() / 2) < 0.05 * start
