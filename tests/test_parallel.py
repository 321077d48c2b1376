"""Several processes equal one on the joint batch: loss, gradients, running statistics, centres. All run in one start of four processes."""

import contextlib
import multiprocessing
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from cossl.models.co_ssl import CoSsl, LossConfig, ModelConfig
from cossl.models.objectives import OBJECTIVES
from cossl.models.parallel import ALONE, JointBatchNorm, Ranks, current_ranks, distribute, sync_batch_norms

CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # loss, model: batch norms of both kinds, with weights and without
    "byol": ({"local_target": "local_head", "local_to_global": 0.2}, {}),
    "dino": ({"local_target": "local_head"}, {"local_head": "mlp2", "joint_views": True}),
    "mocov3": ({"temperature": 0.5}, {"output_norm": True, "joint_views": True}),
}
RUNS = [(method, 2) for method in OBJECTIVES] + [("mocov3", 4)]
NORMS: dict[str, tuple[type[nn.BatchNorm1d | nn.BatchNorm2d], dict[str, Any], int, torch.dtype]] = {  # kind, arguments, group, input
    "vectors": (nn.BatchNorm1d, {}, 4, torch.float64),
    "maps without weights": (nn.BatchNorm2d, {"affine": False}, 4, torch.float64),
    "cumulative": (nn.BatchNorm2d, {"momentum": None}, 4, torch.float64),
    "groups of two": (nn.BatchNorm2d, {"momentum": 0.3}, 2, torch.float64),
    "each alone": (nn.BatchNorm2d, {}, 1, torch.float64),
    "batch statistics only": (nn.BatchNorm1d, {"track_running_stats": False}, 4, torch.float64),
    "half precision": (nn.BatchNorm2d, {}, 4, torch.bfloat16),
}
TERMS = ("loss", "global", "local_to_global", "global_to_local")
DTYPES = (torch.bool, torch.uint8, torch.int64, torch.bfloat16, torch.float32, torch.float64)


def build(method: str, ranks: Ranks = ALONE) -> CoSsl:
    torch.manual_seed(0)
    loss, changes = CASES[method]
    tiny = ModelConfig(method, "rf_resnet18", 29, width=4, hidden_dim=24, out_dim=6, prototypes=10, **changes)
    return CoSsl(tiny, LossConfig(**loss), ranks).double()


def joint_batch() -> tuple[list[Tensor], Tensor]:
    """Eight pictures in two views with maps of 2 x 2. The first two, or four, have no position in the first view."""
    generator = torch.Generator().manual_seed(1)
    views = [torch.randn(8, 3, 16, 16, dtype=torch.float64, generator=generator) for _ in range(2)]
    first = [[-1, -1], [-1, -1], [-1, -1], [-1, -1], [0, 3], [2, -1], [-1, -1], [1, 2]]
    second = [[1, 1], [3, 2], [0, 2], [-1, 0], [3, -1], [-1, -1], [2, 1], [0, 1]]
    return views, torch.stack([torch.tensor(first), torch.tensor(second)], 1)


def two_steps(model: CoSsl, call: nn.Module, part: slice) -> dict[str, Any]:
    """The first step accumulates the gradients of the pictures and of their mirror images."""
    optimizer = torch.optim.SGD(model.online.parameters(), lr=0.01)
    views, positions = joint_batch()
    terms, gradients = [], []
    for passes in (2, 1):
        optimizer.zero_grad()
        for i in range(passes):
            hold = call.no_sync() if isinstance(call, DistributedDataParallel) and i < passes - 1 else contextlib.nullcontext()
            with hold:
                terms.append(call([(x.flip(-1) if i else x)[part] for x in views], positions[part]))
                terms[-1]["loss"].backward()
        gradients.append({name: p.grad.clone() for name, p in model.online.named_parameters() if p.grad is not None})
        optimizer.step()
        model.update_target_(0.9)
    terms = [{name: each[name].detach() for name in TERMS} for each in terms]
    return {"terms": terms, "gradients": gradients, "state": model.state_dict()}


