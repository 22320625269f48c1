"""The references: the papers' checked numbers, parity with torch, and what a step must and must not touch."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from scipy.ndimage import median_filter
from torch import nn

from lrkernels import schedules
from lrkernels.closed_loop import AlignmentSchedule, GalaSchedule, VolSchedule
from lrkernels.closures import gradients_at
from lrkernels.reference import (
    Alignment,
    Gala,
    ReferenceAdamW,
    ReferenceSGD,
    VolSched,
    alignment_lr,
    chebyshev_steps,
    clip_factor,
    cosine,
    gala_lr,
    last_iterate_bound,
    linear_decay,
    refined,
    running_median,
    schedule_from_weights,
    sgdm,
    uba,
    uba_angle,
    uba_shape,
    volsched_multiplier,
)

SIGNAL = [0.01, 0.05, 0.03, 0.08, 0.06, 0.10, 0.12, 0.11, 0.15, 0.14, 0.18, 0.20]


def close(actual, expected, rel=1e-6):
    np.testing.assert_allclose(np.asarray(actual, dtype=np.float64), expected, rtol=rel, atol=1e-9)


class Quadratic:
    """f = x'Ax/2, A = diag(1, 4), from (1, 1): the problem of the checked runs."""

    A = torch.tensor([1.0, 4.0], dtype=torch.float64)

    def __init__(self, optimizer, dtype=torch.float64, **kwargs):
        self.x = nn.Parameter(torch.ones(2, dtype=dtype))
        self.optimizer = optimizer([self.x], **kwargs)

    def closure(self):
        self.optimizer.zero_grad()
        loss = (self.x * self.x * self.A.to(self.x.dtype)).sum() / 2
        loss.backward()
        return loss

    def run(self, steps):
        for _ in range(steps):
            self.optimizer.step(self.closure)
        return self.optimizer.history()


def parameters(dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(3, 5), (7,), (), (2, 1, 3)]
    return [nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype)) for s in shapes]


def set_gradients(params, step, scale=1.0):
    """The same pseudo-random gradients for every optimizer, with a pull to 0 so that runs stay bounded."""
    generator = torch.Generator().manual_seed(1000 + step)
    for p in params:
        noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        p.grad = ((noise + 0.3 * p.detach().double()) * scale).to(p.dtype)


# ---- Linear decay and refinement ----


def test_refined_checked_numbers():
    G = [8, 4, 2, 1, 1, 1, 1, 2, 1, 0.5]
    expected = [0.0181107955, 0.0719696970, 0.2803030303, 1, 0.8787878788, 0.7575757576, 0.6363636364]
    close(refined(G, smoothing=0.0), [*expected, 0.1515151515, 0.4848484848, 0])
    close(refined([3.0] * 10), [1 - t / 9 for t in range(10)])
    close(refined([1, 2], norm="l1", smoothing=0), [1, 0])


def test_refined_l1_weights_by_the_first_power():
    w = 1 / np.array([8.0, 4, 2, 1, 3, 1, 0.5])
    s = schedule_from_weights(w.tolist())
    close(refined(1 / w, norm="l1", smoothing=0), np.array(s) / max(s))


def test_equal_weights_decay_linearly_and_the_bound_is_dg_over_sqrt_t():
    T, D, G = 20, 3.0, 0.5
    w = [D / (G * math.sqrt(T))] * T
    close(schedule_from_weights(w), [w[0] * linear_decay(t + 1, T) for t in range(T)])
    assert last_iterate_bound(w, [G] * T, D) == pytest.approx(D * G / math.sqrt(T))


