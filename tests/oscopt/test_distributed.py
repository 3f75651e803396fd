"""Over several processes: the record of one process on every rank, each element counted once."""

from __future__ import annotations

import atexit
import copy
import os
import time

import numpy as np
import pytest
import ranks
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from oscopt import History, OscGD, OscMonitor
from oscopt.adapt import CosineStep
from oscopt.kernels import SUMS

pytestmark = pytest.mark.slow

LR = 0.1


def net() -> nn.Sequential:
    """Sizes that no number of ranks divides; of the last bias some ranks hold nothing."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 13), nn.LayerNorm(13), nn.ReLU(), nn.Linear(13, 3)
    )


def data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(16, 12, generator=generator)
    return x, torch.randint(0, 3, (16,), generator=generator)


def train(model, optimizer, steps: int, part=slice(None), set_to_none: bool = True) -> None:
    x, y = (t[part] for t in data())
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=set_to_none)
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


def mine(rank: int, world: int) -> slice:
    """This rank's part of the data."""
    return slice(rank * 16 // world, (rank + 1) * 16 // world)


def single(steps: int = 6, set_to_none: bool = True, **options) -> OscGD:
    """The run in one process."""
    model = net()
    optimizer = OscGD(model.named_parameters(), lr=LR, **options)
    train(model, optimizer, steps, set_to_none=set_to_none)
    return optimizer


def agrees(history, wanted, tolerance: float = 1e-5) -> None:
    """The same as `wanted` within `tolerance`, the same bits on all ranks."""
    assert history.steps.tolist() == wanted.steps.tolist() and history.layer_names == wanted.layer_names
    for name in SUMS:
        ours, theirs = getattr(history, name), getattr(wanted, name)
        scale = np.nan_to_num(np.abs(theirs)).max(axis=0) + 1e-300  # not taken without momentum: all NaN
        np.testing.assert_allclose(ours / scale, theirs / scale, atol=tolerance, err_msg=name)
    np.testing.assert_allclose(history.correlation(), wanted.correlation(), atol=tolerance)
    np.testing.assert_array_equal(history.lr, wanted.lr)
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, [getattr(history, name) for name in (*SUMS, "correlation_stderr")])
    for other in everyone:
        for a, b in zip(everyone[0], other, strict=True):
            np.testing.assert_array_equal(a, b)


def sharded(mesh=None, **options) -> nn.Module:
    model = net()
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def tensor_parallel(mesh) -> nn.Module:
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    return parallelize_module(net(), mesh, plan)


# ---- what the ranks do -----------------------------------------------------------------------------------


def ddp(rank, world):
    """In every form: no more than a pair lost where the memory of gradients is reused."""
    wanted = single(momentum=0.9).history
    for options in ({}, {"gradient_as_bucket_view": True}, {"static_graph": True}):
        model = DistributedDataParallel(net(), **options)
        optimizer = OscGD(model.module.named_parameters(), lr=LR, momentum=0.9)
        for set_to_none in (True, False):
            train(model, optimizer, 3, mine(rank, world), set_to_none)
        ours = optimizer.history
        known = ~np.isnan(ours.dot)
        assert known.all(1).sum() == 4 and known[-2:].all()
        for name in ("dot", "diff_sq_norm"):
            got, exact = (getattr(h, name)[known] for h in (ours, wanted))
            np.testing.assert_allclose(got, exact, atol=1e-5 * np.abs(exact).max())
        np.testing.assert_allclose(ours.sq_norm, wanted.sq_norm, rtol=1e-4)
        agrees(ours, ours)


def fsdp(rank, world):
    cases = ({}, {"momentum": 0.9, "nesterov": True, "every": 2}, {"layers": "parameter"})
    for options in (*cases, {"capturable": True}):
        model = sharded()
        optimizer = OscGD(model.named_parameters(), lr=LR, **options)
        train(model, optimizer, 6, mine(rank, world))
        reference = single(**options)
        agrees(optimizer.history, reference.history)
        np.testing.assert_allclose(optimizer.correlation, reference.correlation, atol=1e-5)
        np.testing.assert_allclose(optimizer.global_correlation, reference.global_correlation, atol=1e-5)
        for p, q in zip(model.parameters(), reference.param_groups[0]["params"], strict=True):
            torch.testing.assert_close(p.full_tensor(), q.detach(), rtol=1e-5, atol=1e-6)
            assert "prev_grad" not in optimizer.state[p] or isinstance(
                optimizer.state[p]["prev_grad"], DTensor
            )
        copied = copy.deepcopy(optimizer.state_dict())["state"]
        for i, p in enumerate(model.parameters()):
            for key, value in optimizer.state[p].items():
                if isinstance(value, DTensor):
                    assert torch.equal(copied[i][key].full_tensor(), value.full_tensor()), (i, key)


