"""torch's own table of optimizers, with ours in torch's place: what its generic tests ask of every optimizer.

The inputs, the error inputs and the schedulers come from ``torch.testing._internal.common_optimizers`` of the torch
that is installed. What is refused here and not there is named, with the reason, in the tables below.
"""

import copy
import functools
import inspect
import io
import itertools
import re
import warnings

import hypothesis
import pytest
import torch
from conftest import TORCH, assert_close, assert_same_bits
from torch import Tensor
from torch.nn import Parameter
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR

from lrkernels import FusedAdamW, FusedSGD

pytest.importorskip("expecttest")  # torch's test utilities import it
common_optimizers = pytest.importorskip("torch.testing._internal.common_optimizers")
torch.backends.__allow_nonbracketed_mutation_flag = True  # these utilities forbid it for the whole process,
hypothesis.settings.load_profile("lrkernels")  # and bring a profile of their own

INFO = {info.optim_cls: info for info in common_optimizers.optim_db}
KINDS = [FusedSGD, FusedAdamW]
DTYPES = [torch.float32, torch.float64]
FLAGS = {"default": {}, "forloop": {"foreach": False, "fused": False}, "foreach": {"foreach": True}, "fused": {}}
FLAGS["fused"] = {"fused": True}


def inputs(device):
    """Rows of the table of inputs: torch's for a device, whose tensors are all on the host."""
    for kind in KINDS:
        for row in INFO[TORCH[kind]].optim_inputs_func(device, torch.float32):
            assert row.params is None
            yield pytest.param(kind, row.kwargs, id=f"{kind.__name__}-{row.desc}")


def takes_tensors(options):
    return any(isinstance(beta, Tensor) for beta in options.get("betas", ()))


ROWS = list(inputs("cpu"))
CUDA_ROWS = [row for row in inputs("cuda") if row.id not in {row.id for row in ROWS}]
ACCEPTED = ROWS + [row for row in CUDA_ROWS if not takes_tensors(row.values[1])]
REFUSED = [row for row in CUDA_ROWS if takes_tensors(row.values[1])]


def make(kind, params, options, **more):
    return kind(params, **copy.deepcopy(options), **more)


def theirs(kind, params, options):
    """Torch's for-loop. capturable is only for devices, and a float32 rate is rounded anew in all that is made of it:
    it is given as the float64 that it is.
    """
    options = {key: value for key, value in copy.deepcopy(options).items() if key != "capturable"}
    if isinstance(lr := options.get("lr"), Tensor):
        options["lr"] = lr.double()
    return TORCH[kind](params, foreach=False, **options)


def same(kind, got, want, dtype):
    """SGD has torch's bits; AdamW's roots are the correctly rounded ones."""
    if kind is FusedSGD:
        assert_same_bits(got, want)
    else:
        rtol, atol = {torch.float32: (1e-5, 2e-6), torch.float64: (1e-13, 1e-14)}[dtype]
        assert_close(got, want, rtol=rtol, atol=atol)


def state_of(optimizer):
    """The states by position of the parameter, with torch's keys."""
    rows = optimizer.state_dict()["state"]
    return {
        i: {k: v for k, v in row.items() if k not in ("step", "prev_grad") and v is not None}
        for i, row in rows.items()
        if any(v is not None for v in row.values())
    }


def model_and_data(dtype):
    torch.manual_seed(1)
    model = torch.nn.Sequential(
        torch.nn.Linear(2, 3), torch.nn.Sigmoid(), torch.nn.Linear(3, 1), torch.nn.Sigmoid()
    ).to(dtype)
    return model, torch.tensor([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]], dtype=dtype), torch.ones(3, 1, dtype=dtype)


