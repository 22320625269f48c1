"""At home in what people train with: the real packages, each with a run that a user would make."""

import copy
import functools
import gc
import io
import logging
import math
import pickle
import runpy
import weakref
from pathlib import Path

import pytest
import torch
from cases import LR
from conftest import (
    BACKENDS,
    TORCH,
    Reads,
    assert_close,
    assert_same_bits,
    bits,
    gradients,
    parameters,
    set_grads,
    states,
    train,
)
from torch import nn
from torch.amp import GradScaler
from torch.optim import lr_scheduler

from lrkernels import FusedAdamW, FusedSGD, log_history, ops, schedules

KINDS = [
    pytest.param(FusedSGD, {"lr": LR, "momentum": 0.9, "weight_decay": 0.01}, id="sgd"),
    pytest.param(FusedAdamW, {"lr": 0.01}, id="adamw"),
]


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))


def batches(steps, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x = torch.randn(12, 8, generator=generator)
        yield x, x[:, :3].argmax(1)


def same(kind, got, want):
    """SGD has torch's bits; AdamW's roots are the correctly rounded ones."""
    if kind is FusedSGD:
        assert_same_bits(got, want)
    else:
        assert_close(got, want, rtol=1e-4, atol=1e-5)


# ---- torch.amp ----

UNSCALE = {
    "scaled": lambda scaler, optimizer, params: None,
    "unscaled": lambda scaler, optimizer, params: scaler.unscale_(optimizer),
    "unscaled and clipped": lambda scaler, optimizer, params: (
        scaler.unscale_(optimizer),
        nn.utils.clip_grad_norm_(params, 0.5, foreach=False),
    ),
}


def mixed(model, optimizer, scaler, steps, unscale=UNSCALE["scaled"], dtype=torch.float16):
    """Train with autocast; return the scale before each step, and whether the parameters moved."""
    params, trace = list(model.parameters()), []
    for x, y in batches(steps):
        before, scale = bits(params), scaler.get_scale()
        with torch.autocast("cpu", dtype=dtype):
            loss = nn.functional.cross_entropy(model(x), y)
        scaler.scale(loss).backward()
        unscale(scaler, optimizer, params)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        trace.append((scale, bits(params) != before))
    return trace


@pytest.mark.parametrize("unscale", UNSCALE.values(), ids=UNSCALE)
@pytest.mark.parametrize(
    ("scale", "backoff"), [(2.0**24, 0.5), (2.0**24, 0.3), (1000.0, 0.5)], ids=["overflow", "thirds", "not a power"]
)
@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_a_run_under_the_scaler_is_torch_s(kind, options, scale, backoff, unscale):
    """The first steps overflow in float16: they move nothing, the scale backs off, and grows again later."""
    runs = []
    for build in (kind, lambda params, **more: TORCH[kind](params, foreach=False, **more)):
        model = network()
        optimizer = build(model.parameters(), **options)
        scaler = GradScaler("cpu", init_scale=scale, backoff_factor=backoff, growth_interval=8)
        runs.append((mixed(model, optimizer, scaler, 40, unscale), model, optimizer, scaler))
    (trace, model, optimizer, scaler), (want, twin, loop, other) = runs
    assert trace == want
    skipped = sum(not moved for _, moved in trace)
    assert (skipped > 3 and not trace[0][1]) if scale > 2**20 else skipped == 0
    assert optimizer.stats["skipped"] == skipped
    assert optimizer.stats["step"] == len(optimizer.history()["step"]) == 40 - skipped
    assert scaler.state_dict() == other.state_dict()
    same(kind, list(model.parameters()), list(twin.parameters()))
    same(kind, states(optimizer, model.parameters()), states(loop, twin.parameters()))
    assert not hasattr(optimizer, "found_inf")
    assert not hasattr(optimizer, "grad_scale")


def test_one_scaler_for_two_optimizers():
    """Each is skipped for its own overflow; torch skips per optimizer too, and backs off once."""
    runs = []
    for build in (FusedSGD, lambda params, **more: torch.optim.SGD(params, foreach=False, **more)):
        first, second = network(), network(1)
        optimizers = [build(model.parameters(), lr=LR, momentum=0.9) for model in (first, second)]
        scaler = GradScaler("cpu", init_scale=2.0**10)
        for step, (x, y) in enumerate(batches(6)):
            for n, (model, optimizer) in enumerate(zip((first, second), optimizers, strict=True)):
                scaler.scale(nn.functional.cross_entropy(model(x), y)).backward()
                if step == 2 * n + 1:
                    model[0].weight.grad[0, 0] = math.inf
                scaler.step(optimizer)
            scaler.update()
            for optimizer in optimizers:
                optimizer.zero_grad()
        runs.append((list(first.parameters()), list(second.parameters()), scaler.get_scale(), optimizers))
    (*got, scale, optimizers), (*want, other, _) = runs
    assert_same_bits(got, want)
    assert scale == other == 2.0**8
    assert [float(optimizer.stats["skipped"]) for optimizer in optimizers] == [1.0, 1.0]


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_a_scaler_that_is_switched_off(kind, options):
    model, twin = network(), network()
    optimizer, loop = kind(model.parameters(), **options), kind(twin.parameters(), **options)
    mixed(model, optimizer, GradScaler("cpu", enabled=False), 5, UNSCALE["unscaled"], torch.bfloat16)
    mixed(twin, loop, GradScaler("cpu", init_scale=1.0), 5, UNSCALE["scaled"], torch.bfloat16)
    assert_same_bits(list(model.parameters()), list(twin.parameters()))


def test_a_scheduler_by_hand_learns_of_a_skipped_step_when_it_asks():
    """Nothing between the backward pass and the next forward pass waits; asking is what does."""
    model = network()
    optimizer = FusedSGD(model.parameters(), LR, momentum=0.9)
    scheduler = lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
    scaler = GradScaler("cpu", init_scale=2.0**10)
    rates, done = [], 0.0
    for step, (x, y) in enumerate(batches(9)):
        scaler.scale(nn.functional.cross_entropy(model(x), y)).backward()
        if step in (0, 3, 4):
            model[2].bias.grad[1] = math.nan
        with Reads() as reads:
            scaler.step(optimizer)
            scaler.update()
            completed = optimizer.stats["step"]
        if ops.NATIVE in BACKENDS:
            assert reads.names == []
        optimizer.zero_grad()
        if completed > done:
            rates.append(float(optimizer.stats["lr"]))
            scheduler.step()
        done = completed
    assert rates == pytest.approx([LR * 0.9**step for step in range(6)], rel=1e-12)
    assert optimizer.history()["lr"].tolist() == rates


@pytest.mark.skipif(ops.NATIVE not in BACKENDS, reason="the binary is not there")
def test_a_rate_by_hand_follows_the_completed_steps_and_never_waits():
    """Their count is a tensor beside the parameters; the rate may be one too."""
    model, rate = network(), torch.tensor(LR, dtype=torch.float64)
    optimizer = FusedSGD(model.parameters(), rate, momentum=0.9)
    scaler = GradScaler("cpu", init_scale=2.0**10)

    def go_on(rows, poison=()):
        for step, (x, y) in enumerate(rows):
            scaler.scale(nn.functional.cross_entropy(model(x), y)).backward()
            if step in poison:
                model[2].bias.grad[1] = math.nan
            rate.copy_(LR * 0.9 ** optimizer.stats["step"])
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()

    rows = list(batches(10))
    go_on(rows[:1])  # makes the states
    with Reads() as reads:
        go_on(rows[1:], poison=(0, 3, 4))
    assert reads.names == []
    assert optimizer.stats["skipped"] == 3
    assert optimizer.history()["lr"].tolist() == pytest.approx([LR * 0.9**step for step in range(7)], rel=1e-12)


# ---- accelerate ----


@pytest.fixture
def accelerator():
    """A factory; each call begins anew. fp16 is for devices to accelerate: a scaler is put in by hand."""
    accelerate = pytest.importorskip("accelerate")

    def make(scaler=None, **more):
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        accelerate.state.GradientState._reset_state()
        made = accelerate.Accelerator(cpu=True, **more)
        made.scaler = scaler
        return made

    yield make
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


def accelerated(accelerator, optimizer_of, steps, scheduler_of=None, poison=(), clip=None, wrap=None):
    """The loop of accelerate's manual; return the skipped steps and what was prepared."""
    model = network()
    optimizer = optimizer_of(model.parameters())
    scheduler = scheduler_of(optimizer) if scheduler_of else lr_scheduler.ConstantLR(optimizer, 1.0)
    optimizer = wrap(accelerator, optimizer) if wrap else optimizer
    data = torch.utils.data.DataLoader([(x, y) for x, y in batches(steps)], batch_size=None)
    model, optimizer, data, scheduler = accelerator.prepare(model, optimizer, data, scheduler)
    skipped, rates = [], []
    for step, (x, y) in enumerate(data):
        with accelerator.accumulate(model):
            accelerator.backward(nn.functional.cross_entropy(model(x), y))
            if step in poison:
                next(model.parameters()).grad.view(-1)[0] = math.inf
            if clip is not None and accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            skipped.append(optimizer.step_was_skipped)
            rates.append(scheduler.get_last_lr()[0])
            scheduler.step()
            optimizer.zero_grad()
    return model, optimizer, scheduler, skipped, rates


def every_step(optimizer):
    return lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_accelerate_accumulates_and_schedules_as_with_torch_s(kind, options, accelerator):
    """Its clip and ours, one in the place of the other."""
    runs = []
    for build, clip in (
        (lambda params: kind(params, max_grad_norm=0.5, **options), None),
        (lambda params: TORCH[kind](params, foreach=False, **options), 0.5),
    ):
        made = accelerator(gradient_accumulation_steps=3)
        runs.append(accelerated(made, build, 20, scheduler_of=every_step, clip=clip))
    (model, optimizer, _, _, rates), (twin, _, _, _, want) = runs
    assert rates == want
    assert_close(list(model.parameters()), list(twin.parameters()), rtol=1e-4, atol=1e-5)
    assert optimizer.optimizer.stats["step"] == 7  # 6 of 3 batches, and the last 2
    assert (optimizer.optimizer.history()["clip"] < 1).any()


def as_ours(*arguments):
    from lrkernels.accelerate import AcceleratedFused

    return AcceleratedFused(*arguments)


@pytest.mark.parametrize("wrap", [None, as_ours], ids=["prepared", "wrapped"])
@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_accelerate_sees_that_a_step_was_skipped(kind, options, wrap, accelerator):
    """It takes a call of step() for a step: its scheduler went on over steps that an overflow had skipped."""
    runs, poison = [], (0, 3, 4)
    for build, how in (
        (lambda params: kind(params, **options), wrap),
        (lambda params: TORCH[kind](params, foreach=False, **options), None),
    ):
        made = accelerator(scaler=GradScaler("cpu", init_scale=2.0**10))
        run = accelerated(made, build, 10, scheduler_of=every_step, poison=poison, wrap=how)
        runs.append((*run, made.scaler))
        assert made.optimizer_step_was_skipped is False
    (model, optimizer, _, skipped, rates, scaler), (twin, loop, _, also, want, other) = runs
    assert skipped == also == [step in poison for step in range(10)]
    assert rates == want
    assert scaler.state_dict() == other.state_dict()
    same(kind, list(model.parameters()), list(twin.parameters()))
    same(kind, states(optimizer.optimizer, model.parameters()), states(loop.optimizer, twin.parameters()))
    assert optimizer.optimizer.history()["lr"].tolist() == pytest.approx(
        [rates[s] for s in range(10) if s not in poison]
    )
    assert optimizer.optimizer.stats["step"] == 7
    assert optimizer.optimizer.stats["skipped"] == (len(poison) if wrap else 0)
    assert optimizer.optimizer._step_supports_amp_scaling  # elsewhere the step gets the scale, and nothing waits


@pytest.mark.skipif(ops.NATIVE not in BACKENDS, reason="the binary is not there")
@pytest.mark.parametrize("scaled", [False, True], ids=["skip_nonfinite", "scaler"])
def test_accelerate_waits_for_a_skipped_step_where_it_is_asked(scaled, accelerator):
    """Batches are accumulated, accelerate unscales and clips: nothing waits but the question."""
    scaler = GradScaler("cpu", init_scale=2.0**10) if scaled else None
    made, model = accelerator(scaler=scaler, gradient_accumulation_steps=2), network()
    optimizer = FusedSGD(model.parameters(), LR, momentum=0.9, skip_nonfinite=not scaled)
    model, optimizer = made.prepare(model, as_ours(made, optimizer))
    assert made._optimizers == [optimizer]

    def go_on(rows, poison=()):
        for n, (x, y) in enumerate(rows):
            with made.accumulate(model):
                made.backward(nn.functional.cross_entropy(model(x), y))
                if n in poison:
                    model[0].bias.grad[3] = math.nan
                if made.sync_gradients:
                    made.clip_grad_norm_(model.parameters(), 10.0)
                optimizer.step()
                optimizer.zero_grad()

    rows = list(batches(12))
    go_on(rows[:2])  # makes the states
    with Reads() as reads:
        go_on(rows[2:], poison=(3, 8))
        skipped = optimizer.optimizer.stats["skipped"]
    assert reads.names == []
    with Reads() as reads:
        assert optimizer.step_was_skipped is True
    assert len(reads.names) == 1
    assert [skipped, optimizer.optimizer.stats["step"]] == [2, 4]


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_accelerate_saves_and_resumes_bit_for_bit(kind, options, accelerator, tmp_path):
    more = {"schedule": schedules.alignment(kappa=0.5), "max_grad_norm": 0.5, "track": "alignment"}
    results = []
    for stop in (None, 6):
        made, model = accelerator(scaler=GradScaler("cpu", init_scale=2.0**10)), network()
        optimizer = kind(model.parameters(), **options, **more)
        model, optimizer, scheduler = made.prepare(model, optimizer, every_step(optimizer))
        for step, (x, y) in enumerate(batches(14)):
            if step == stop:
                made.save_state(str(tmp_path))
                made, model = accelerator(scaler=GradScaler("cpu")), network(seed=7)
                optimizer = kind(model.parameters(), **{**options, "lr": 3.0}, **more)
                model, optimizer, scheduler = made.prepare(model, optimizer, every_step(optimizer))
                made.load_state(str(tmp_path))
            made.backward(nn.functional.cross_entropy(model(x), y))
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        results.append((list(model.parameters()), states(optimizer.optimizer, model.parameters()), optimizer.optimizer))
    (*whole, first), (*resumed, second) = results
    assert_same_bits(resumed, whole)
    assert second.history()["lr"].tolist() == first.history()["lr"][6:].tolist()
    assert len(set(first.history()["lr"].tolist())) > 10


# ---- Lightning ----

QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


@pytest.fixture
def lightning():
    """The package, quiet, and a module of it made from a function of the parameters."""
    lightning = pytest.importorskip("lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    class Module(lightning.LightningModule):
        def __init__(self, configure, signal=False):
            super().__init__()
            self.network, self.configure, self.signal = network(), configure, signal

        def training_step(self, batch, index):
            x, y = batch
            outputs = self.network(x)
            self.accuracy = (outputs.argmax(1) == y).float().mean()
            return nn.functional.cross_entropy(outputs, y)

        def on_before_optimizer_step(self, optimizer):
            if self.signal:
                optimizer.observe(self.accuracy)

        def configure_optimizers(self):
            return self.configure(self.parameters())

    return lightning, Module


def loader(steps):
    return torch.utils.data.DataLoader([(x, y) for x, y in batches(steps)], batch_size=None)


def precision(name):
    from lightning.pytorch.plugins.precision import MixedPrecision

    if name == "16-mixed":  # for the CPU Lightning takes bf16-mixed in its place, unless it is told so
        return {"plugins": [MixedPrecision("16-mixed", "cpu", GradScaler("cpu", init_scale=2.0**22))]}
    return {"precision": name}


AUTOCAST = {"32-true": None, "bf16-true": torch.bfloat16, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", AUTOCAST)
@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_lightning_trains_as_the_loop_that_it_stands_for(kind, options, name, lightning, tmp_path):
    """Each precision; the clip is ours alone, and is made once. In float16 the first steps overflow."""
    package, module = lightning
    more = {"schedule": schedules.volsched(20, window=4), "max_grad_norm": 0.5}
    trainer = package.Trainer(
        max_epochs=2, enable_checkpointing=False, default_root_dir=tmp_path, **QUIET, **precision(name)
    )
    trained = module(lambda params: kind(params, **options, **more), signal=True)
    trainer.fit(trained, loader(10))

    model, scaler = network(), GradScaler("cpu", init_scale=2.0**22, enabled=name == "16-mixed")
    model = model.to(torch.bfloat16) if name == "bf16-true" else model
    optimizer = kind(model.parameters(), **options, **more)
    for x, y in [*batches(10), *batches(10)]:
        x = x.to(next(model.parameters()).dtype)
        with torch.autocast("cpu", dtype=AUTOCAST[name], enabled="mixed" in name):
            outputs = model(x)
            loss = nn.functional.cross_entropy(outputs, y)
        scaler.scale(loss).backward()
        optimizer.observe((outputs.argmax(1) == y).float().mean())
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    [own] = trainer.optimizers
    assert_same_bits(list(trained.parameters()), list(model.parameters()))
    assert_same_bits(states(own, trained.parameters()), states(optimizer, model.parameters()))
    assert own.history()["grad_norm"].tolist() == optimizer.history()["grad_norm"].tolist()
    assert own.history()["grad_norm"].max() > 0.5
    skipped = own.stats["skipped"]
    assert skipped == optimizer.stats["skipped"] == 20 - own.stats["step"]
    assert (skipped > 2) == (name == "16-mixed")


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_lightning_s_own_clip_is_torch_s_where_ours_is_not_asked_for(kind, options, lightning, tmp_path):
    package, module = lightning
    runs = []
    for build in (lambda params: kind(params, **options), lambda params: TORCH[kind](params, foreach=False, **options)):
        trainer = package.Trainer(
            max_epochs=1, gradient_clip_val=0.3, enable_checkpointing=False, default_root_dir=tmp_path, **QUIET
        )
        model = module(build)
        trainer.fit(model, loader(10))
        runs.append(list(model.parameters()))
    same(kind, *runs)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_lightning_says_so_where_it_cannot_clip(lightning, tmp_path):
    """In float16 the gradients are still scaled when it would: its own message, before anything has moved."""
    package, module = lightning
    more = {"gradient_clip_val": 0.3, "enable_checkpointing": False, "default_root_dir": tmp_path}
    trainer = package.Trainer(max_epochs=1, **more, **QUIET, **precision("16-mixed"))
    model = module(lambda params: FusedSGD(params, LR))
    with pytest.raises(
        RuntimeError, match="FusedSGD, does not allow for gradient clipping because it performs unscaling"
    ):
        trainer.fit(model, loader(3))
    assert_same_bits(list(model.parameters()), list(network().parameters()))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", ["32-true", "16-mixed"])
@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_lightning_resumes_bit_for_bit(kind, options, name, lightning, tmp_path):
    """From its checkpoint in the middle: the loop's state, the previous gradient, a scheduler of torch's, the scale."""
    package, module = lightning

    def configure(params):
        more = {"schedule": schedules.alignment(kappa=0.5), "max_grad_norm": 0.5, "track": "alignment"}
        optimizer = kind(params, **options, **more)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": every_step(optimizer), "interval": "step"}}

    def fit(epochs, checkpoint=None):
        trainer = package.Trainer(
            max_epochs=epochs, enable_checkpointing=False, default_root_dir=tmp_path, **QUIET, **precision(name)
        )
        model = module(configure)
        trainer.fit(model, loader(7), ckpt_path=checkpoint)
        return trainer, model

    whole, model = fit(3)
    half, _ = fit(2)
    half.save_checkpoint(tmp_path / "half.ckpt")
    rest, resumed = fit(3, tmp_path / "half.ckpt")
    [first], [second] = whole.optimizers, rest.optimizers
    assert_same_bits(list(resumed.parameters()), list(model.parameters()))
    assert_same_bits(states(second, resumed.parameters()), states(first, model.parameters()))
    assert second.history()["lr"].tolist() == first.history()["lr"][-7:].tolist()
    assert second.history()["alignment"].tolist() == first.history()["alignment"][-7:].tolist()
    assert first.param_groups[0]["lr"] == second.param_groups[0]["lr"] == pytest.approx(options["lr"] * 0.9**21)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_lightning_freezes_and_thaws_layers(lightning, tmp_path):
    """Its callback adds a group in mid-run, and on resuming puts new lists of parameters into the groups."""
    package, module = lightning
    from lightning.pytorch.callbacks import BaseFinetuning

    class Thaw(BaseFinetuning):
        def freeze_before_training(self, pl_module):
            self.freeze(pl_module.network[0])

        def finetune_function(self, pl_module, epoch, optimizer):
            if epoch == 1:
                self.unfreeze_and_add_param_group(pl_module.network[0], optimizer, lr=0.01)

    def fit(kind, epochs, checkpoint=None, **more):
        trainer = package.Trainer(
            max_epochs=epochs, callbacks=[Thaw()], enable_checkpointing=False, default_root_dir=tmp_path, **QUIET
        )
        model = module(lambda params: kind([p for p in params if p.requires_grad], LR, momentum=0.9, **more))
        trainer.fit(model, loader(5), ckpt_path=checkpoint)
        return trainer, model

    runs = []
    for kind, more in ((FusedSGD, {}), (torch.optim.SGD, {"foreach": False})):
        whole, model = fit(kind, 3, **more)
        half, _ = fit(kind, 2, **more)
        half.save_checkpoint(tmp_path / "half.ckpt")
        rest, resumed = fit(kind, 3, tmp_path / "half.ckpt", **more)
        assert len(whole.optimizers[0].param_groups) == len(rest.optimizers[0].param_groups) == 2
        runs.append([list(model.parameters()), list(resumed.parameters())])
    assert_same_bits(*runs)


# ---- torch's own schedulers ----

BETAS = [
    pytest.param(FusedAdamW, {"lr": 0.01}, "betas", id="adamw"),
    pytest.param(FusedSGD, {"lr": LR, "momentum": 0.9}, "momentum", id="sgd"),
]
CYCLED = {
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.2, total_steps=41, base_momentum=0.8, max_momentum=0.95),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.001, 0.1, step_size_up=5, cycle_momentum=True),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, Lambda()),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=2, factor=0.5),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o,
        [
            lr_scheduler.LinearLR(o, 0.1, total_iters=5),
            lr_scheduler.CosineAnnealingLR(o, 12),
            lr_scheduler.ExponentialLR(o, 0.95),
        ],
        [5, 17],
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.LinearLR(o, 0.1, total_iters=8), lr_scheduler.StepLR(o, 6, gamma=0.7)]
    ),
}


