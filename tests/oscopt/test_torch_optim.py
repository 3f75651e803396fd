"""OscGD against torch's own material for testing optimizers: the inputs and errors of SGD's tests."""

from __future__ import annotations

import copy
import inspect
import pickle
import re
import warnings

import numpy as np
import pytest
import torch
from helpers import DEVICE, batch, exact_correlations, small_net, train
from torch import nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.optim.swa_utils import SWALR, AveragedModel, update_bn
from torch_internal import OptimizerErrorEnum, optim_db

from oscopt import OscGD, OscMonitor, kernels

SGD = next(info for info in optim_db if info.optim_cls is torch.optim.SGD)
INPUTS = SGD.optim_inputs_func(device=DEVICE)
ERRORS = SGD.optim_error_inputs_func(device="cpu", dtype=torch.float32)
FLAGS = [{}, {"foreach": True}, {"fused": True}, {"foreach": False}]


def of_inputs(test):
    return pytest.mark.parametrize("given", INPUTS, ids=lambda x: x.desc.replace(" ", "-"))(test)


def run(kind, params, steps=6, **kwargs):
    """Steps with random gradients, the same for every kind of optimizer."""
    optimizer = kind(params, **copy.deepcopy(kwargs))
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        optimizer.zero_grad()
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            p.grad = torch.randn(p.shape, dtype=p.dtype, generator=generator).to(p.device)
        optimizer.step()
    return optimizer


def parameters(dtype=torch.float32):
    """Of many shapes: empty, of no dimension, transposed, sliced, large, equal."""
    torch.manual_seed(0)
    values = [
        torch.randn(4, 3, dtype=dtype),
        torch.randn((), dtype=dtype),
        torch.randn(0, 5, dtype=dtype),
        torch.randn(6, 4, dtype=dtype).t(),
        torch.randn(5, 8, dtype=dtype)[:, ::2],
        torch.randn(2, 3, 4, 5, dtype=dtype).to(memory_format=torch.channels_last),
        torch.randn(70_001, dtype=dtype),
    ]
    return [nn.Parameter(v.to(DEVICE)) for v in values]


def same(ours, theirs, **tolerance):
    for a, b in zip(ours, theirs, strict=True):
        if DEVICE == "cpu" and not tolerance:
            assert torch.equal(a, b)
        else:
            torch.testing.assert_close(a, b, **tolerance)


@pytest.mark.parametrize("flags", FLAGS, ids=str)
@of_inputs
def test_inputs_of_sgd(given, flags):
    """Its trajectory for every input that torch tests it with, whatever the shapes and the flags."""
    ours, theirs = parameters(), parameters()
    optimizer = run(OscGD, ours, **given.kwargs, **flags)
    wanted = run(torch.optim.SGD, theirs, **given.kwargs, foreach=True)
    same(ours, theirs)
    for a, b in zip(ours, theirs, strict=True):
        if "momentum_buffer" in wanted.state[b]:
            same([optimizer.state[a]["momentum_buffer"]], [wanted.state[b]["momentum_buffer"]])


@pytest.mark.parametrize("given", ERRORS, ids=lambda e: e.optimizer_error_input.desc.replace(" ", "-"))
def test_error_inputs_of_sgd(given):
    inputs = given.optimizer_error_input
    params = inputs.params if inputs.params is not None else parameters()
    assert given.error_on == OptimizerErrorEnum.CONSTRUCTION_ERROR
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(given.error_type, match=given.error_regex):
            OscGD(params, **inputs.kwargs)


@pytest.mark.parametrize("flags", [{"fused": True, "foreach": True}, {"fused": True, "differentiable": True}])
def test_flags_that_exclude_each_other(flags):
    with pytest.raises(RuntimeError) as wanted:
        torch.optim.SGD(parameters(), **flags)
    with pytest.raises(RuntimeError, match=re.escape(str(wanted.value))):
        OscGD(parameters(), **flags)


def test_takes_every_argument_of_sgd():
    ours, theirs = (inspect.signature(kind.__init__).parameters for kind in (OscGD, torch.optim.SGD))
    assert set(theirs) <= set(ours)
    assert [n for n, p in theirs.items() if p.kind is p.POSITIONAL_OR_KEYWORD] == [
        n for n, p in ours.items() if p.kind is p.POSITIONAL_OR_KEYWORD
    ]
    for kind in (OscGD, torch.optim.SGD):
        with pytest.raises(TypeError, match="unexpected keyword argument 'betas'"):
            kind(parameters(), betas=1)