@pytest.mark.parametrize(("T", "tau"), [(1, 0.1), (7, 1.0), (50, 0.1), (101, 0.33)])
def test_running_median_edges(T, tau):
    G = np.random.default_rng(T).exponential(size=T)
    width = 2 * (int(tau * T) // 2) + 1
    padded = np.pad(G, (0, 2 * width), mode="reflect")
    assert running_median(G, tau) == median_filter(padded, width, mode="nearest")[:T].tolist()


def test_refined_odd_inputs():
    assert refined([5.0]).tolist() == [1.0]
    assert refined([5.0], 3).tolist() == [1.0, 1.0, 1.0]
    close(refined([1.0] * 3, 5), [1, 0.75, 0.5, 0.25, 0])
    with pytest.warns(UserWarning, match="dropped 2 non-finite"):
        close(refined([1, math.nan, 1, math.inf, 1], smoothing=0), [1, 0.5, 0])
    with pytest.warns(UserWarning, match="degenerate"):
        close(refined([1, 1, 0, 1], smoothing=0), [1, 1, 1, 0])
    with pytest.raises(ValueError, match="finite"):
        refined([math.nan])


# ---- UBA ----

UBA = {
    0.5: [
        1, 0.99376768, 0.97428549, 0.93905174, 0.88341875, 0.8, 0.67860708, 0.50943473, 0.29690912, 0.09119208, 0
    ],
    2.0: [1, 0.97552826, 0.9045085, 0.79389263, 0.6545085, 0.5, 0.3454915, 0.20610737, 0.0954915, 0.02447174, 0],
}  # fmt: skip


@pytest.mark.parametrize("phi", UBA)
def test_uba_checked_numbers(phi):
    close([uba(t, 10, phi) for t in range(11)], UBA[phi])
    assert uba(5, 10, phi) == pytest.approx(2 / (2 + phi))
    assert np.mean([uba_shape(math.pi * u, phi) for u in np.linspace(0, 1, 20001)]) == pytest.approx(
        1 / (1 + math.sqrt(phi / 2)), abs=1e-4
    )
    assert uba(25, 10, phi, lr_max=3.0, lr_min=0.5) == 0.5


def test_uba_tangent_form_and_refusal():
    for theta in (0.0, 0.3, 1.5, 3.0):
        assert uba_shape(theta, 0.7) == pytest.approx(1 / (1 + 0.35 * math.tan(theta / 2) ** 2), rel=1e-12)
    with pytest.raises(ValueError, match="phi"):
        uba_shape(1.0, 0.0)


def test_uba_at_the_nodes_is_the_minimax_schedule():
    mu, L, T = 0.5, 8.0, 6
    steps = [uba(t, T, 2 * L / mu, lr_max=1 / mu, lr_min=1 / L, offset=0.5) for t in range(T)]
    close(steps, chebyshev_steps(mu, L, T), rel=1e-12)
    worst = max(abs(math.prod(1 - s * c for s in steps)) for c in np.linspace(mu, L, 2001))
    k = (L + mu) / (L - mu)
    assert worst == pytest.approx(1 / math.cosh(T * math.acosh(k)), rel=1e-6)  # 1 / |Chebyshev polynomial|


def test_uba_phases_repeat_the_cycle():
    values = [uba(t, 12, 2.0, phases=3) for t in range(13)]
    close(values[:12], [uba(t % 4, 4, 2.0) for t in range(12)])
    assert values[12] == pytest.approx(0.0)
    assert all(0 <= uba_angle(t, 10, 0.5, 3) <= math.pi for t in range(12))


# ---- VolSched ----


def test_volsched_multiplier_checked_numbers():
    assert volsched_multiplier(SIGNAL[:10], 4, 0.05) == pytest.approx(1.11391628331, rel=1e-9)
    assert volsched_multiplier(SIGNAL[:10], 4, 1.0) == pytest.approx(2.2276403248, rel=1e-9)
    rho = 3.413166063
    assert volsched_multiplier(SIGNAL[:10], 4, 0.3) == pytest.approx(1 + math.log(1 + 0.3 * (rho - 1)), rel=1e-9)
    assert volsched_multiplier([0.3] * 10, 4) == 1.0
    assert volsched_multiplier(SIGNAL[:4], 4) == 1.0
    assert volsched_multiplier([*SIGNAL[:6], math.nan], 4) == 1.0


def test_volsched_wild_now_lowers_the_rate():
    calm_then_wild = [0.5, 0.51, 0.5, 0.51, 0.5, 0.51, 0.1, 0.9, 0.2, 0.8]
    assert volsched_multiplier(calm_then_wild, 4, 0.5) < 1.0


VOLSCHED_TRACE = [0.1] * 4 + [0.075] * 4 + [0.0264189849] * 4 + [0.0001] * 6


def test_volsched_checked_trace():
    rule = VolSched(0.1, total_steps=12, window=4, min_lr=1e-4)
    close([rule.update(x) for x in [*SIGNAL, *SIGNAL[:6]]], VOLSCHED_TRACE)


def test_volsched_in_the_optimizer():
    p = Quadratic(ReferenceSGD, lr=0.1, schedule=VolSchedule(total_steps=12, window=4, min_lr=1e-4))
    rates = []
    for x in [*SIGNAL, *SIGNAL[:6]]:
        p.optimizer.observe(torch.tensor(x, dtype=torch.float64))
        p.optimizer.step(p.closure)
        rates.append(p.optimizer.stats["lr"])
    close(rates, VOLSCHED_TRACE)


def test_volsched_without_volatility_is_sampled_cosine_that_ends_at_t():
    rule = VolSched(2.0, total_steps=10, window=4, min_lr=0.01)
    expected = [2.0] * 4 + [1 + math.cos(0.4 * math.pi)] * 4 + [1 + math.cos(0.8 * math.pi)] * 4 + [0.01] * 9
    close([rule.update(0.5) for _ in range(21)], expected)


def test_volsched_warmup_decay_bounds_and_capacity():
    rule = VolSched(1.0, total_steps=11, window=2, warmup_steps=3, warmup_start=0.2, decay=lambda e: 1 / (1 + e))
    rates = [rule.update(0.5) for _ in range(16)]
    close(rates, [0.2, 0.6, 1, 1, 1, 1 / 3, 1 / 3, 1 / 5, 1 / 5, 1 / 7, 1 / 7, *[1 / 9] * 5])
    assert VolSched(1.0, total_steps=9, warmup_steps=1).update(0.5) == 1.0
    bounded = VolSched(0.1, total_steps=12, window=4, sensitivity=1.0, max_lr=0.05, capacity=6)
    rates = [bounded.update(x) for x in SIGNAL]
    M = volsched_multiplier(SIGNAL[2:8], 4, 1.0)  # of the values that are kept
    close([rates[4], rates[8]], [0.05, 0.05 / 3 * M])
    assert bounded.signal == SIGNAL[-6:] and M != 1.0


def test_volsched_skips_a_signal_that_is_not_finite():
    rule = VolSched(0.1, total_steps=12, window=4, min_lr=1e-4)
    rule.update(0.3)
    with pytest.warns(UserWarning, match="not finite"):
        rule.update(math.nan)
    assert rule.signal == [0.3] and rule.t == 2


# ---- GALA ----

GALA_TRACE = [0.1, 0.1588540445, 0.1462491612, 0.1483666691, 0.1508058455, 0.1528406213]


@pytest.mark.parametrize("mode", ["same_batch", "consecutive"])
def test_gala_checked_run(mode):
    history = Quadratic(ReferenceSGD, lr=0.1, schedule=GalaSchedule(delta=0.0, mode=mode)).run(6)
    close(history["lr"], GALA_TRACE)
    assert history["curvature"][0] == 0.0 and (history["curvature"][1:] > 1).all()


def test_gala_in_one_dimension_finds_the_curvature():
    h, lr_0 = 2.5, 0.03
    g_0, g_1 = h, h * (1 - lr_0 * h)
    assert Gala(lr_0, delta=0.0).update(g_1 * g_0, g_0**2, h) == pytest.approx(1 / h - lr_0)
    assert gala_lr([g_1 * g_0], [h * g_0**2], lr_0=lr_0, delta=0.0) == pytest.approx(1 / h - lr_0)


def test_gala_bounds_regulariser_and_undefined_curvature():
    assert Gala(0.3, delta=0.0).lr == 0.3
    assert Gala(0.3, delta=1.0).update(1.0, 2.0, 3.0) == pytest.approx((0.3 + 1.0) / (1 + 6))
    rule = Gala(0.1, delta=0.0, max_lr=0.2)
    assert rule.update(5.0, 1.0, None) == 0.1  # no curvature yet: adds nothing
    assert rule.update(-1.0, 1.0, 2.0) == 0.0  # a negative numerator: the domain starts at 0
    assert rule.update(5.0, 1.0, None) == 0.2  # L is still 2: 4 / 4, above max_lr
    assert (rule.a, rule.b) == (4.0, 4.0)
    assert rule.update(math.nan, 1.0, 1.0) == 0.2
    assert (rule.a, rule.b, rule.L) == (4.0, 4.0, 2.0)


def test_gala_adamw_uses_the_adam_direction():
    problem = Quadratic(ReferenceAdamW, lr=0.1, weight_decay=0.0, schedule=GalaSchedule(delta=0.0))
    a = b = 0.0
    before, d = None, None
    for t in range(6):
        here = problem.x.detach().clone()
        g = here * problem.A
        if t:
            L = (g - before * problem.A).norm() / (here - before).norm()
            a, b = a + float(g @ d), b + float(L * d @ d)
        problem.optimizer.step(problem.closure)
        assert problem.optimizer.stats["lr"] == pytest.approx(a / b if t else 0.1, rel=1e-9)
        before, d = here, (here - problem.x.detach()) / problem.optimizer.stats["lr"]


def test_gala_groups_keep_their_ratio():
    problem = Quadratic(ReferenceSGD, lr=0.1)
    x, y = problem.x, nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = ReferenceSGD(
        [{"params": [x]}, {"params": [y], "lr": 0.02}], lr=0.1, schedule=GalaSchedule(mode="consecutive")
    )
    for _ in range(4):
        before = y.item()
        x.grad, y.grad = x.detach() * problem.A, torch.ones_like(y)
        optimizer.step()
        assert before - y.item() == pytest.approx(optimizer.stats["lr"] / 5, rel=1e-9)
    assert optimizer.stats["lr"] != 0.1


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 1))
        self.norm = nn.utils.parametrizations.spectral_norm(nn.Linear(1, 1))

    def forward(self, x):
        return self.norm(self.body(x)).square().mean()