class Lambda:
    """A callable object, which LambdaLR saves along."""

    def __call__(self, step):
        return 1.0 / (1.0 + 0.1 * step)


def scheduled(optimizer, scheduler, params, grads, begin=0):
    """Train; return the rate and what is cycled of each step's first group."""
    rows = []
    for step, row in enumerate(grads, start=begin):
        set_grads(params, row)
        group = optimizer.param_groups[0]
        rows.append((float(group["lr"]), group.get("momentum"), group.get("betas")))
        optimizer.step()
        plateau = isinstance(scheduler, lr_scheduler.ReduceLROnPlateau)
        scheduler.step(*[1.0 + step % 3] if plateau else ())
    return rows


@pytest.mark.filterwarnings("ignore:.*lr_scheduler")  # torch's SequentialLR calls what torch warns of
@pytest.mark.parametrize("as_tensor", [False, True], ids=["float", "tensor"])
@pytest.mark.parametrize("make", CYCLED.values(), ids=CYCLED)
@pytest.mark.parametrize(("kind", "options", "cycled"), BETAS)
def test_torch_s_schedulers_cycle_and_resume_as_on_torch_s(kind, options, cycled, make, as_tensor):
    shapes, (steps, stop) = [(7,), (33, 5)], (40, 13)

    def build(cls, params, **more):
        lr = torch.tensor(options["lr"], dtype=torch.float64) if as_tensor else options["lr"]
        optimizer = cls(params, **options | {"lr": lr}, **more)
        return optimizer, make(optimizer)

    params, twins = parameters(shapes), parameters(shapes)
    grads = gradients(shapes, steps)
    optimizer, scheduler = build(kind, params)
    loop, other = build(TORCH[kind], twins, foreach=False)
    rows = scheduled(optimizer, scheduler, params, grads[:stop])
    saved, middle = copy.deepcopy((optimizer.state_dict(), scheduler.state_dict())), copy.deepcopy(params)
    rows += scheduled(optimizer, scheduler, params, grads[stop:], stop)
    assert rows == scheduled(loop, other, twins, grads)
    assert optimizer.history()["lr"].tolist() == [lr for lr, *_ in rows]
    assert len({lr for lr, *_ in rows}) > 3
    if isinstance(scheduler, lr_scheduler.OneCycleLR | lr_scheduler.CyclicLR):
        assert len({row[1 if cycled == "momentum" else 2] for row in rows}) > 5
    same(kind, params, twins)

    second, again = build(kind, middle)
    second.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    assert scheduled(second, again, middle, grads[stop:], stop) == rows[stop:]
    assert_same_bits(middle, params)