# ---- Inputs ----


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
@pytest.mark.parametrize(("kind", "options"), ACCEPTED)
def test_every_input_steps_as_torch_s_for_loop(kind, options, flags, dtype):
    """Closures, a schedule, gradients of zero and gradients of None; parameters and states after every step."""
    pair = []
    for build in (lambda params: make(kind, params, options, **flags), lambda params: theirs(kind, params, options)):
        model, data, target = model_and_data(dtype)
        params = [*model.parameters(), Parameter(torch.randn(2, 3, dtype=dtype), requires_grad=False)]
        optimizer = build(params)
        pair.append((model, data, target, params, optimizer, StepLR(optimizer, 2, gamma=0.5)))
    for step in range(7):
        losses = []
        for model, data, target, params, optimizer, scheduler in pair:

            def closure(optimizer=optimizer, model=model, data=data, target=target, params=params, step=step):
                optimizer.zero_grad()
                loss = (model(data) - target).square().mean()
                loss.backward()
                if step == 3:
                    params[0].grad = None
                if step == 4:
                    params[2].grad.zero_()
                return loss

            losses.append(optimizer.step(closure))
            scheduler.step()
        (*_, params, optimizer, _), (*_, twins, loop, _) = pair
        same(kind, losses[0], losses[1], dtype)
        same(kind, params, twins, dtype)
        same(kind, state_of(optimizer), state_of(loop), dtype)
        assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(float(loop.param_groups[0]["lr"]), rel=1e-6)


@pytest.mark.parametrize(("kind", "options"), REFUSED)
def test_betas_in_tensors_are_refused(kind, options):
    """Torch takes them for captured graphs. Here the host compares a group's numbers at every step, and would wait."""
    with pytest.raises(ValueError, match=r"^lrkernels: betas must be two numbers, got .*tensor"):
        make(kind, [torch.zeros(3)], options)


@pytest.mark.parametrize(("kind", "options"), ROWS)
def test_differentiable_is_refused(kind, options):
    """An update in one call has no graph through it."""
    with pytest.raises(ValueError, match=r"^lrkernels: differentiable=True is not supported; use torch"):
        make(kind, [torch.zeros(3)], options, differentiable=True)


@pytest.mark.parametrize(("kind", "options"), ROWS)
def test_complex_parameters_are_refused(kind, options):
    """Torch splits them; here the user does, with view_as_real."""
    p = Parameter(torch.zeros(3, dtype=torch.complex64))
    with pytest.raises(ValueError, match=r"^lrkernels: .* takes no complex parameters; use torch.view_as_real"):
        make(kind, [p], options)
    q = Parameter(torch.view_as_real(p.detach()))
    optimizer = make(kind, [q], options)
    q.grad = torch.ones_like(q)
    optimizer.step()
    assert (p.detach() != 0).all()  # the same memory


@pytest.mark.parametrize(("kind", "options"), ROWS)
def test_sparse_gradients_are_refused(kind, options):
    """Torch's SGD takes them; its AdamW does not either."""
    embedding = torch.nn.Embedding(5, 3, sparse=True)
    optimizer = make(kind, embedding.parameters(), options)
    embedding(torch.tensor([1, 2])).sum().backward()
    before = embedding.weight.detach().clone()
    with pytest.raises(ValueError, match=r"^lrkernels: .* takes no sparse gradients, .*; use sparse=False, or torch"):
        optimizer.step()
    assert_same_bits(embedding.weight, before)
    assert not optimizer.state


# ---- Error inputs ----

OWN_WORDS = {  # torch's description -> our message, where it is not torch's own base class that speaks
    "Tensor lr must be 1-element": r"^lrkernels: lr must be a float or a tensor of one element, got shape \(2,\)",
    "momentum should be between 0 and 1": "^lrkernels: momentum must be finite and >= 0, got -0.5",
    "beta1 should be between 0 and 1": r"^lrkernels: betas\[0\] must be in \[0, 1\), got 1.0",
    "weight_decay should > 0": "^lrkernels: weight_decay must be finite and >= 0, got -1",
    "betas must be either both floats or both Tensors": "^lrkernels: betas must be two numbers, got .*tensor",
    r"betas\[0\] as a Tensor is not supported for capturable=False and foreach=True": "^lrkernels: betas must be two",
}
NO_ERROR = {"lr as Tensor doesn't work with foreach & not capturable"}  # there is no foreach here to be in the way


ERRORS = [
    pytest.param(kind, row, id=f"{kind.__name__}-{n}-{row.optimizer_error_input.desc}")
    for kind in KINDS
    for n, row in enumerate(INFO[TORCH[kind]].optim_error_inputs_func("cpu", torch.float32))
]