def fsdp_with_reused_gradients(rank, world):
    """zero_grad(set_to_none=False): FSDP adds to the same tensors; one pair is lost, on all ranks alike."""
    model = sharded()
    optimizer = OscGD(model.named_parameters(), lr=LR)
    train(model, optimizer, 6, mine(rank, world), set_to_none=False)
    agrees(optimizer.history, single(set_to_none=False).history)
    assert np.isnan(optimizer.history.dot[:2]).all() and not np.isnan(optimizer.history.dot[2:]).any()


def fsdp_in_mixed_precision(rank, world):
    """Measured is the reduced gradient, as the optimizer gets it."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = sharded(mp_policy=policy)
    optimizer = OscGD(model.named_parameters(), lr=LR)
    seen = []
    optimizer.register_step_pre_hook(
        lambda *_: seen.append([p.grad.full_tensor().double().flatten() for p in model.parameters()])
    )
    train(model, optimizer, 5, mine(rank, world))
    for t in range(1, 5):
        before, now = (torch.cat(seen[i][-2:]) for i in (t - 1, t))
        assert abs(optimizer.history.correlation()[t, -1] - before @ now / before.norm() / now.norm()) < 1e-6


def fsdp_sketched(rank, world):
    """Each rank sketches its pieces: within five standard errors of one process that measures exactly."""

    def large() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(12, 3000), nn.ReLU(), nn.Linear(3000, 3))

    model, alone, history = fully_shard(large()), large(), History(sketches=256)
    options = {"lr": LR, "backend": "torch"}
    optimizer = OscGD(model.named_parameters(), measure="sketch", history=history, **options)
    train(model, optimizer, 6, mine(rank, world))
    reference = OscGD(alone.named_parameters(), **options)
    train(alone, reference, 6)
    error = np.abs(history.correlation() - reference.history.correlation())[1:]
    stderr = history.correlation_stderr[1:]
    assert (stderr[:, 0] > 0).all() and (error <= 5 * stderr + 1e-5).all()
    mu, stderr = history.pairwise()
    adjacent = reference.history.global_correlation()[1:]
    assert (np.abs(np.diag(mu, 1) - adjacent) <= 5 * np.diag(stderr, 1) + 1e-5).all()
    everyone: list = [None] * world
    dist.all_gather_object(everyone, [history.correlation(), history.correlation_stderr, mu])
    for other in everyone:
        for a, b in zip(everyone[0], other, strict=True):
            np.testing.assert_array_equal(a, b)


def fsdp_windows(rank, world):
    model, reference = sharded(), net()
    windows = []
    for m, part in ((model, mine(rank, world)), (reference, slice(None))):
        optimizer = OscGD(m.named_parameters(), lr=LR)
        with optimizer.window(3) as window:
            train(m, optimizer, 3, part)
        windows.append(window)
    for layer in (None, "0", "5"):
        np.testing.assert_allclose(windows[0].matrix(layer), windows[1].matrix(layer), atol=1e-5)


def monitored(rank, world):
    """Adam under FSDP2: gradients and updates as in one process; its trajectory untouched."""
    records, weights = [], []
    for kind in ("one", "sharded", "unmonitored"):
        model, part = (net(), slice(None)) if kind == "one" else (sharded(), mine(rank, world))
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        if kind != "unmonitored":
            monitor = OscMonitor(optimizer, model.named_parameters(), ("grad", "update"))
            records.append(monitor)
        train(model, optimizer, 6, part)
        if kind != "one":
            weights.append([p.to_local().detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
    agrees(records[1].history, records[0].history)
    agrees(records[1].update_history, records[0].update_history, 1e-3)  # Adam divides by small numbers
    state = records[1].state_dict()
    assert isinstance(state["update_state"]["0.weight"]["prev_grad"], DTensor)


def tensor_parallel_shard_and_replicate(rank, world):
    mesh = init_device_mesh("cpu", (world,))
    model = tensor_parallel(mesh)
    optimizer = OscGD(model.named_parameters(), lr=LR)
    train(model, optimizer, 6)
    reference = single()
    kinds = {
        type(placement).__name__
        for p in model.parameters()
        if isinstance(p, DTensor)
        for placement in p.placements
    }
    assert {"Shard", "Replicate"} <= kinds and not all(isinstance(p, DTensor) for p in model.parameters())
    agrees(optimizer.history, reference.history)


def sequence_parallel(rank, world):
    """The norm's gradients come as partial sums over the ranks."""
    torch.manual_seed(0)

    def block():
        torch.manual_seed(0)
        return nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 12), nn.Linear(12, 8))

    mesh = init_device_mesh("cpu", (world,))
    plan = {
        "0": SequenceParallel(),
        "1": ColwiseParallel(input_layouts=_shard(1)),
        "2": RowwiseParallel(output_layouts=_shard(1)),
    }
    x = torch.randn(2, 4 * world, 8)
    records = []
    for model in (block(), parallelize_module(block(), mesh, plan)):
        optimizer = OscGD(model.named_parameters(), lr=0.5)
        for _ in range(5):
            optimizer.zero_grad()
            if isinstance(model[0].weight, DTensor):
                out = model(x.chunk(world, 1)[rank])
                (out**2).sum().backward()
            else:
                (model(x) ** 2).sum().backward()
            optimizer.param_groups[0]["lr"] = 1e-3
            optimizer.step()
        records.append(optimizer.history)
    agrees(records[1], records[0])