# ---- TensorBoard ----


def written(folder):
    """Read the event files back: {tag: {step: value}}."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def rows_of(optimizer, prefix="optimizer/"):
    """The same from the history; event files keep float32."""
    history = optimizer.history()
    steps = history.pop("step").astype(int).tolist()
    return {
        prefix + name: list(zip(steps, map(float, x.astype("float32")), strict=True)) for name, x in history.items()
    }


def test_tensorboard_gets_every_step_once(tmp_path):
    pytest.importorskip("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    params = parameters([(7,), (5, 3)])
    optimizer = FusedSGD(params, LR, momentum=0.9, schedule=schedules.linear(30), track=("grad_norm", "direction"))
    grads = gradients([(7,), (5, 3)], 20)
    with SummaryWriter(str(tmp_path / "a")) as writer, SummaryWriter(str(tmp_path / "b")) as late:
        assert log_history(writer, optimizer) == 0
        counts = []
        for end in (1, 4, 4, 20):
            train(optimizer, params, grads[sum(counts) : end])
            counts.append(log_history(writer, optimizer))
        assert counts == [1, 3, 0, 16]
        assert log_history(late, optimizer, prefix="") == 20
    assert written(tmp_path / "a") == rows_of(optimizer)
    assert written(tmp_path / "b") == rows_of(optimizer, "")
    assert set(rows_of(optimizer, "")) == {"lr", "grad_norm", "direction_cosine", "grad_norm_l1", "skipped"}


class Noted:
    """A writer that keeps what it is given."""

    def __init__(self):
        self.scalars = []

    def add_scalar(self, tag, value, step):
        self.scalars.append((tag, step, value))

    def steps(self):
        return [step for tag, step, _ in self.scalars if tag == "optimizer/lr"]


def test_a_log_after_a_rollback_and_after_the_history_has_gone_round():
    params, grads = parameters([(7,)]), gradients([(7,)], 40)
    optimizer, other, writer = FusedSGD(params, LR, history_size=8), FusedSGD(params, LR), Noted()
    train(optimizer, params, grads[:5])
    assert log_history(writer, optimizer) == 5
    saved = copy.deepcopy(optimizer.state_dict())
    train(optimizer, params, grads[5:7])
    assert log_history(writer, optimizer) == 2
    optimizer.load_state_dict(saved)
    assert log_history(writer, optimizer) == 0
    train(optimizer, params, grads[7:10])
    optimizer.param_groups[0]["lr"] = 0.3
    train(optimizer, params, grads[10:14])
    assert log_history(writer, optimizer) == 7  # from step 6 on again
    train(optimizer, params, grads[14:34])
    assert log_history(writer, optimizer) == 8  # what is left of 20
    train(other, params, grads[:2])
    assert log_history(writer, other) == 2
    assert writer.steps() == [*range(1, 8), *range(6, 13), *range(25, 33), 1, 2]


def test_a_log_keeps_neither_writer_nor_optimizer_alive():
    params = parameters([(7,)])
    writer, optimizer = Noted(), train(FusedSGD(params, LR), params, gradients([(7,)], 3))
    assert log_history(writer, optimizer) == 3
    alive = [weakref.ref(writer), weakref.ref(optimizer)]
    del writer, optimizer
    gc.collect()
    assert [reference() for reference in alive] == [None, None]


# ---- transformers.Trainer ----


@pytest.fixture
def language_model(tmp_path, monkeypatch):
    """A function that trains a tiny transformer with Trainer, from a checkpoint where one is given."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    transformers.logging.set_verbosity_error()
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(2, 32, (48, 16), generator=generator)
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    shape = {"vocab_size": 32, "n_positions": 16, "n_embd": 16, "n_layer": 1, "n_head": 2}

    def run(optimizer_of, scheduler_of, steps, name, checkpoint=None, change=lambda trainer: None, **more):
        torch.manual_seed(0)
        config = transformers.GPT2Config(**shape, bos_token_id=0, eos_token_id=1, tie_word_embeddings=False)
        model = transformers.GPT2LMHeadModel(config)
        optimizer = optimizer_of(model.parameters())
        arguments = transformers.TrainingArguments(
            str(tmp_path / name),
            max_steps=steps,
            save_steps=4,
            per_device_train_batch_size=4,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            logging_strategy="no",
            **more,
        )
        scheduler = scheduler_of(optimizer) if scheduler_of else None
        trainer = transformers.Trainer(model, arguments, train_dataset=rows, optimizers=(optimizer, scheduler))
        change(trainer)
        trainer.train(resume_from_checkpoint=str(tmp_path / checkpoint) if checkpoint else None)
        return list(model.parameters()), optimizer, trainer

    return run


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_trainer_trains_as_with_torch_s(kind, options, language_model):
    """Its clip and ours, one in the place of the other; accumulated batches; its own scheduler, and a user's."""
    for scheduler in (None, every_step):
        ours, optimizer, _ = language_model(
            lambda params: kind(params, max_grad_norm=0.5, **options),
            scheduler,
            6,
            "a",
            max_grad_norm=0.0,
            gradient_accumulation_steps=2,
        )
        theirs, *_ = language_model(
            lambda params: TORCH[kind](params, foreach=False, **options),
            scheduler,
            6,
            "b",
            max_grad_norm=0.5,
            gradient_accumulation_steps=2,
        )
        assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        history = optimizer.history()
        assert history["step"].tolist() == [1, 2, 3, 4, 5, 6]
        assert history["grad_norm"].max() > 0.5
        want = [1 - step / 6 if scheduler is None else 0.9**step for step in range(6)]
        assert history["lr"].tolist() == pytest.approx([options["lr"] * factor for factor in want], rel=1e-9)


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_trainer_resumes_bit_for_bit(kind, options, bf16, language_model):
    """From its own checkpoint: weights_only, in mid-epoch, with dropout; a closed loop and the previous gradient."""

    def build(params):
        more = {"schedule": schedules.alignment(kappa=0.5), "max_grad_norm": 0.5, "track": "alignment"}
        return kind(params, **options, **more)

    more = {"max_grad_norm": 0.0, "bf16": bf16}
    whole, first, _ = language_model(build, every_step, 10, "whole", **more)
    rest, second, _ = language_model(build, every_step, 10, "rest", "whole/checkpoint-4", **more)
    assert_same_bits(rest, whole)
    assert_same_bits(states(second, rest), states(first, whole))
    assert second.history()["alignment"].tolist() == first.history()["alignment"][4:].tolist()
    assert second.history()["lr"].tolist() == first.history()["lr"][4:].tolist()
    assert len(set(first.history()["lr"].tolist())) == 10


