"""Updates of a player under DDP: against a plain loop, with gradients that are not finite, and what they cost."""

import copy
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock, patch

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from gandist import checkpoint
from gandist.config import Config
from gandist.distributed import World, join_world
from gandist.engine import build_player, choose_precision
from gandist.engine.guard import PATIENCE
from gandist.errors import TrainingError
from gandist.models.layers import SyncBatchNorm
from gandist.trainer import Trainer
from tests.ranks import run_ranks


class Regression(nn.Module):
    """A small objective: an affine map is fitted. `spoil` is multiplied into the loss."""

    def __init__(self, dtype: torch.dtype = torch.float64, device: torch.device | None = None):
        super().__init__()
        torch.manual_seed(0)
        self.network = nn.Linear(4, 3, dtype=dtype, device=device)

    def forward(self, x: torch.Tensor, y: torch.Tensor, spoil: torch.Tensor) -> tuple[torch.Tensor, dict]:
        loss = (self.network(x) - y).square().mean() * spoil.mean()
        return loss, {"loss": loss.detach()}


def data(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(step)
    return torch.randn(8, 4, dtype=torch.float64, generator=random), torch.randn(8, 3, dtype=torch.float64, generator=random)


def player_of(world: World, precision: str = "float64", **settings):
    config = Config.model_validate(settings)
    precision = choose_precision(precision, world.device)
    return build_player("generator", Regression(precision.dtype, world.device), config, world, precision, lr=0.1)


def fit(clip_norm: float, accumulation: int) -> dict[str, torch.Tensor]:
    with join_world() as world:
        player = player_of(world, optimizer={"clip_norm": clip_norm, "betas": [0.5, 0.9]})
        for step in range(5):
            inputs = (*(each[world.rank :: world.size] for each in data(step)), torch.ones(8 // world.size))
            player.update(zip(*(each.chunk(accumulation) for each in inputs), strict=True), accumulation, step, seen=0)
        return copy.deepcopy(player.network.state_dict())


@pytest.mark.parametrize("clip_norm", [0.0, 0.3])
def test_updates_are_those_of_a_plain_loop(clip_norm: float) -> None:
    network = Regression().network
    optimizer = torch.optim.Adam(network.parameters(), 0.1, (0.5, 0.9), fused=False)
    for step in range(5):
        x, y = data(step)
        optimizer.zero_grad()
        (network(x) - y).square().mean().backward()
        norm = nn.utils.clip_grad_norm_(network.parameters(), clip_norm or torch.inf)
        assert norm > 0.3, "clipping would be seen"
        optimizer.step()
    for accumulation in (1, 2):
        for weights in run_ranks(2, fit, clip_norm, accumulation):
            torch.testing.assert_close(weights, dict(network.state_dict()), rtol=1e-12, atol=1e-12)


def spoilt_updates(non_finite: str, spoil: float) -> tuple[list[bool], list[str]]:
    """Whether each of three updates changed anything, the second spoilt on rank 1 alone; and what the guard says."""
    with join_world() as world:
        player = player_of(world, train={"non_finite": non_finite})
        changed, reports = [], []
        for step in (7, 8, 9):
            before = copy.deepcopy(player.state_dict())
            value = spoil if step == 8 and world.rank == 1 else 1.0
            x, y = (each[world.rank :: 2] for each in data(step))
            player.update([(x, y, torch.full((4,), value))], 1, step, seen=0)
            after = player.state_dict()
            pairs = [(before["network"][name], after["network"][name]) for name in after["network"]]
            pairs += [(before["optimizer"][n][k], v) for n, state in after["optimizer"].items() for k, v in state.items()]
            same = {torch.equal(old, new) for old, new in pairs}
            assert len(same) == 1, "all or nothing"
            changed.append(same == {False})
        try:
            reports.append(f"{player.guard.report()} left out")
        except TrainingError as error:
            reports.append(str(error))
        return changed, reports


@pytest.mark.parametrize("spoil", [float("nan"), float("inf")])
def test_an_update_that_is_not_finite_on_one_rank_is_left_out_on_all(spoil: float) -> None:
    for changed, (report,) in run_ranks(2, spoilt_updates, "skip", spoil):
        assert changed == [True, False, True]
        assert report == "1 left out"
    for changed, (report,) in run_ranks(2, spoilt_updates, "stop", spoil):
        assert changed == [True, False, True]
        assert report.startswith("the gradient of the generator was not finite at step 8")


def test_a_player_that_is_never_finite_again_has_diverged(world: World) -> None:
    player = player_of(world, train={"non_finite": "skip"})
    x, y = data(0)
    spoilt = [(x, y, torch.tensor([torch.nan]))]
    for step in range(PATIENCE - 1):
        player.update(spoilt, 1, step, seen=0)
        assert player.guard.report() == 1
    player.update(spoilt, 1, PATIENCE, seen=0)
    with pytest.raises(TrainingError, match=f"{PATIENCE} updates in a row"):
        player.guard.report()


def test_float16_finds_its_loss_scale_and_keeps_it(world: World) -> None:
    player = player_of(world, "float16")
    x, y = (each.float() for each in data(0))
    for step in range(6):
        player.update([(x, y, torch.tensor([1e35]))], 1, step, seen=0)  # overflows until the scale has shrunk
    assert 1 <= player.guard.report() <= 6
    scale = player.scaler.get_scale()
    assert scale < 65536
    other = player_of(world, "float16")
    state = other.state_dict()
    state["loss_scale"].copy_(player.state_dict()["loss_scale"])
    other.load_state_dict(state)
    assert other.scaler.get_scale() == scale


@pytest.mark.parametrize("engine", [{"engine": "ddp"}, {"engine": "deepspeed", "zero_stage": 0}], ids=["ddp", "deepspeed"])
def test_the_whole_state_is_on_the_device(world: World, engine: dict) -> None:
    """With tensors that have no values: a GPU need not be there."""
    device = torch.device("cuda", 0)
    deepspeed = Mock(initialize=Mock(return_value=[Mock(data_parallel_group=dist.group.WORLD)]))
    with (
        FakeTensorMode(),
        patch("gandist.engine.ddp.DistributedDataParallel"),
        patch("gandist.engine.zero._import_deepspeed", return_value=deepspeed),
    ):
        state = player_of(replace(world, device=device, groups=[]), "float32", **engine).state_dict()
    tensors = checkpoint.flatten(state)
    assert len(tensors) == 2 + 2 * 3 + 1, "weights, Adam's state and the loss scale"
    assert {tensor.device for tensor in tensors.values()} == {device}


WAITING = {torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.masked_select}


class HostWaits(TorchDispatchMode):
    """Collects the operations that on a GPU make the host wait: values read, sizes that depend on values."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        masked = function.overloadpacket is torch.ops.aten.index and any(
            index is not None and index.dtype == torch.bool for index in arguments[1]
        )
        if function.overloadpacket in WAITING or masked:
            self.found.append(str(function))
        return function(*arguments, **(keywords or {}))


def costs(cache_dir: Path, accumulation: int, updates: int) -> tuple[int, int, list[str]]:
    """All-reduces of a training step, norms of the generator, and what the host waits for in a step."""
    settings = {
        "data": {"cache_dir": cache_dir},
        "train": {"batch_size": 24, "accumulation": accumulation, "discriminator_updates": updates},
        "loss": {"r1_gamma": 1.0},
        "optimizer": {"clip_norm": 1.0},
        "evaluation": {"metrics": []},
    }
    with join_world() as world:
        trainer = Trainer(Config.model_validate(settings), world)
        batches = trainer._open_batches()
        trainer.train_step(batches)  # DDP settles its buckets
        with torch.profiler.profile() as profile:
            trainer.train_step(batches)
        exchanges = sum(event.count for event in profile.key_averages() if event.key == "c10d::allreduce_")
        with HostWaits() as waits:
            trainer.train_step(batches)
        norms = sum(isinstance(module, SyncBatchNorm) for module in trainer.generator.network.modules())
        batches.close()
        return exchanges, norms, waits.found


@pytest.mark.parametrize(("accumulation", "updates"), [(1, 1), (3, 2)])
def test_a_step_exchanges_each_gradient_once_and_waits_for_nothing(cache_dir: Path, accumulation: int, updates: int) -> None:
    """Beside the gradients, a norm exchanges its statistics in each pass of the generator, forward and backward."""
    for exchanges, norms, waits in run_ranks(2, costs, cache_dir, accumulation, updates):
        gradients = updates + 1
        assert exchanges == gradients + accumulation * norms * (updates + 2)
        assert waits == []


def test_what_a_host_waits_for_is_seen() -> None:
    with HostWaits() as waits:
        assert torch.ones(()).item() == 1
        torch.ones(3)[torch.ones(3) > 0]
    assert len(waits.found) == 2