def train(schedule, momentum, zero_in_closure, steps=6):
    torch.manual_seed(0)
    net = Net()
    optimizer = ReferenceSGD(net.parameters(), lr=0.05, momentum=momentum, schedule=schedule)
    batches = torch.randn(steps, 16, 6, generator=torch.Generator().manual_seed(1))
    losses = []
    for batch in batches:

        def closure(batch=batch):
            if zero_in_closure:
                optimizer.zero_grad()
            loss = net(batch)
            loss.backward()
            return loss

        losses.append(optimizer.step(closure).item())
        grads = [p.grad.clone() for p in net.parameters()]
        if not zero_in_closure:
            optimizer.zero_grad()
    return losses, list(net.state_dict().values()), grads, torch.get_rng_state()


@pytest.mark.parametrize("zero_in_closure", [True, False])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_gala_second_evaluation_leaves_no_trace(momentum, zero_in_closure):
    """With the rate pinned, GALA's run is the plain run: losses, weights, buffers, gradients, random numbers."""
    plain = train(None, momentum, zero_in_closure)
    gala = train(GalaSchedule(min_lr=0.05, max_lr=0.05), momentum, zero_in_closure)
    assert plain[0] == gala[0]
    for one, other in zip([*plain[1], *plain[2], plain[3]], [*gala[1], *gala[2], gala[3]], strict=True):
        assert torch.equal(one, other)
    free = train(GalaSchedule(), momentum, zero_in_closure)
    assert free[0] != plain[0]


def test_gala_both_evaluations_see_the_same_dropout():
    x = nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = ReferenceSGD([x], lr=0.1, schedule=GalaSchedule(max_lr=0.1))

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.dropout(x.expand(50), 0.5).square().mean() / 2
        loss.backward()
        return loss

    torch.manual_seed(0)
    curvatures = []
    for t in range(5):
        here = x.item()
        optimizer.step(closure)
        curvatures.append(optimizer.stats["curvature"])
        if t:
            assert curvatures[t] == pytest.approx(x.grad.item() / here, rel=1e-9)
    assert len(set(curvatures)) == 5  # the masks did differ from step to step


def test_gala_restores_everything_when_the_closure_fails():
    torch.manual_seed(0)
    net = Net()
    params = list(net.parameters())
    for p in params:
        p.grad = torch.randn_like(p)
    grads = [(p.grad, p.grad.clone()) for p in params]
    before = copy.deepcopy(net.state_dict())

    def closure():
        net(torch.randn(4, 6)).backward()
        raise KeyError("on purpose")

    with pytest.raises(KeyError):
        gradients_at({p: p.detach() + 1 for p in params}, closure, params)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(p.grad is g and torch.equal(g, value) for p, (g, value) in zip(params, grads, strict=True))
    assert not nn.modules.module._global_forward_pre_hooks


def test_gala_same_batch_needs_a_closure():
    problem = Quadratic(ReferenceSGD, lr=0.1, schedule=GalaSchedule())
    problem.closure()
    with pytest.raises(ValueError, match="closure"):
        problem.optimizer.step()


# ---- SGDM with schedules ----