@pytest.mark.parametrize("wrap", [False, True], ids=["prepared", "wrapped"])
@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_trainer_s_scheduler_stands_still_over_a_skipped_step(kind, options, wrap, language_model):
    """fp16 is for devices to Trainer: a scaler is put in by hand. Its clip is made on unscaled gradients."""

    def scaled(trainer):
        trainer.accelerator.scaler = GradScaler("cpu", init_scale=2.0**127)

    def wrapped(trainer):
        scaled(trainer)
        trainer.optimizer = as_ours(trainer.accelerator, trainer.optimizer)

    ours, optimizer, _ = language_model(
        lambda params: kind(params, **options), every_step, 8, "a", change=wrapped if wrap else scaled
    )
    theirs, _, trainer = language_model(
        lambda params: TORCH[kind](params, foreach=False, **options), every_step, 8, "b", change=scaled
    )
    assert trainer.accelerator.scaler.get_scale() == 2.0**124
    assert optimizer.history()["lr"].tolist() == pytest.approx([options["lr"] * 0.9**step for step in range(5)])
    assert optimizer.stats["skipped"] == (3 if wrap else 0)
    same(kind, ours, theirs)


# ---- torch.compile ----


def test_a_compiled_model_with_the_step_outside(backend):
    """Its parameters are the module's own, and a step in place does not compile anew."""
    torch._dynamo.reset()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model, twin = network(), network()
    compiled = torch.compile(model, backend=count)
    more = {"momentum": 0.9, "schedule": schedules.alignment(), "max_grad_norm": 0.5, "backend": backend}
    optimizer, other = FusedSGD(compiled.parameters(), LR, **more), FusedSGD(twin.parameters(), LR, **more)
    for x, y in batches(8):
        for forward, own in ((compiled, optimizer), (twin, other)):
            nn.functional.cross_entropy(forward(x), y).backward()
            own.step()
            own.zero_grad()
    torch._dynamo.reset()
    assert len(graphs) == 1
    assert_same_bits(list(model.parameters()), list(twin.parameters()))
    assert optimizer.stats["step"] == 8