@pytest.mark.parametrize(("kind", "row"), ERRORS)
def test_every_error_input(kind, row):
    assert row.error_on == common_optimizers.OptimizerErrorEnum.CONSTRUCTION_ERROR
    about, options = row.optimizer_error_input.desc, row.optimizer_error_input.kwargs
    params = row.optimizer_error_input.params or [Parameter(torch.randn(2, 3)) for _ in range(2)]
    if about in NO_ERROR:
        optimizer = make(kind, params, options)
        twins = [p.detach().clone() for p in params]
        loop = theirs(kind, twins, {key: value for key, value in options.items() if key != "foreach"})
        for p, twin in zip(params, twins, strict=True):
            p.grad = twin.grad = torch.randn_like(p)
        optimizer.step()
        loop.step()
        same(kind, params, twins, torch.float32)
    elif issubclass(row.error_type, Warning):
        with pytest.warns(row.error_type, match=row.error_regex):
            make(kind, params, options)
    else:
        with pytest.raises(row.error_type, match=OWN_WORDS.get(about, row.error_regex)):
            make(kind, params, options)


# ---- torch's schedulers ----


SCHEDULERS = [
    pytest.param(kind, row, id=f"{kind.__name__}-{n}")
    for kind in KINDS
    for n, row in enumerate(INFO[torch.optim.SGD].scheduler_inputs)  # AdamW's own is one of them
]


@pytest.mark.parametrize("lr", [0.01, torch.tensor(0.01, dtype=torch.float64)], ids=["float", "tensor"])
@pytest.mark.parametrize(("kind", "row"), SCHEDULERS)
def test_every_row_of_schedulers_descends_as_with_torch_s(kind, row, lr):
    """Two groups with rates of their own; contiguous parameters and others."""
    lists = []
    for cls in (kind, TORCH[kind]):
        torch.manual_seed(1)
        weight, bias = Parameter(torch.randn(5, 10).t().contiguous().t()), Parameter(torch.randn(10))
        x = torch.randn(5)
        more = {} if cls is kind else {"foreach": False}
        rate = lr.clone() if isinstance(lr, Tensor) else lr
        optimizer = cls([{"params": [weight]}, {"params": [bias], "lr": 0.001}], lr=rate, **more)
        made = [make_scheduler(optimizer) for make_scheduler in row]
        trace, losses = [], []
        for _ in range(20):
            optimizer.zero_grad()
            loss = (x @ weight + bias).square().sum()
            loss.backward()
            optimizer.step()
            for scheduler in made:
                scheduler.step(loss.item()) if isinstance(scheduler, ReduceLROnPlateau) else scheduler.step()
            losses.append(loss.item())
            trace.append([float(group["lr"]) for group in optimizer.param_groups])
        lists.append((trace, [weight, bias], losses))
    (rates, params, losses), (want, twins, _) = lists
    assert rates == want
    assert losses[-1] < losses[0]
    same(kind, params, twins, torch.float32)


# ---- Groups ----


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("kind", "options"), ROWS)
def test_groups_with_a_rate_and_a_decay_of_their_own(kind, options, dtype):
    """And groups without any parameter, before and between."""
    results = []
    for build in (make, theirs):
        model, data, target = model_and_data(dtype)
        params = list(model.parameters())
        groups = [
            {"params": []},
            {"params": params[:1], "weight_decay": 0.0},
            {"params": [], "lr": 7.0},
            {"params": params[1:], "lr": 0.03},
        ]
        optimizer = build(kind, groups, options)
        for _ in range(4):
            optimizer.zero_grad()
            (model(data) - target).square().mean().backward()
            optimizer.step()
        results.append((params, optimizer))
    (params, optimizer), (twins, loop) = results
    same(kind, params, twins, dtype)
    mine, other = optimizer.state_dict(), loop.state_dict()
    assert [g["params"] for g in mine["param_groups"]] == [g["params"] for g in other["param_groups"]]
    same(kind, state_of(optimizer), state_of(loop), dtype)