@of_inputs
def test_complex_parameters(given):
    """Updated as SGD does it, measured as their real and imaginary parts."""
    ours, theirs = parameters(torch.complex64), parameters(torch.complex64)
    optimizer = run(OscGD, ours, **given.kwargs)
    run(torch.optim.SGD, theirs, **given.kwargs, foreach=True)
    same(ours, theirs, rtol=1e-6, atol=1e-6)  # torch may multiply by lr + 0i
    p, q = nn.Parameter(torch.zeros(2, dtype=torch.complex64)), nn.Parameter(torch.zeros(2, 2))
    for name, param in (("complex", p), ("real", q)):
        optimizer = run(OscGD, [(name, param)], steps=0, **given.kwargs)
        for value in (torch.tensor([1 + 2j, 3]), torch.tensor([-1j, 1 + 1j])):
            param.grad = value if name == "complex" else torch.view_as_real(value).clone()
            optimizer.step()
        assert optimizer.history.dot[1, 0] == 1.0 and optimizer.history.sq_norm[:, 0].tolist() == [14.0, 3.0]
    assert torch.equal(torch.view_as_real(p), q)


def test_complex_gradients_reused_and_conjugated():
    """In place: one pair is lost, then copied. Lazily conjugated: as they are."""
    p = nn.Parameter(torch.zeros(3, dtype=torch.complex64))
    optimizer = OscGD([p], lr=0.0, momentum=0.5)
    values = [torch.randn(3, dtype=torch.complex64) for _ in range(5)]
    p.grad = torch.zeros_like(p)
    for value in values:
        p.grad.copy_(value)
        optimizer.step()
    wanted = [(b.conj() @ a).real.item() for a, b in zip(values, values[1:], strict=False)]
    assert np.isnan(optimizer.history.dot[:2, 0]).all()
    np.testing.assert_allclose(optimizer.history.dot[2:, 0], wanted[1:], rtol=1e-5)
    p.grad = values[0].conj()
    optimizer.step()
    assert optimizer.history.dot[5, 0] == pytest.approx((values[0] @ values[4]).real.item(), rel=1e-5)
    assert optimizer.state[p]["momentum_buffer"].dtype == torch.complex64
    again = pickle.loads(pickle.dumps(optimizer))
    assert again.state_dict()["state"].keys() == optimizer.state_dict()["state"].keys()
    with pytest.raises(RuntimeError, match="`fused=True` requires all the params to be floating point"):
        OscGD([p], fused=True)


def test_mixed_dtypes():
    ours, theirs = (
        [p for d in (torch.float32, torch.float64, torch.complex64) for p in parameters(d)] for _ in range(2)
    )
    run(OscGD, ours, lr=0.1, momentum=0.9)
    run(torch.optim.SGD, theirs, lr=0.1, momentum=0.9, foreach=True)
    same(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("schedules", SGD.scheduler_inputs, ids=lambda s: str(len(s)))
def test_schedulers(schedules):
    results = []
    for kind in (OscGD, torch.optim.SGD):
        net = small_net()
        optimizer = kind(net.parameters(), lr=0.05)
        made = [schedule(optimizer) for schedule in schedules]
        for _ in range(12):
            loss = train(net, optimizer, 1)[0]
            for schedule in made:
                schedule.step(loss) if isinstance(schedule, ReduceLROnPlateau) else schedule.step()
                assert isinstance(schedule, LRScheduler)
        results.append(list(net.parameters()))
    same(*results)


def test_swa():
    """Averaged models, their learning rates and batch-norm statistics."""
    results = []
    for kind in (OscGD, torch.optim.SGD):
        net = small_net()
        optimizer = kind(net.parameters(), lr=0.05)
        averaged, schedule = AveragedModel(net), SWALR(optimizer, swa_lr=0.01, anneal_epochs=3)
        for _ in range(6):
            train(net, optimizer, 1)
            averaged.update_parameters(net)
            schedule.step()
        update_bn([batch()[0]], averaged, device=DEVICE)
        results.append([*averaged.parameters(), *averaged.buffers()])
    same(*results)


def differentiable(kind, **kwargs):
    """Derivatives of the result by start, gradients and learning rate, as torch's own tests take them."""
    start = torch.tensor([1.0, -0.5, 2.0], requires_grad=True)
    given = [torch.tensor([1.0, 2.0, 3.0 + t], requires_grad=True) for t in range(3)]
    lr = torch.tensor(0.1, requires_grad=True)
    x = start.clone()
    optimizer = kind([x], lr=lr, differentiable=True, **kwargs)
    for grad in given:
        x.grad = grad
        optimizer.step()
    return torch.autograd.grad((x**2).sum(), [start, *given, lr]), optimizer, x


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9, "nesterov": True}, {"weight_decay": 0.1}], ids=str)
def test_differentiable(options):
    ours, optimizer, x = differentiable(OscGD, **options)
    theirs, _, _ = differentiable(torch.optim.SGD, **options)
    same(ours, theirs)
    assert all(d.abs().sum() > 0 for d in ours)
    assert len(optimizer.history) == 3 and optimizer.correlation.item() > 0.9
    assert not optimizer.state[x]["prev_grad"].requires_grad