@pytest.mark.parametrize("with_closure", [False, True], ids=["step", "closure"])
@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_a_compiled_step_is_the_step(kind, options, with_closure, backend):
    """Nothing of it can be traced, so it runs as it is; hooks, schedulers and the scaler's attributes included."""
    torch._dynamo.reset()
    results = []
    for wrap in (torch.compile, lambda step: step):
        model, calls = network(), []
        more = {"schedule": schedules.alignment(), "max_grad_norm": 0.5, "backend": backend}
        optimizer = kind(model.parameters(), **options, **more)
        optimizer.register_step_post_hook(lambda *_, calls=calls: calls.append("after"))
        scheduler, step = every_step(optimizer), wrap(optimizer.step)
        for n, (x, y) in enumerate(batches(8)):

            def closure(optimizer=optimizer, model=model, x=x, y=y):
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(model(x), y)
                loss.backward()
                return loss

            loss = closure()
            if n == 5:
                optimizer.found_inf = torch.ones(1)
            got = step(closure) if with_closure else step()
            assert got == loss if with_closure else got is None
            if n == 5:
                del optimizer.found_inf
            scheduler.step()
        assert optimizer.stats["skipped"] == 1
        results.append(
            [list(model.parameters()), states(optimizer, model.parameters()), optimizer.stats["lr"], len(calls) == 8]
        )
    torch._dynamo.reset()
    assert_same_bits(*results)
    assert results[0][-1]