@pytest.mark.parametrize(("kind", "options"), ROWS)
def test_parameters_of_several_dtypes_in_one_group(kind, options):
    kinds = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.float32]
    params = [Parameter(torch.linspace(-1, 1, 37).to(dtype)) for dtype in kinds]
    if kind is FusedAdamW:
        options = options | {"eps": 0.1}  # 1e-8 is nothing in float16
    twins = [p.detach().to(torch.float64 if p.dtype == torch.float64 else torch.float32) for p in params]
    optimizer, loop = make(kind, params, options), theirs(kind, twins, options)
    for step in range(3):
        for n, (p, twin) in enumerate(zip(params, twins, strict=True)):
            p.grad = torch.sin(torch.arange(37) * (n + 1.0) + step).to(p.dtype)
            twin.grad = p.grad.to(twin.dtype)
        optimizer.step()
        loop.step()
    for p, twin in zip(params, twins, strict=True):
        rounding = torch.finfo(p.dtype).eps * 8
        torch.testing.assert_close(p.detach(), twin.to(p.dtype), rtol=rounding, atol=rounding)


@pytest.mark.parametrize(("kind", "options"), ROWS)
def test_an_empty_gradient(kind, options):
    params = [torch.empty(0, 1, requires_grad=True), torch.ones(2, requires_grad=True)]
    optimizer = make(kind, params, options)
    for _ in range(3):
        optimizer.zero_grad()
        sum(p.square().sum() for p in params).backward()
        optimizer.step()
    assert (params[1] != 1).all()


# ---- Steps that do nothing ----


@pytest.mark.parametrize("fused_", [None, True])
@pytest.mark.parametrize(("kind", "options"), ROWS)
def test_a_step_without_gradients_is_none(kind, options, fused_):
    params = [Parameter(torch.randn(2, 3, requires_grad=False)) for _ in range(2)]
    before = [p.detach().clone() for p in params]
    optimizer = make(kind, params, options, fused=fused_)
    optimizer.step()
    assert_same_bits(params, before)
    assert not optimizer.state


@pytest.mark.parametrize(("kind", "options"), ROWS)
def test_gradients_of_zero_move_nothing_but_the_decay(kind, options):
    params = [Parameter(torch.randn(2, 3)) for _ in range(2)]
    before = [p.detach().clone() for p in params]
    optimizer = make(kind, params, options | {"weight_decay": 0.0})
    for _ in range(2):
        for p in params:
            p.grad = torch.zeros_like(p)
        optimizer.step()
    assert_same_bits(params, before)


# ---- Hooks ----


@pytest.mark.parametrize(("kind", "options"), ROWS)
def test_all_step_hooks_in_torch_s_order(kind, options):
    from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

    orders = []
    for build in (make, theirs):
        p, order = Parameter(torch.ones(3)), []
        p.grad = torch.ones_like(p)
        optimizer = build(kind, [p], options)
        handles = [
            register_optimizer_step_pre_hook(lambda *_, order=order: order.append("all, before")),
            register_optimizer_step_post_hook(lambda *_, order=order: order.append("all, after")),
            optimizer.register_step_pre_hook(lambda *_, order=order: order.append("before")),
            optimizer.register_step_post_hook(lambda *_, order=order: order.append("after")),
        ]
        for _ in range(2):
            optimizer.step()
        for handle in handles:
            handle.remove()
        optimizer.step()
        orders.append(order)
    assert orders[0] == orders[1]
    assert len(orders[0]) == 8