@pytest.mark.parametrize("through", ["state_dict", "pickle"])
@of_inputs
def test_state_dict_round_trip(given, through):
    """For every input and shape, saved midway: the same trajectory. (Other ways to save: test_sgd.py.)"""
    params = parameters()
    first = run(OscGD, params, **given.kwargs)
    grads = [torch.randn_like(p) for p in params]
    for p, g in zip(params, grads, strict=True):
        p.grad = g.clone()
    if through == "state_dict":
        other = [nn.Parameter(p.detach().clone()) for p in params]
        second = OscGD(other, **given.kwargs)
        second.load_state_dict(copy.deepcopy(first.state_dict()))
    else:
        other, second = pickle.loads(pickle.dumps((params, first)))
    for p, g in zip(other, grads, strict=True):
        p.grad = g.clone()
    first.step()
    second.step()
    same(other, params)
    ours, theirs = (x.history.correlation()[-1] for x in (second, first))
    # A copy of what is sliced is dense, and another backend's.
    dense = np.array([kernels.dense(p) for p in params])
    np.testing.assert_array_equal(ours[dense], theirs[dense])
    np.testing.assert_allclose(ours, theirs, rtol=1e-14)
    assert not np.isnan(ours[np.array([p.numel() for p in params]) > 0]).any()


def test_states_of_older_sgds():
    """A checkpoint of SGD goes on with OscGD, also without the keys that came later."""
    for missing in (
        (),
        ("maximize", "foreach", "differentiable", "fused"),
        ("nesterov", "maximize", "fused"),
    ):
        ours, theirs = parameters(), parameters()
        sgd = run(torch.optim.SGD, theirs, lr=0.1, momentum=0.9)
        state = copy.deepcopy(sgd.state_dict())
        for group in state["param_groups"]:
            for key in missing:
                del group[key]
        optimizer = OscGD(ours, lr=0.5)
        optimizer.load_state_dict(state)
        for p, q in zip(ours, theirs, strict=True):
            p.data.copy_(q.data)
            p.grad = q.grad = torch.randn(p.shape).to(DEVICE)
        optimizer.step()
        sgd.step()
        same(ours, theirs, rtol=1e-6, atol=1e-7)
        assert optimizer.history.steps.tolist() == [0]


def test_state_of_ours_loads_into_sgd():
    ours = run(OscGD, parameters(), lr=0.1, momentum=0.9)
    sgd = torch.optim.SGD(parameters(), lr=0.5)
    sgd.load_state_dict(copy.deepcopy(ours.state_dict()))
    sgd.param_groups[0]["params"][0].grad = torch.ones(4, 3, device=DEVICE)
    sgd.step()
    assert sgd.param_groups[0]["lr"] == 0.1


def test_state_dict_hooks():
    optimizer = run(OscGD, parameters(), lr=0.1)
    seen = []
    optimizer.register_state_dict_pre_hook(lambda opt: seen.append("save"))
    optimizer.register_state_dict_post_hook(lambda opt, state: state | {"extra": 1})
    optimizer.register_load_state_dict_pre_hook(lambda opt, state: seen.append(state.pop("extra")))
    optimizer.register_load_state_dict_post_hook(lambda opt: seen.append("loaded"))
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == ["save", 1, "loaded"]


def test_state_taken_away():
    """optimizer.state = defaultdict(dict), which users write to start anew: no pair, then pairs again."""
    params = parameters()
    optimizer = run(OscGD, params, 3, lr=0.1, momentum=0.9)
    for empty in (
        lambda: optimizer.state.clear(),
        lambda: setattr(optimizer, "state", type(optimizer.state)(dict)),
    ):
        empty()
        for _ in range(2):
            for p in params:
                p.grad = torch.ones_like(p)
            optimizer.step()
        assert np.isnan(optimizer.history.correlation()[-2]).all()
        assert optimizer.history.correlation()[-1, 0] == 1.0