def test_sgdm_batch_sizes_and_steps():
    sizes = [sgdm.batch_size(e, b_0=8, delta=2, E=30) for e in range(300)]
    assert sizes[::30] == [8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096]
    assert sizes == [sgdm.batch_size(e, b_0=8, delta=2, E=30, b_max=4096, epochs=300) for e in range(300)]
    assert sgdm.steps(sizes, 50_000) == 374_760
    assert sgdm.steps([128] * 300, 50_000) == 117_300
    bent = [sgdm.batch_size(e, b_0=8, delta=1.5, E=1, b_max=1000, epochs=10) for e in range(10)]
    a = 992 / (1.5**9 - 1)
    assert bent[0] == 8 and bent[9] == 1000 and bent[5] == math.ceil(a * 1.5**5 + 8 - a)
    with pytest.raises(ValueError, match="epochs"):
        sgdm.batch_size(3, b_0=8, delta=2, E=1, b_max=64)


def test_sgdm_rates():
    expected = [0.1, 0.11958132, 0.14299691, 0.17099759, 0.20448118, 0.24452128]
    expected += [0.29240177, 0.34965789, 0.41812552, 0.5]
    close([sgdm.growing_rate(e, lr_0=0.1, lr_max=0.5, E=30, epochs=300) for e in range(0, 300, 30)], expected)
    settings = dict(lr_0=0.1, lr_max=0.5, w=3, W=30, epochs=300)
    close([sgdm.warmup_rate(e, **settings) for e in range(0, 30, 3)], expected)
    assert sgdm.warmup_rate(200, **settings) == 0.5
    close([sgdm.warmup_rate(e, lr_min=0.1, **settings) for e in (30, 165, 300)], [0.5, 0.3, 0.1])
    close([sgdm.inverse_sqrt_rate(t, 0.3) for t in (0, 3, 8)], [0.3, 0.15, 0.1])
    close([sgdm.cosine_rate(e, 0.4, 8) for e in (0, 4, 8)], [0.4, 0.2, 0.0])
    close([sgdm.polynomial_rate(t, 0.4, 4, p) for t, p in ((0, 2), (2, 2), (2, 1), (4, 2))], [0.4, 0.1, 0.2, 0.0])


def test_sgdm_convergence_condition():
    assert sgdm.growth(0.1, 1.0, 9) == pytest.approx(1.2915, abs=1e-4)
    assert not sgdm.converges(sgdm.growth(0.1, 1.0, 9), 2, 0.9)
    assert sgdm.converges(sgdm.growth(0.1, 1.0, 9), 2, 0.87)
    assert not sgdm.converges(1.0, 2, 0.9) and not sgdm.converges(2.0, 2, 0.0) and sgdm.converges(1.9, 2, 0.0)


SGDM_RUNS = {
    "SHB": (sgdm.shb, {}, [0.8, 0.46, 0.062, -0.3086, -0.58042]),
    "NSHB": (sgdm.nshb, {"dampening": 0.9}, [0.98, 0.9424, 0.889712, 0.82449856, 0.74931649]),
}


@pytest.mark.parametrize("name", SGDM_RUNS)
def test_sgdm_checked_runs(name):
    update, kwargs, expected = SGDM_RUNS[name]
    x, m, values = 1.0, 0.0, []
    for _ in range(5):
        x, m = update(x, m, 2 * x, 0.1, 0.9)
        values.append(x)
    close(values, expected)
    p = nn.Parameter(torch.ones((), dtype=torch.float64))
    optimizer = ReferenceSGD([p], lr=0.1, momentum=0.9, zero_init_momentum=True, **kwargs)
    for value in expected:
        p.grad = 2 * p.detach()
        optimizer.step()
        assert p.item() == pytest.approx(value, rel=1e-6)


# ---- Alignment ----


def test_alignment_checked_run():
    history = Quadratic(ReferenceSGD, lr=0.1, momentum=0.9, schedule=AlignmentSchedule(kappa=0.2)).run(8)
    expected = [0.1, 0.1, 0.1219823937, 0.1291980241, 0.1092044677, 0.0961322229, 0.1074226092, 0.1254444372]
    close(history["lr"], expected)
    close([alignment_lr(history["direction_cosine"][: t + 1], lr_0=0.1) for t in range(8)], expected)


@pytest.mark.parametrize("lag", [0, 1])
def test_alignment_rule_is_its_formula(lag):
    c = np.random.default_rng(0).uniform(-1, 1, 20).tolist()
    rule = Alignment(0.3, kappa=0.7, bias=0.05, lag=lag)
    for t in range(20):
        want = alignment_lr(c[: t + 1], lr_0=0.3, kappa=0.7, bias=0.05, lag=lag)
        assert rule.update(c[t]) == pytest.approx(want, rel=1e-12)
    assert alignment_lr([0.5, 1.0], kappa=1.0, lag=0) == pytest.approx(math.e)
    assert alignment_lr([0.5, 1.0], kappa=1.0, lag=1) == 1.0


def test_alignment_freezes_is_bounded_and_ignores_what_is_not_finite():
    frozen = Alignment(freeze_after=3, kappa=1.0)
    close([frozen.update(0.5) for _ in range(6)], np.exp([0, 0, 0.5, 1, 1, 1]))
    assert [Alignment(freeze_after=0).update(1.0) for _ in range(3)] == [1.0] * 3
    bounded = Alignment(0.1, kappa=1.0, min_lr=0.09, max_lr=0.2)
    close([bounded.update(c) for c in (1, 1, 1, -1, -1, -1, -1)], [0.1, 0.1, 0.2, 0.2, 0.2, 0.1, 0.09])
    rule = Alignment(bias=1.0)
    for c in (1.0, math.nan, math.inf):
        rule.update(c)
    assert (rule.sum, rule.t) == (0.0, 3)
    assert math.isfinite(Alignment(kappa=1e6).update(0.0))
    huge = Alignment(kappa=1e6, lag=0, max_lr=2.0)
    huge.update(1.0)
    assert huge.update(1.0) == 2.0