@pytest.mark.parametrize("when", ["pre", "post"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_hook_on_all_optimizers_alone(kind, when):
    from torch.optim import optimizer

    calls = []
    p = Parameter(torch.ones(3))
    p.grad = torch.ones_like(p)
    handle = getattr(optimizer, f"register_optimizer_step_{when}_hook")(lambda *_: calls.append(when))
    try:
        kind([p]).step()
    finally:
        handle.remove()
    assert calls == [when]


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_hook_may_replace_the_arguments(kind):
    p = Parameter(torch.ones(3))
    p.grad = torch.ones_like(p)
    optimizer = kind([p])
    optimizer.register_step_pre_hook(lambda optimizer, args, kwargs: ((optimizer, lambda: 1.0), {}))
    assert optimizer.step() == 1.0
    assert optimizer.step(lambda: 2.0) == 1.0


@pytest.mark.parametrize("kind", KINDS)
def test_hooks_of_a_subclass_run_once_a_step(kind):
    class Own(kind):
        def step(self, closure=None):
            return super().step(closure)

    calls = []
    p = Parameter(torch.ones(3))
    p.grad = torch.ones_like(p)
    optimizer = Own([p])
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    optimizer.step()
    assert calls == ["before", "after"]


@pytest.mark.parametrize("kind", KINDS)
def test_hooks_run_once_a_step_where_the_class_s_step_is_wrapped(kind, monkeypatch):
    inner, calls = kind.step, []
    monkeypatch.setattr(kind, "step", functools.wraps(inner)(lambda self, closure=None: inner(self, closure)))
    p = Parameter(torch.ones(3))
    p.grad = torch.ones_like(p)
    optimizer = kind([p])
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.step()
    assert calls == ["before"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_profiler_sees_the_step_by_torch_s_name(kind):
    p = Parameter(torch.ones(3))
    p.grad = torch.ones_like(p)
    optimizer = kind([p])
    optimizer.step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.step()
    assert [event.name for event in profile.events()].count(f"Optimizer.step#{kind.__name__}.step") == 1


# ---- State ----


def trained(kind, options, build=make, steps=3, dtype=torch.float32):
    model, data, target = model_and_data(dtype)
    optimizer = build(kind, model.parameters(), options)
    go_on(model, data, target, optimizer, steps)
    return model, data, target, optimizer


def go_on(model, data, target, optimizer, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        (model(data) - target).square().mean().backward()
        optimizer.step()


def loaded(kind, options, saved, model, build=make):
    """A new optimizer of a copy of the model, with the saved state."""
    twin = copy.deepcopy(model)
    optimizer = build(kind, twin.parameters(), options)
    optimizer.load_state_dict(saved)
    return twin, optimizer


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("kind", "options"), ACCEPTED)
def test_a_saved_state_goes_on_as_if_it_had_not_been_saved(kind, options, dtype):
    """Through a file, with weights_only, and with and without the names of the parameters."""
    model, data, target, optimizer = trained(kind, options, dtype=dtype)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    twin, other = loaded(kind, options, torch.load(file, weights_only=True), model)
    for pair in ((model, optimizer), (twin, other)):
        go_on(pair[0], data, target, pair[1], 3)
    assert_same_bits(list(twin.parameters()), list(model.parameters()))
    assert_same_bits(other.state_dict()["state"], optimizer.state_dict()["state"])


@pytest.mark.parametrize("named", [(True, False), (False, True), (True, True)], ids=["from", "to", "both"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_state_with_names_loads_into_one_without_and_back(kind, named):
    model, data, target = model_and_data(torch.float32)
    twin = copy.deepcopy(model)
    first, second = (
        kind(m.named_parameters() if with_names else m.parameters(), lr=0.1)
        for m, with_names in zip((model, twin), named, strict=True)
    )
    go_on(model, data, target, first, 3)
    second.load_state_dict(first.state_dict())
    twin.load_state_dict(model.state_dict())
    go_on(model, data, target, first, 2)
    go_on(twin, data, target, second, 2)
    assert_same_bits(list(twin.parameters()), list(model.parameters()))
    names = [f"{layer}.{name}" for layer in (0, 2) for name in ("weight", "bias")]
    assert second.state_dict()["param_groups"][0]["param_names"] == names  # as in torch: whoever knows them


@pytest.mark.parametrize("build", [make, theirs], ids=["ours", "torch"])
@pytest.mark.parametrize(("kind", "options"), ROWS)
def test_an_older_state_dict_without_the_flags_of_today(kind, options, build):
    """Flags that torch's optimizers have learnt over the years, which an old checkpoint lacks."""
    model, data, target, optimizer = trained(kind, options, build)
    saved = copy.deepcopy(optimizer.state_dict())
    flags = [flag for flag in INFO[TORCH[kind]].not_og_supported_flags if flag in saved["param_groups"][0]]
    assert "maximize" in flags
    for group, flag in itertools.product(saved["param_groups"], flags):
        del group[flag]
    twin, other = loaded(kind, {key: value for key, value in options.items() if key not in flags}, saved, model)
    go_on(twin, data, target, other, 3)
    kept = {key: value for key, value in options.items() if key not in flags}
    same_model, loop = loaded(kind, kept, strip(saved), model, theirs)
    go_on(same_model, data, target, loop, 3)
    same(kind, list(twin.parameters()), list(same_model.parameters()), torch.float32)


def strip(saved):
    """The checkpoint as torch wrote it; what is ours has no place in torch's optimizers of long ago."""
    saved = copy.deepcopy(saved)
    for group in saved["param_groups"]:
        for key in [key for key in group if "lrkernels" in key]:
            del group[key]
        if isinstance(group["lr"], Tensor):
            group["lr"] = group["lr"].double()
    return saved


@pytest.mark.parametrize(("kind", "options"), [row for row in ROWS if row.values[0] is FusedAdamW])
def test_a_step_that_is_a_number_and_no_tensor(kind, options):
    """As torch wrote it before 1.12."""
    model, data, target, optimizer = trained(kind, options)
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        state["step"] = int(state["step"].item())
    twin, other = loaded(kind, options, saved, model)
    go_on(model, data, target, optimizer, 3)
    go_on(twin, data, target, other, 3)
    assert_same_bits(list(twin.parameters()), list(model.parameters()))


@pytest.mark.parametrize(("kind", "options"), ROWS)
def test_a_state_dict_does_not_depend_on_when_it_is_asked_for(kind, options):
    """The same run twice, once with a state_dict after every step."""
    results = []
    for ask in (False, True):
        model, data, target, optimizer = trained(kind, options, steps=0)
        for _ in range(5):
            go_on(model, data, target, optimizer, 1)
            asked = optimizer.state_dict() if ask else None
        results.append((list(model.parameters()), optimizer.state_dict()["state"]))
        assert asked is None or asked["state"].keys() == results[-1][1].keys()
    assert_same_bits(*results)


@pytest.mark.parametrize(("kind", "options"), ROWS)
def test_all_state_dict_hooks_as_in_torch(kind, options):
    """Before and after, prepended or not; one that returns something else replaces what is saved or loaded."""
    lists = []
    for build in (make, theirs):
        *_, optimizer = trained(kind, options, build)
        calls = []

        def note(name, calls=calls):
            return lambda *_: calls.append(name)

        def replace(optimizer, state_dict, calls=calls):
            calls.append("replace")
            groups = [group | {"lr": 0.125} for group in state_dict["param_groups"]]
            return {**state_dict, "param_groups": groups}

        optimizer.register_state_dict_pre_hook(note("save"))
        optimizer.register_state_dict_pre_hook(note("save first"), prepend=True)
        optimizer.register_state_dict_post_hook(note("saved"))
        optimizer.register_load_state_dict_pre_hook(note("load"))
        handle = optimizer.register_load_state_dict_pre_hook(replace, prepend=True)
        optimizer.register_load_state_dict_post_hook(note("loaded"))
        optimizer.load_state_dict(optimizer.state_dict())
        assert float(optimizer.param_groups[0]["lr"]) == 0.125
        handle.remove()
        save = optimizer.register_state_dict_post_hook(replace)
        saved = optimizer.state_dict()
        assert saved["param_groups"][0]["lr"] == 0.125
        save.remove()
        optimizer.load_state_dict(saved)
        lists.append(calls)
    assert lists[0] == lists[1]


@pytest.mark.parametrize(("kind", "options"), ROWS)
def test_state_dict_hooks_may_change_the_states(kind, options):
    """What is saved, by a hook that sees all of it; what is loaded, be it renamed; and what is there afterwards."""
    for build in (make, theirs):
        *_, optimizer = trained(kind, options, build)
        before = copy.deepcopy(optimizer.state_dict()["state"])
        seen = []

        def foreign(optimizer, state_dict, seen=seen):
            seen.append(copy.deepcopy(state_dict["state"]))
            return {"theirs": {i: dict(state) for i, state in state_dict["state"].items()}, **state_dict, "state": {}}

        def own(optimizer, state_dict):
            doubled = {i: {key: 2 * x for key, x in state.items()} for i, state in state_dict["theirs"].items()}
            return {"state": doubled, "param_groups": state_dict["param_groups"]}

        def restart(optimizer):
            optimizer.param_groups[0]["lr"] = 0.125
            for state in optimizer.state.values():
                for x in state.values():
                    x.add_(1)

        optimizer.register_state_dict_post_hook(foreign)
        optimizer.register_load_state_dict_pre_hook(own)
        optimizer.register_load_state_dict_post_hook(restart)
        saved = optimizer.state_dict()
        assert saved["state"] == {}
        assert_same_bits(seen, [before])
        optimizer.load_state_dict(saved)
        after = [dict(optimizer.state[p]) for p in optimizer.param_groups[0]["params"] if p in optimizer.state]
        want = [{key: 2 * x + 1 for key, x in state.items()} for state in before.values()]
        assert_same_bits([x for x in after if x], [x for x in want if x])
        assert optimizer.param_groups[0]["lr"] == 0.125


@pytest.mark.parametrize("cls", [copy.deepcopy, copy.copy], ids=["deepcopy", "copy"])
@pytest.mark.parametrize(("kind", "options"), ACCEPTED)
def test_a_copy_has_every_public_attribute(kind, options, cls):
    *_, optimizer = trained(kind, options)
    public = {key for key in optimizer.__dict__ if not key.startswith("_")}
    assert {key for key in cls(optimizer).__dict__ if not key.startswith("_")} == public
    assert public >= {"defaults", "state", "param_groups"}


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("kind", "options"), ACCEPTED)
def test_the_default_dtype_makes_no_difference(kind, options, default):
    """It may change in mid-run too; what is kept beside the parameters keeps its dtype."""
    results = []
    for dtype in (torch.float32, default):
        model, *_, optimizer = trained(kind, options, steps=1)
        grads = [torch.sin(torch.arange(p.numel(), dtype=torch.float32)).reshape(p.shape) for p in model.parameters()]
        torch.set_default_dtype(dtype)
        try:
            fresh = make(kind, copy.deepcopy(model).parameters(), options)
            for one in (optimizer, fresh):
                for p, grad in zip(one.param_groups[0]["params"], grads, strict=True):
                    p.grad = grad
                one.step()
                one.step()
        finally:
            torch.set_default_dtype(torch.float32)
        steps = [state["step"] for state in optimizer.state.values() if "step" in state]
        params = [one.param_groups[0]["params"] for one in (optimizer, fresh)]
        results.append([params, [state_of(one) for one in (optimizer, fresh)], steps])
    assert_same_bits(results[1], results[0])


@pytest.mark.parametrize("kind", KINDS)
def test_help_says_what_every_argument_is(kind):
    """Those that the optimizers share among them, each once."""
    described = re.search(r"^Args:\n(.*?)\n\nRaises:\n", inspect.getdoc(kind), re.DOTALL | re.MULTILINE)[1]
    entries = re.findall(r"^    (\w[\w, ]*): \S", described, re.MULTILINE)
    assert sorted(", ".join(entries).split(", ")) == sorted(inspect.signature(kind).parameters)


@pytest.mark.parametrize(("kind", "options"), ROWS)
def test_the_names_and_defaults_of_torch_s_arguments(kind, options):
    """repr, defaults and groups say what torch's say, and what is ours beside."""
    signature, other = inspect.signature(kind).parameters, inspect.signature(TORCH[kind]).parameters
    assert [name for name in signature if name in other] == list(other)
    assert all(signature[name].default == parameter.default for name, parameter in other.items())
    assert all(signature[name].kind == parameter.kind for name, parameter in other.items())
    mine, loop = make(kind, [torch.zeros(2)], options), TORCH[kind]([torch.zeros(2)], **copy.deepcopy(options))
    assert mine.defaults.items() >= {key: value for key, value in loop.defaults.items()}.items()
    lines = repr(loop).splitlines()[1:-1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text = repr(mine)
    assert all(re.search(re.escape(line.strip()), text) for line in lines), text