@pytest.mark.parametrize("scaled_by", ["scaler", "optimizer"])
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_grad_scaler_in_both_styles(scaled_by, backend):
    """The trajectory of SGD under the same scaler; a skipped step is none."""
    results = []
    for kind in (OscGD, torch.optim.SGD):
        net = small_net()
        options = {"backend": backend} if kind is OscGD else {}
        optimizer = kind(net.parameters(), lr=0.05, momentum=0.9, fused=scaled_by == "optimizer", **options)
        assert getattr(optimizer, "_step_supports_amp_scaling", False) == (scaled_by == "optimizer")
        scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**10, growth_interval=2)
        x, y = batch()
        seen = []
        for t in range(8):
            optimizer.zero_grad()
            scaler.scale(nn.functional.cross_entropy(net(x), y)).backward()
            scale = scaler.get_scale()
            seen.append([p.grad.double() / scale for p in net.parameters()])
            if t in (2, 5):
                net[0].weight.grad[0] = torch.inf if t == 2 else torch.nan
                seen.pop()
            scaler.step(optimizer)
            scaler.update()
        results.append(list(net.parameters()))
        if kind is OscGD:
            history = optimizer.history
            assert history.steps.tolist() == list(range(6)) and scaler.get_scale() != 2.0**10
            for layer in range(6):
                wanted = exact_correlations(seen, [layer])
                np.testing.assert_allclose(history.correlation()[1:, layer], wanted, atol=2e-6)
    same(*results, rtol=1e-5, atol=1e-7)


def test_clipping_and_accumulation():
    """Measured is the gradient that the step applies: of all micro-batches, clipped."""
    net = small_net()
    optimizer = OscGD(net.named_parameters(), lr=0.1)
    x, y = batch()
    seen = []
    for _ in range(4):
        optimizer.zero_grad()
        for a, b in zip(x.split(4), y.split(4), strict=True):
            (nn.functional.cross_entropy(net(a), b) / 4).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 0.1)
        seen.append([p.grad.double().clone() for p in net.parameters()])
        optimizer.step()
    history = optimizer.history
    np.testing.assert_allclose(history.correlation()[1:, 2], exact_correlations(seen, [4, 5]), atol=2e-6)
    np.testing.assert_allclose(history.sq_norm.sum(1), 0.01, rtol=1e-4)


def test_autocast_with_bfloat16():
    net = small_net()
    optimizer = OscGD(net.named_parameters(), lr=0.1)
    x, y = batch()
    for _ in range(3):
        optimizer.zero_grad()
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            loss = nn.functional.cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()
    assert (optimizer.history.correlation()[1:] > -1).all()


@pytest.mark.slow
@pytest.mark.parametrize("attach", ["oscgd", "monitor"])
def test_compiled(attach):
    """A compiled model, and a compiled train step with the optimizer inside: the numbers of eager mode."""
    results = []
    for compiled in ("nothing", "model", "step"):
        torch._dynamo.reset()
        net = small_net()
        if attach == "oscgd":
            optimizer = meter = OscGD(net.named_parameters(), lr=0.05, momentum=0.9)
        else:
            optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
            meter = OscMonitor(optimizer, net.named_parameters(), ("grad", "update"))
        model = torch.compile(net, backend="aot_eager") if compiled == "model" else net

        def step(x, y, model=model, optimizer=optimizer):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            return loss

        call = torch.compile(step, backend="aot_eager") if compiled == "step" else step
        losses = [call(*batch()).item() for _ in range(6)]
        results.append((losses, meter.history.correlation(), meter))
    for losses, correlation, meter in results[1:]:
        np.testing.assert_allclose(losses, results[0][0], rtol=1e-4)
        np.testing.assert_allclose(correlation, results[0][1], atol=1e-3)
        assert np.isnan(correlation[0]).all() and not np.isnan(correlation[1:]).any()
        if attach == "monitor":
            wanted = results[0][2].update_history.correlation()
            np.testing.assert_allclose(meter.update_history.correlation(), wanted, atol=1e-3)


def test_steps_that_only_make_the_state():
    """torch.distributed.checkpoint steps with zeros before it loads: nothing recorded, nothing counted."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    net, other = small_net(), small_net()
    optimizer = OscGD(net.named_parameters(), lr=0.05, momentum=0.9)
    train(net, optimizer, 3)
    saved = copy.deepcopy(get_optimizer_state_dict(net, optimizer))
    assert {"prev_grad", "momentum_buffer"} <= set(saved["state"]["0.weight"])
    history = copy.deepcopy(optimizer.history)
    second = OscGD(other.named_parameters(), lr=0.05, momentum=0.9, history=history)
    other.load_state_dict(net.state_dict())
    set_optimizer_state_dict(other, second, saved)
    train(net, optimizer, 2)
    train(other, second, 2)
    same(list(other.parameters()), list(net.parameters()))
    assert second.history.steps.tolist() == [0, 1, 2, 3, 4]
    np.testing.assert_array_equal(second.history.correlation(), optimizer.history.correlation())