def test_cosine_of_sums():
    assert cosine(3.0, 4.0, 9.0) == 0.5
    assert cosine(0.0, 0.0, 9.0) == 0.0
    assert cosine(1e-200, 1e-200, 1e-200) == pytest.approx(1.0)
    assert cosine(math.nan, math.inf, 1.0) == 0.0 and cosine(math.inf, 1.0, 1.0) == 0.0


def test_product_groups_and_zero_rate():
    """Groups share the factor and keep their own lr; an open-loop schedule multiplies; lr 0 stays 0."""
    schedule = schedules.product(schedules.alignment(kappa=0.5), lambda step: 1 / (1 + step))
    x, y, z = (nn.Parameter(torch.ones(3, dtype=torch.float64)) for _ in range(3))
    groups = [{"params": [x]}, {"params": [y], "lr": 0.02}, {"params": [z], "lr": 0.0}]
    optimizer = ReferenceSGD(groups, lr=0.1, momentum=0.5, schedule=schedule)
    for t in range(4):
        before = [p.detach().clone() for p in (x, y)]
        for p in (x, y, z):
            p.grad = torch.full_like(p, 0.25)
        optimizer.step()
        rate = 0.1 * math.exp(0.5 * max(0, t - 1)) / (1 + t)  # every cosine is 1
        assert optimizer.stats["lr"] == pytest.approx(rate, rel=1e-12)
        m = optimizer.state[x]["momentum_buffer"]
        close(x.detach(), before[0] - rate * m, rel=1e-12)
        close(y.detach(), before[1] - 0.2 * rate * m, rel=1e-12)
    assert torch.equal(z.detach(), torch.ones(3, dtype=torch.float64))
    assert all(group["lr"] == lr for group, lr in zip(optimizer.param_groups, (0.1, 0.02, 0.0), strict=True))


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("optimizer", [ReferenceSGD, ReferenceAdamW])
def test_direction_is_what_the_rate_multiplied(optimizer, maximize):
    """Without weight decay a move is -lr d, so the cosine must be that between the gradient and minus the move."""
    params = parameters()
    extra = {"momentum": 0.8} if optimizer is ReferenceSGD else {"amsgrad": True}
    extra |= {"weight_decay": 0.0, "maximize": maximize, "max_grad_norm": 1.5, "lr": 0.01}
    reference = optimizer(params, track=("direction",), **extra)
    previous = None
    for step in range(8):
        set_gradients(params, step)
        before = torch.cat([p.detach().flatten() for p in params])
        g = torch.cat([p.grad.flatten() for p in params])
        reference.step()
        want = 0.0
        if step:
            want = float(torch.cosine_similarity(-g if maximize else g, previous - before, 0))
        assert reference.stats["direction_cosine"] == pytest.approx(want, abs=1e-9)
        previous = before


def test_direction_without_momentum_is_the_previous_gradient():
    params = parameters()
    reference = ReferenceSGD(params, lr=0.01, maximize=True, schedule=AlignmentSchedule())
    gradients = []
    for step in range(5):
        set_gradients(params, step)
        gradients.append(torch.cat([p.grad.flatten() for p in params]))
        reference.step()
    want = [float(torch.cosine_similarity(a, b, 0)) for a, b in zip(gradients[1:], gradients, strict=False)]
    close(reference.history()["direction_cosine"], [0.0, *want], rel=1e-9)


# ---- Statistics ----


@pytest.mark.parametrize("prev_grad", ["store", "swap", "bfloat16"])
def test_statistics(prev_grad):
    params = parameters()
    track = ("grad_norm", "grad_norm_l1", "alignment")
    reference = ReferenceSGD(params, lr=0.05, momentum=0.9, weight_decay=0.1, track=track, prev_grad=prev_grad)
    rows, g_old, x_old = [], None, None
    for step in range(5):
        set_gradients(params, step)
        g = torch.cat([p.grad.flatten() for p in params])
        x = torch.cat([p.detach().flatten() for p in params])
        h = g_old if prev_grad != "bfloat16" or g_old is None else g_old.bfloat16().double()
        pair = [0.0] * 3
        if step:
            pair = [float(g @ h), float(torch.cosine_similarity(g, h, 0)), float((g - h).norm() / (x - x_old).norm())]
        rows.append([step + 1, float(g.norm()), float(g.abs().sum()), *pair])
        g_old, x_old = g, x
        reference.step()
    names = ["step", "grad_norm", "grad_norm_l1", "alignment", "cosine", "curvature"]
    history = reference.history()
    assert set(history) == {*names, "lr", "skipped"}
    close(np.stack([history[name] for name in names], axis=1), rows, rel=1e-9)
    assert reference.stats == {name: history[name][-1] for name in history}


def test_only_what_is_measured_and_only_the_last_steps():
    problem = Quadratic(ReferenceSGD, lr=0.1, history_size=3)
    assert problem.optimizer.stats == {"step": 0, "skipped": 0} and problem.optimizer.history() == {}
    history = problem.run(5)
    assert set(history) == {"step", "lr", "skipped"}
    assert history["step"].tolist() == [3, 4, 5]
    assert "prev_grad" not in problem.optimizer.state[problem.x]


def test_clip_factor():
    assert clip_factor(0.5, 1.0) == 1.0
    assert clip_factor(4.0, 1.0) == 1.0 / (4.0 + 1e-6)
    assert clip_factor(math.inf, 1.0) == 0.0 and math.isnan(clip_factor(math.nan, 1.0))


# ---- Parity with torch ----

SGD_OPTIONS = [
    {},
    {"momentum": 0.9},
    {"momentum": 0.9, "nesterov": True},
    {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.05},
    {"momentum": 0.9, "nesterov": True, "weight_decay": 0.05, "maximize": True},
    {"weight_decay": 0.05, "maximize": True},
    {"momentum": 0.5, "lr": torch.tensor(0.02, dtype=torch.float64)},
]
ADAMW_OPTIONS = [
    {},
    {"weight_decay": 0.0, "betas": (0.8, 0.95)},
    {"weight_decay": 0.1, "amsgrad": True},
    {"maximize": True, "eps": 1e-3, "amsgrad": True, "weight_decay": 0.0},
    {"lr": torch.tensor(0.02, dtype=torch.float64)},
]
PAIRS = [(ReferenceSGD, torch.optim.SGD, o) for o in SGD_OPTIONS]
PAIRS += [(ReferenceAdamW, torch.optim.AdamW, o) for o in ADAMW_OPTIONS]
IDS = [f"{r.__name__}-{'-'.join(o) or 'default'}" for r, _, o in PAIRS]