def _shard(dim):
    from torch.distributed.tensor import Shard

    return Shard(dim)


def hybrid(rank, world):
    """Replicated over one dimension of the mesh and sharded over the other; then sharded over both."""
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("outer", "inner"))
    model = sharded(mesh=mesh)
    optimizer = OscGD(model.named_parameters(), lr=LR)
    train(model, optimizer, 6, mine(rank, world))
    agrees(optimizer.history, single().history)

    model = tensor_parallel(mesh["inner"])
    for layer in model:
        if isinstance(layer, nn.Linear | nn.LayerNorm):
            fully_shard(layer, mesh=mesh["outer"])
    optimizer = OscGD(model.named_parameters(), lr=LR)
    train(model, optimizer, 6, mine(rank // (world // 2), 2))
    agrees(optimizer.history, single().history)


def adapted(rank, world):
    """Steps adapted to the sums of all ranks, for pieces and for replicas that another rank measures."""
    for adapt in (CosineStep(beta=0.3), CosineStep(beta=0.3, lag=0), "auto"):
        reference = single(adapt=copy.deepcopy(adapt))
        wanted = [p.detach() for p in reference.param_groups[0]["params"]]
        for kind in ("sharded", "tensor parallel"):
            if kind == "sharded":
                model, part = sharded(), mine(rank, world)
            else:
                model, part = tensor_parallel(init_device_mesh("cpu", (world,))), slice(None)
            optimizer = OscGD(model.named_parameters(), lr=LR, adapt=copy.deepcopy(adapt))
            train(model, optimizer, 6, part)
            # Bounded steps do not shrink with the gradient: the roundings of two orders of summing stay.
            agrees(optimizer.history, reference.history, tolerance=1e-4 if adapt == "auto" else 1e-5)
            scales = optimizer.history.step_scale
            assert len(np.unique(scales[-1])) == 4
            np.testing.assert_allclose(scales, reference.history.step_scale, atol=1e-5)
            for p, q in zip(model.parameters(), wanted, strict=True):
                p = p.full_tensor() if isinstance(p, DTensor) else p
                torch.testing.assert_close(p.detach(), q, rtol=1e-5, atol=1e-6)


def one_reduction_a_step(rank, world):
    """Of six numbers a layer, started in the step and waited for at the next one or at a reading."""
    calls = []
    original = dist.all_reduce

    def counting(tensor, *args, **kwargs):
        calls.append((tensor.numel(), kwargs.get("async_op", False)))
        return original(tensor, *args, **kwargs)

    model = sharded()
    optimizer = OscGD(model.named_parameters(), lr=LR)
    dist.all_reduce = counting
    try:
        train(model, optimizer, 3, mine(rank, world))
        assert calls == 3 * [(len(SUMS) * len(optimizer.layer_names), True)]
        calls.clear()
        plain = DistributedDataParallel(net())
        train(plain, OscGD(plain.named_parameters(), lr=LR), 3, mine(rank, world))
        assert not calls
    finally:
        dist.all_reduce = original


def disagreements(rank, world):
    """An error on every rank, not a hang."""
    model = sharded()
    named = list(model.named_parameters())
    last = world - 1
    cases = [
        (
            {"layers": lambda name: "odd" if rank == last and name == "2.bias" else name},
            f"disagree on the layers: '2.bias' is in '2.bias' on rank 0 and in 'odd' on rank {last}",
        ),
        ({"every": 2 if rank == last else 1}, f"every is 1 on rank 0 and 2 on rank {last}"),
    ]
    for options, text in cases:
        with pytest.raises(ValueError, match=text):
            OscGD(named, lr=LR, **options)
        with pytest.raises(ValueError, match=text):
            OscMonitor(torch.optim.SGD(model.parameters(), lr=LR), named, **options)
    with pytest.raises(ValueError, match=f"rank 0 has 8 parameters and rank {last} has 7"):
        OscGD(named[: 8 - (rank == last)], lr=LR)
    order = named[::-1] if rank == last else named
    with pytest.raises(ValueError, match="parameter 0 is '0.weight' on rank 0 and"):
        OscGD(order, lr=LR)


def added_groups(rank, world):
    """Ranks meet when a group is added, so that one of them may read alone."""
    model = sharded()
    named = list(model.named_parameters())
    optimizer = OscGD(named[:4], lr=LR)
    train(model, optimizer, 2, mine(rank, world))
    optimizer.add_param_group({"params": named[4:]})
    if rank == 0:
        assert len(optimizer.layer_names) == 4 and "4 layers" in repr(optimizer)
    train(model, optimizer, 3, mine(rank, world))
    if rank == 0:
        assert not optimizer.correlation.isnan().any()
    agrees(optimizer.history, optimizer.history)


def group_that_is_gone(rank, world):
    model = sharded()
    optimizer = OscGD(model.named_parameters(), lr=LR)
    train(model, optimizer, 2, mine(rank, world))
    nn.functional.cross_entropy(model(data()[0]), data()[1]).backward()
    before = [p.to_local().detach().clone() for p in model.parameters()]
    assert optimizer.correlation.numel() == 4
    dist.destroy_process_group()
    with pytest.raises(RuntimeError, match=f"rank {rank} of {world}: the process group .* is gone"):
        optimizer.step()
    assert all(torch.equal(a, p.to_local()) for a, p in zip(before, model.parameters(), strict=True))


def save(rank, world, folder):
    model = sharded()
    optimizer = OscGD(model.named_parameters(), lr=LR, momentum=0.9)
    train(model, optimizer, 4, mine(rank, world))
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=f"{folder}/{world}")


def load(rank, world, folder):
    """What other numbers of ranks have saved goes on as if in one process."""
    wanted = single(7, momentum=0.9)
    for saved in (2, 4):
        for kind in ("sharded", "plain"):
            model = sharded() if kind == "sharded" else net()
            optimizer = OscGD(model.named_parameters(), lr=LR, momentum=0.9)
            weights, state = get_state_dict(model, optimizer)
            dcp.load({"model": weights, "optimizer": state}, checkpoint_id=f"{folder}/{saved}")
            set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
            train(model, optimizer, 3, mine(rank, world) if kind == "sharded" else slice(None))
            assert optimizer.history.steps.tolist() == [4, 5, 6]
            np.testing.assert_allclose(
                optimizer.history.correlation(), wanted.history.correlation()[4:], atol=1e-5
            )


EVERYWHERE = [ddp, fsdp, fsdp_with_reused_gradients, fsdp_in_mixed_precision, fsdp_windows]
EVERYWHERE += [fsdp_sketched]
EVERYWHERE += [monitored, tensor_parallel_shard_and_replicate, sequence_parallel, one_reduction_a_step]
EVERYWHERE += [adapted, disagreements, added_groups, group_that_is_gone]
CASES = [(2, f) for f in EVERYWHERE] + [(4, f) for f in (ddp, fsdp, monitored, hybrid, added_groups)]
CASES += [(world, load) for world in (4, 2)]


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """All cases of a number of ranks in the same processes: starting them takes longest."""
    folder = str(tmp_path_factory.mktemp("checkpoints"))
    found = {}
    for world, before in ((2, save), (4, save), (2, None)):
        functions = [f for w, f in CASES if w == world and f is not load]
        if before is None:
            functions = [load]
        elif world == 4:
            functions += [save, load]
        else:
            functions += [save]
        reports = ranks.run(world, [_Bound(f, folder) for f in functions])
        found |= {(world, name): report for name, report in reports.items()}
    return found


class _Bound:
    """A case, with the folder of the checkpoints for those that take it."""

    def __init__(self, function, folder: str) -> None:
        self.__name__ = function.__name__
        self._function, self._arguments = function, (folder,) if function in (save, load) else ()

    def __call__(self, rank: int, world: int) -> None:
        self._function(rank, world, *self._arguments)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("world, case", CASES, ids=lambda v: getattr(v, "__name__", v))
def test_over_ranks(reports, world, case):
    assert not reports[world, case.__name__]


def _one_leaves_early(rank: int, folder: str) -> None:
    if rank == 0:
        atexit.register(os._exit, 0)  # registered first, called last: it is gone at once
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 2), rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    p = nn.Parameter(distribute_tensor(torch.ones(8), mesh, [Shard(0)]))
    optimizer = OscGD([("p", p)], lr=LR, backend="torch")
    for t in range(2):
        p.grad = distribute_tensor(torch.ones(8), mesh, [Shard(0)])
        if rank == 1 and t == 1:
            time.sleep(0.5)
        optimizer.step()
    if rank == 1:
        np.testing.assert_allclose(optimizer.history.global_correlation(), [np.nan, 1.0])


@pytest.mark.timeout(120)
def test_a_rank_that_leaves_early_still_gives_its_sums(tmp_path):
    """Its last reduction may still be under way as its interpreter ends."""
    mp.spawn(_one_leaves_early, (str(tmp_path),), nprocs=2)