# ---- Copies of a model together with its optimizer ----


def _through_pickle(pair):
    return pickle.loads(pickle.dumps(pair))


def _through_a_file(pair):
    file = io.BytesIO()
    torch.save(pair, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, _through_pickle, _through_a_file], ids=lambda f: f.__name__)
@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_a_model_and_its_optimizer_are_copied_together(kind, options, copied):
    """With a scheduler of torch's, its hooks and a rate in a tensor, after some steps, and as they go on apart."""
    model = network()
    lr = torch.tensor(options["lr"], dtype=torch.float64)
    more = {"schedule": schedules.alignment(), "track": "alignment", "max_grad_norm": 0.5}
    optimizer = kind(model.parameters(), **options | {"lr": lr}, **more)
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.9)

    def go_on(model, optimizer, scheduler, seed):
        for x, y in batches(4, seed):
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        return [list(model.parameters()), states(optimizer, model.parameters()), optimizer.stats["lr"]]

    go_on(model, optimizer, scheduler, 1)
    others = copied((model, optimizer, scheduler))
    assert others[1].param_groups[0]["lr"] is not optimizer.param_groups[0]["lr"]
    assert {id(p) for p in others[0].parameters()} == {id(p) for p in others[1].param_groups[0]["params"]}
    before = bits([list(model.parameters()), states(optimizer, model.parameters()), optimizer._controller.control])
    apart = go_on(*others, 2)
    assert (
        bits([list(model.parameters()), states(optimizer, model.parameters()), optimizer._controller.control]) == before
    )
    assert_same_bits(apart, go_on(model, optimizer, scheduler, 2))


# ---- The examples ----


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "needs", "says"),
    [
        ("mixed_precision", ["tensorboard"], "of the schedule's 80 made"),
        ("torch_schedulers", [], "momentum 0.85 to 0.95"),
        ("compiled_model", [], "120 steps, the last rate"),
        ("accelerate_loop", ["accelerate"], "100 updates of 2 batches each"),
        ("hf_trainer", ["transformers", "accelerate"], "resumed in the middle: same bits"),
        ("lightning_trainer", ["lightning", "tensorboard"], "200 steps written for TensorBoard"),
    ],
    ids=lambda value: value if isinstance(value, str) and value.islower() and " " not in value else "",
)
def test_the_examples_run(name, needs, says, capsys, monkeypatch):
    for package in [*needs, "sklearn"]:
        pytest.importorskip(package)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))  # without a compiler
    runpy.run_path(str(Path(__file__).parents[1] / "examples" / f"{name}.py"), run_name="__main__")
    assert says in capsys.readouterr().out