def assert_same(params, others, rel=1e-12):
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=rel, atol=1e-14)


@pytest.mark.parametrize("clip", [None, 2.0])
@pytest.mark.parametrize(("reference", "theirs", "options"), PAIRS, ids=IDS)
def test_parity_with_torch(reference, theirs, options, clip):
    """Two groups, a schedule against LambdaLR, clipping against clip_grad_norm_; one parameter without gradient."""
    ours, other = parameters(), parameters()
    options = {"lr": 0.03, **options}

    def groups(params):
        return [{"params": params[:2]}, {"params": params[2:], "lr": 0.007, "weight_decay": 0.02}]

    scheduled = not isinstance(options["lr"], torch.Tensor)
    schedule = schedules.linear(60, warmup_steps=5) if scheduled else None
    a = reference(groups(ours), schedule=schedule, max_grad_norm=clip, **options)
    b = theirs(groups(other), foreach=False, **options)
    lr = torch.optim.lr_scheduler.LambdaLR(b, schedule) if scheduled else None
    start = [p.detach().clone() for p in ours]
    for step in range(50):
        for params in (ours, other):
            set_gradients(params, step)
            if step % 3 == 1:
                params[1].grad = None
        kept = [None if p.grad is None else p.grad.clone() for p in ours]
        norm = float(nn.utils.clip_grad_norm_(other, clip)) if clip else 0.0
        a.step()
        b.step()
        if lr:
            lr.step()
        if clip:
            assert a.stats["grad_norm"] == pytest.approx(norm, rel=1e-12)
            assert a.stats["clip"] == pytest.approx(min(1.0, clip / (norm + 1e-6)), rel=1e-12)
        assert all(p.grad is None if g is None else torch.equal(p.grad, g) for p, g in zip(ours, kept, strict=True))
    assert_same(ours, other)
    assert not any(torch.equal(p.detach(), s) for p, s in zip(ours, start, strict=True))


def test_decoupled_weight_decay_shrinks_before_the_update():
    (p,) = params = [nn.Parameter(torch.tensor([2.0, -3.0], dtype=torch.float64))]
    reference = ReferenceSGD(params, lr=0.1, momentum=0.9, weight_decay=0.5, decoupled_weight_decay=True)
    x, m = p.detach().clone(), torch.zeros(2, dtype=torch.float64)
    for step in range(5):
        set_gradients(params, step)
        m = 0.9 * m + p.grad
        x = x * (1 - 0.1 * 0.5) - 0.1 * m
        reference.step()
        close(p.detach(), x, rel=1e-12)


def fma(a, b, c):
    """a * b + c in float32, rounded once: the product of two floats is exact in float64."""
    return (np.float64(a) * np.float64(b) + np.float64(c)).astype(np.float32)


def numpy_sgd(x, m, g, f, *, lr, momentum, dampening, weight_decay, clip, nesterov):
    g = fma(f(weight_decay), x, g * f(clip))
    m = g if m is None else fma(f(1 - dampening), g, f(momentum) * m)
    d = fma(f(momentum), m, g) if nesterov else m
    return fma(f(-lr), d, x), m


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_bits_in_float32(nesterov):
    """Every operation rounds once, in the documented order, multiply-adds included."""
    settings = dict(momentum=0.9, dampening=0.0 if nesterov else 0.3, weight_decay=0.05, nesterov=nesterov)
    params = [nn.Parameter(torch.randn(257, generator=torch.Generator().manual_seed(0)))]
    reference = ReferenceSGD(params, lr=0.1, schedule=lambda step: 1 / 3, max_grad_norm=1.0, **settings)
    x, m = params[0].detach().numpy().copy(), None
    for step in range(5):
        set_gradients(params, step)
        g = params[0].grad.numpy().copy()
        reference.step()
        x, m = numpy_sgd(x, m, g, np.float32, lr=0.1 * (1 / 3), clip=reference.stats["clip"], **settings)
        assert np.array_equal(params[0].detach().numpy(), x)
    assert np.array_equal(reference.state[params[0]]["momentum_buffer"].numpy(), m)