def norm_step(layer: nn.Module, x: Tensor, weights: Tensor) -> dict[str, Any]:
    x = x.clone().requires_grad_()
    for _ in range(2):
        y = layer(x)
    (y.double() * weights).sum().backward()
    gradients = [torch.zeros(0) if p.grad is None else p.grad for p in layer.parameters()]
    result = {"y": y.detach(), "x": x.grad, "gradients": gradients, "state": layer.state_dict()}
    return result | ({"eval": layer.eval()(x).detach()} if layer.track_running_stats else {})


def norm_and_input(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    kind, arguments, _, dtype = NORMS[name]
    torch.manual_seed(0)
    layer = kind(3, **arguments).to(torch.promote_types(dtype, torch.float32))
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    shape = (10, 3) if kind is nn.BatchNorm1d else (10, 3, 2, 2)
    return layer, (5 + 2 * torch.randn(shape)).to(dtype), torch.randn(shape, dtype=torch.float64)


ROWS = (slice(0, 2), slice(2, 3), slice(3, 6), slice(6, 10))  # of ten, on each of four processes


def work(rank: int, folder: Path) -> None:
    """What one process finds, as one file for each number of processes it was among."""
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    for world in (2, 4):
        if rank < world:
            limit = timedelta(seconds=100)
            distributed.init_process_group("gloo", f"file://{folder}/store{world}", limit, world_size=world, rank=rank)
            torch.save(together(rank, world), folder / f"{rank} of {world}.pt")
            distributed.destroy_process_group()


def together(rank: int, world: int) -> dict[str, Any]:
    found: dict[str, Any] = {"ranks": (current_ranks().rank, current_ranks().world_size)}
    part = slice(rank * 8 // world, (rank + 1) * 8 // world)
    for method in [method for method, n in RUNS if n == world]:
        model = build(method, current_ranks())
        found[method] = two_steps(model, distribute(model), part)
    if world == 2:
        model = build("byol", current_ranks())
        call = distribute(model, sync_norms=False)
        model.target.backbone.bn1.num_batches_tracked += 100 * rank
        found["own norms"] = two_steps(model, call, part)
        return found
    values = torch.arange(6).reshape(3, 2).T + 10 * rank  # not contiguous
    found["gathered"] = [current_ranks().gather((values % 3).to(dtype)) for dtype in DTYPES]
    found["has gradient"] = current_ranks().gather(torch.ones(1, requires_grad=True)).requires_grad
    for name, (_, _, group, _) in NORMS.items():
        layer, x, weights = norm_and_input(name)
        found[name] = norm_step(sync_batch_norms(layer, None if group == world else group), x[ROWS[rank]], weights[ROWS[rank]])
    with pytest.raises(ValueError, match="group_size=3 does not divide the 4 processes; give one of 1, 2, 4, or None for all"):
        sync_batch_norms(layer, 3)
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """What every process of 2, and of 4, found. They are forked from one that has imported torch, which takes seconds."""
    folder = tmp_path_factory.mktemp("processes")
    multiprocessing.get_context("forkserver").set_forkserver_preload(["pytest", "cossl.models.co_ssl"])
    torch.multiprocessing.start_processes(work, (folder,), 4, start_method="forkserver")
    return {world: [torch.load(folder / f"{rank} of {world}.pt") for rank in range(world)] for world in (2, 4)}


def close(ours: Any, expected: Any) -> None:
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-10)


def mean_terms(runs: list[dict[str, Any]]) -> list[dict[str, Tensor]]:
    steps = zip(*(run["terms"] for run in runs), strict=True)
    return [{name: torch.stack([each[name] for each in step]).mean() for name in TERMS} for step in steps]


@pytest.mark.parametrize(("method", "world"), RUNS)
def test_processes_take_the_steps_of_one_on_the_joint_batch(found: dict[int, Any], method: str, world: int) -> None:
    model = build(method)
    alone, runs = two_steps(model, model, slice(None)), [each[method] for each in found[world]]
    assert alone["gradients"][0].keys() == dict(model.online.named_parameters()).keys()
    close(mean_terms(runs), alone["terms"])
    for run in runs:
        close(run["gradients"], alone["gradients"])
        close(run["state"], alone["state"])  # weights, running statistics of both networks, centres


def test_without_synchronized_norms_each_process_has_its_own(found: dict[int, Any]) -> None:
    model = build("byol")
    alone, (first, second) = two_steps(model, model, slice(None)), [each["own norms"] for each in found[2]]
    assert abs(mean_terms([first, second])[0]["loss"] - alone["terms"][0]["loss"]) > 1e-3
    counts = [state["target.backbone.bn1.num_batches_tracked"] for state in (first["state"], second["state"])]
    assert counts[1] - counts[0] == 100
    for name, tensor in first["state"].items():
        if name.endswith("num_batches_tracked"):
            continue
        assert torch.equal(tensor, second["state"][name]) != name.endswith(("running_mean", "running_var")), name


@pytest.mark.parametrize("name", NORMS)
def test_joint_norm_is_the_norm_of_the_joint_batch(found: dict[int, Any], name: str) -> None:
    group, dtype = NORMS[name][2:]
    tolerance = {} if dtype is torch.bfloat16 else {"rtol": 1e-12, "atol": 1e-12}
    for first in range(0, 4, group):
        layer, x, weights = norm_and_input(name)
        rows, parts = slice(ROWS[first].start, ROWS[first + group - 1].stop), [each[name] for each in found[4][first : first + group]]
        expected = norm_step(layer, x[rows], weights[rows])
        for key in expected.keys() - {"gradients", "state"}:
            torch.testing.assert_close(torch.cat([part[key] for part in parts]), expected[key], **tolerance)
        sums = [torch.stack(each).sum(0) for each in zip(*(part["gradients"] for part in parts), strict=True)]
        torch.testing.assert_close(sums, expected["gradients"], **tolerance)
        for part in parts:
            torch.testing.assert_close(dict(part["state"]), dict(expected["state"]), **tolerance)


def test_gather_is_in_order_of_rank_for_any_dtype_without_gradient(found: dict[int, Any]) -> None:
    values = torch.cat([torch.tensor([[0, 2, 4], [1, 3, 5]]) + 10 * rank for rank in range(4)])
    for rank, each in enumerate(found[4]):
        assert each["ranks"] == (rank, 4)
        assert not each["has gradient"]
        for dtype, gathered in zip(DTYPES, each["gathered"], strict=True):
            assert gathered.dtype == dtype
            assert torch.equal(gathered, (values % 3).to(dtype))


@pytest.mark.parametrize("affine", [True, False])
def test_off_the_cpu_the_norms_are_torchs(affine: bool) -> None:
    layer = sync_batch_norms(nn.Sequential(nn.BatchNorm2d(3, affine=affine, device="meta")))[0]  # type: ignore[index]
    assert type(layer) is nn.SyncBatchNorm


def test_one_process_alone_needs_no_group() -> None:
    assert current_ranks() is ALONE
    model, x = build("byol"), joint_batch()
    shared = CoSsl(ModelConfig(receptive_field=99, width=4, hidden_dim=8, out_dim=4, shared_heads=True), LossConfig())
    expected, names = model(*x)["loss"], list(model.state_dict())
    synced = sync_batch_norms(build("byol"))
    assert sum(isinstance(layer, JointBatchNorm) for layer in synced.modules()) > 40
    assert not [layer for layer in synced.modules() if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d)]
    assert list(synced.state_dict()) == names
    assert synced(*x)["loss"].item() == expected.item()
    online = sync_batch_norms(shared).online
    assert online.local_projector is online.projector
    with pytest.raises(ValueError, match="group_size=2 does not divide the 1 processes; give one of 1"):
        sync_batch_norms(model, 2)