def test_adamw_bits_in_float32():
    f, lr, wd, (beta1, beta2), eps = np.float32, 0.03, 0.1, (0.9, 0.999), 1e-8
    params = [nn.Parameter(torch.randn(257, generator=torch.Generator().manual_seed(0)))]
    reference = ReferenceAdamW(params, lr=lr, weight_decay=wd, betas=(beta1, beta2), eps=eps)
    x = params[0].detach().numpy().copy()
    m = v = np.zeros_like(x)
    for t in range(1, 6):
        set_gradients(params, t)
        g = params[0].grad.numpy().copy()
        reference.step()
        x = x * f(1 - lr * wd)
        m = fma(f(1 - beta1), g - m, m)
        v = fma(f(1 - beta2) * g, g, f(beta2) * v)
        denom = np.sqrt(v) * f(1 / math.sqrt(1 - beta2**t)) + f(eps)
        x = x + (f(-lr / (1 - beta1**t)) * m) / denom
        assert np.array_equal(params[0].detach().numpy(), x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_rounds_once_on_store(dtype):
    """The update uses m before it is rounded for storage."""
    settings = dict(momentum=0.9, dampening=0.0, weight_decay=0.05, nesterov=True)
    params = [nn.Parameter(torch.randn(257, generator=torch.Generator().manual_seed(0)).to(dtype))]
    reference = ReferenceSGD(params, lr=0.1, **settings)
    buffer = None
    for step in range(4):
        set_gradients(params, step)
        x, g = params[0].detach().float().numpy(), params[0].grad.float().numpy()
        m = None if buffer is None else buffer.float().numpy()
        x, m = numpy_sgd(x, m, g, np.float32, lr=0.1, clip=1.0, **settings)
        reference.step()
        buffer = reference.state[params[0]]["momentum_buffer"].clone()
        assert buffer.dtype == dtype
        assert torch.equal(params[0].detach(), torch.from_numpy(x).to(dtype))
        assert torch.equal(buffer, torch.from_numpy(m).to(dtype))


def test_the_momentum_buffer_is_not_the_gradient():
    params = parameters(torch.float32)
    reference = ReferenceSGD(params, lr=0.1, momentum=0.9, track=("alignment",))
    set_gradients(params, 0)
    reference.step()
    kept = [reference.state[p]["momentum_buffer"].clone() for p in params]
    for p in params:
        p.grad.zero_()
    for p, m in zip(params, kept, strict=True):
        assert torch.equal(reference.state[p]["momentum_buffer"], m) and m.abs().sum() > 0
        assert torch.equal(reference.state[p]["prev_grad"], m)


# ---- Skipped and non-finite steps, AMP ----

CLOSED_LOOPS = [
    AlignmentSchedule(),
    GalaSchedule(mode="consecutive"),
    VolSchedule(total_steps=40, window=2),
]


@pytest.mark.parametrize("schedule", CLOSED_LOOPS, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("optimizer", [ReferenceSGD, ReferenceAdamW])
def test_a_skipped_step_changes_nothing(optimizer, schedule):
    kwargs = {"lr": 0.01, "schedule": schedules.product(schedule, schedules.linear(40))}
    kwargs |= {"momentum": 0.9} if optimizer is ReferenceSGD else {}
    ours, other = parameters(), parameters()
    a, b = optimizer(ours, **kwargs), optimizer(other, **kwargs)
    for step in range(12):
        if step % 4 == 3:
            before = copy.deepcopy(a.state_dict())
            set_gradients(ours, 99)
            ours[0].grad[0, 0] = math.inf
            a.observe(0.9)
            a.found_inf = torch.tensor(1.0)
            a.step()
            del a.found_inf
            after = a.state_dict()
            assert after["lrkernels"].pop("skipped") == before["lrkernels"].pop("skipped") + 1
            assert str(before) == str(after)
        for params, opt in ((ours, a), (other, b)):
            set_gradients(params, step)
            opt.observe(SIGNAL[step])
            opt.step()
    assert_same(ours, other, rel=0)
    assert a.stats["skipped"] == 3 and b.stats["skipped"] == 0 and a.stats["step"] == 12
    rates = a.history()["lr"]
    assert np.array_equal(rates, b.history()["lr"]) and len(set(rates / (1 - np.arange(12) / 40))) > 2


def test_a_skipped_step_drops_its_signal():
    problem = Quadratic(ReferenceSGD, lr=0.1, schedule=VolSchedule(total_steps=12, window=4))
    for step in range(6):
        problem.closure()
        if step != 3:
            problem.optimizer.observe(SIGNAL[step])
        problem.optimizer.found_inf = torch.tensor(float(step == 2))
        problem.optimizer.step()
    assert problem.optimizer.state_dict()["lrkernels"]["rule"]["signal"] == [SIGNAL[i] for i in (0, 1, 4, 5)]


def test_a_non_finite_gradient_adds_nothing_to_the_closed_loop():
    x, y = (nn.Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(2))
    reference = ReferenceSGD([x, y], lr=0.1, momentum=0.9, schedule=AlignmentSchedule(bias=0.5))
    for step in range(4):
        x.grad = torch.ones_like(x)
        y.grad = torch.full_like(y, math.nan if step == 2 else 1.0)
        reference.step()
    close(reference.history()["lr"], 0.1 * np.exp([0, 0, 0.3, 0.3]))  # (1 + bias) at step 1, nothing at step 2
    assert reference.stats["step"] == 4 and reference.history()["direction_cosine"].tolist()[2:] == [0.0, 0.0]
    assert y.detach().isnan().all() and x.detach().isfinite().all()


@pytest.mark.parametrize("unscale_first", [False, True])
def test_grad_scaler(unscale_first):
    ours, other = parameters(torch.float32), parameters(torch.float32)
    a = ReferenceSGD(ours, lr=0.01, momentum=0.9, max_grad_norm=2.0, track=("alignment",))
    b = ReferenceSGD(other, lr=0.01, momentum=0.9, max_grad_norm=2.0, track=("alignment",))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    for step in range(6):
        set_gradients(ours, step, scale=scaler.get_scale())
        set_gradients(other, step)
        if step == 3:
            ours[0].grad[0, 0] = math.inf
        scaler.scale(torch.zeros(()))
        if unscale_first:
            scaler.unscale_(a)
        scaler.step(a)
        scaler.update()
        if step != 3:
            b.step()
        assert_same(ours, other, rel=0)
    assert a.stats["skipped"] == 1 and a.stats["step"] == 5
    assert {k: v for k, v in a.stats.items() if k != "skipped"} == {k: v for k, v in b.stats.items() if k != "skipped"}


# ---- Checkpoints ----


@pytest.mark.parametrize(("reference", "theirs", "options"), PAIRS, ids=IDS)
def test_state_dict_moves_both_ways(reference, theirs, options):
    """Each continues the other's run: reference, torch, reference again, against torch all the way."""
    options = {"lr": 0.03, **options}
    params, other = parameters(), parameters()
    current = reference(params, track=("direction",), **copy.deepcopy(options))
    whole = theirs(other, foreach=False, **options)
    for step in range(30):
        if step in (10, 20):
            saved = copy.deepcopy(current.state_dict())
            current = (theirs if step == 10 else reference)(params, lr=0.5)
            current.load_state_dict(saved)
            if options.get("momentum"):
                assert all("momentum_buffer" in current.state[p] for p in params)
        for tensors, optimizer in ((params, current), (other, whole)):
            set_gradients(tensors, step)
            optimizer.step()
    assert_same(params, other)


RESUMED = [
    (ReferenceSGD, AlignmentSchedule(kappa=0.5), {"momentum": 0.9}),
    (ReferenceSGD, AlignmentSchedule(kappa=0.5), {}),
    (ReferenceSGD, GalaSchedule(), {"momentum": 0.9, "max_grad_norm": 1.0}),
    (ReferenceSGD, GalaSchedule(mode="consecutive"), {}),
    (ReferenceAdamW, GalaSchedule(), {}),
    (ReferenceAdamW, VolSchedule(total_steps=20, window=2), {"amsgrad": True}),
]


@pytest.mark.parametrize(("optimizer", "schedule", "options"), RESUMED)
def test_a_resumed_run_is_the_same_run(optimizer, schedule, options, tmp_path):
    kwargs = {"lr": 0.05, "schedule": schedules.product(schedule, schedules.cosine(40)), **options}
    whole, part = Quadratic(optimizer, **kwargs), Quadratic(optimizer, **kwargs)
    for step in range(12):
        if step == 7:
            torch.save(part.optimizer.state_dict(), tmp_path / "state.pt")
            resumed = Quadratic(optimizer, **kwargs)
            resumed.x.data.copy_(part.x.data)
            resumed.optimizer.load_state_dict(torch.load(tmp_path / "state.pt"))
            part = resumed
        for problem in (whole, part):
            problem.optimizer.observe(SIGNAL[step])
            problem.optimizer.step(problem.closure)
    assert torch.equal(whole.x, part.x)
    assert np.array_equal(whole.optimizer.history()["lr"][7:], part.optimizer.history()["lr"])
    assert len(set(whole.optimizer.history()["lr"])) > 5


def test_another_method_starts_anew_from_a_checkpoint():
    problem = Quadratic(ReferenceSGD, lr=0.1, momentum=0.9, schedule=AlignmentSchedule())
    problem.run(5)
    other = Quadratic(ReferenceSGD, lr=0.1, momentum=0.9, schedule=GalaSchedule(mode="consecutive"))
    other.optimizer.load_state_dict(problem.optimizer.state_dict())
    other.run(1)
    assert other.optimizer.stats["step"] == 6
    assert other.optimizer.stats["lr"] == pytest.approx(0.1)
    learnt = other.optimizer.state_dict()["lrkernels"]["rule"]
    assert set(learnt) == {"lr_0", "a", "b", "L"} and learnt["lr_0"] == 0.1
    watching = Quadratic(ReferenceSGD, lr=0.1, momentum=0.9, schedule=AlignmentSchedule())
    plain = Quadratic(ReferenceSGD, lr=0.1, momentum=0.9)
    plain.run(5)
    watching.optimizer.load_state_dict(plain.optimizer.state_dict())
    assert len(set(watching.run(4)["lr"])) == 3  # the first two are lr_0, as at every start


def test_lr_schedulers_of_torch_multiply():
    """A warm-up by torch starts at lr / 4; the lr_0 of a closed loop is still the base rate."""
    loop = VolSchedule(total_steps=12, window=2, min_lr=0.08)  # without a signal: sampled cosine
    problem = Quadratic(ReferenceSGD, lr=0.1, schedule=loop)
    warmup = torch.optim.lr_scheduler.LinearLR(problem.optimizer, 0.25, total_iters=3)
    for _ in range(6):
        problem.run(1)
        warmup.step()
    cosine_lr = 0.05 * (1 + math.cos(math.pi / 6))
    close(problem.optimizer.history()["lr"], [0.025, 0.05, 0.75 * cosine_lr, cosine_lr, 0.08, 0.08])


def test_alignment_bounds_each_group_before_the_open_loop():
    x, y = (nn.Parameter(torch.zeros(1, dtype=torch.float64)) for _ in range(2))
    schedule = schedules.product(AlignmentSchedule(kappa=1.0, min_lr=0.05, max_lr=0.15), lambda step: 0.5)
    reference = ReferenceSGD([{"params": [x]}, {"params": [y], "lr": 0.01}], lr=0.1, momentum=0.0, schedule=schedule)
    moves = []
    for _ in range(4):
        before = x.item(), y.item()
        x.grad, y.grad = torch.ones_like(x), torch.ones_like(y)
        reference.step()
        moves.append((before[0] - x.item(), before[1] - y.item()))
    close(moves, [(0.05, 0.025), (0.05, 0.025), (0.075, 0.025), (0.075, 0.5 * 0.01 * math.exp(2))])


# ---- Refusals ----


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"differentiable": True}, "differentiable"),
        ({"track": ("norm",)}, "track"),
        ({"prev_grad": "keep"}, "prev_grad"),
        ({"nesterov": True}, "Nesterov"),
        ({"lr": -1.0}, "learning rate"),
    ],
)
def test_refusals(kwargs, message):
    with pytest.raises(ValueError, match=message):
        ReferenceSGD(parameters(), **kwargs)


def test_refuses_complex_and_sparse():
    with pytest.raises(ValueError, match="complex"):
        ReferenceAdamW([nn.Parameter(torch.ones(2, dtype=torch.complex64))])
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.sparse_coo_tensor(torch.tensor([[1]]), torch.tensor([1.0]), (3,), check_invariants=True)
    with pytest.raises(ValueError, match="takes no sparse gradients"):
        ReferenceSGD([p]).step()


def test_a_step_without_gradients_counts_for_nothing():
    params = parameters()
    reference = ReferenceAdamW(params)
    reference.step()
    assert reference.stats["step"] == 0 and not reference.state
