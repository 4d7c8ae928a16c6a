"""The gradients of the objectives under DDP, against the plain formulas in one process."""

import itertools
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gandist.config import Config, DataConfig, LossConfig, ModelConfig
from gandist.distributed import World, join_world
from gandist.engine import build_player, choose_precision, compile_player
from gandist.errors import ConfigError
from gandist.models import Discriminator, build_discriminator, build_generator, recompute_activations
from gandist.models.layers import SyncBatchNorm
from gandist.objective import DiscriminatorObjective, GeneratorObjective
from tests.games import discriminator_inputs, generator_inputs
from tests.ranks import run_ranks

BATCH_SIZE = 12
MODEL = ModelConfig(discriminator_width=4, generator_width=4, latent_dim=8)
DATA = DataConfig(resolution=16, num_classes=5)
PENALTIES = {
    "none": {},
    "r1": {"r1_gamma": 30.0},
    "r2": {"r2_gamma": 30.0},
    "wgan_gp": {"wgan_gp_lambda": 10.0},
    "all": {"r1_gamma": 30.0, "r2_gamma": 20.0, "wgan_gp_lambda": 10.0},
}
CLASS_WEIGHT = 0.7

Gradients = dict[str, torch.Tensor]


class Case(NamedTuple):
    penalty: str
    precision: str = "float64"
    accumulation: int = 1
    recompute: bool = False
    compiled: bool = False


def batch(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Real images, their labels (one is missing), fakes, their labels, mixing: of the global batch."""
    random = torch.Generator().manual_seed(1)
    real, fake = torch.rand(2, BATCH_SIZE, 1, 16, 16, dtype=torch.float64, generator=random) * 2 - 1
    real_labels, fake_labels = torch.randint(5, (2, BATCH_SIZE), generator=random)
    real_labels[3] = -1
    mixing = torch.rand(BATCH_SIZE, generator=random)
    return real.to(dtype), real_labels, fake.to(dtype), fake_labels, mixing


def build(dtype: torch.dtype) -> Discriminator:
    torch.manual_seed(0)
    return build_discriminator(MODEL, DATA).to(dtype=dtype, memory_format=torch.channels_last)


def plain_gradients(penalty: str) -> Gradients:
    """Separate passes, the formulas as the papers have them, autograd.grad, float64."""
    network = build(torch.float64)
    real, real_labels, fake, fake_labels, mixing = batch(torch.float64)
    weights = LossConfig(**PENALTIES[penalty])
    mixing = mixing.double()
    mixed = mixing[:, None, None, None] * real + (1 - mixing[:, None, None, None]) * fake
    norms = {}
    for name, images, labels in (("r1", real, real_labels), ("r2", fake, fake_labels), ("gp", mixed, real_labels)):
        images = images.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(network(images, labels).logits.sum(), images, create_graph=True)
        norms[name] = gradient.square().sum((1, 2, 3)).sqrt()
    on_real, on_fake = network(real, real_labels), network(fake, fake_labels)
    loss = (1 - on_real.logits).clamp(min=0).mean() + (1 + on_fake.logits).clamp(min=0).mean()
    labelled = real_labels >= 0
    log_likelihood = F.log_softmax(on_real.class_logits, 1)[labelled, real_labels[labelled]]
    loss = loss - CLASS_WEIGHT * log_likelihood.sum() / BATCH_SIZE
    loss = loss + weights.r1_gamma / 2 * norms["r1"].square().mean() + weights.r2_gamma / 2 * norms["r2"].square().mean()
    loss = loss + weights.wgan_gp_lambda * (norms["gp"] - 1).square().mean()
    names, parameters = zip(*network.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def ddp_gradients(case: Case, world: World) -> Gradients:
    """As a player of the engine makes them, from this rank's share."""
    precision = choose_precision(case.precision, world.device)
    loss = LossConfig(**PENALTIES[case.penalty])
    network = build(precision.dtype)
    if case.recompute:
        recompute_activations(network)
    config = Config(loss=loss, classification={"weight": CLASS_WEIGHT})
    objective = DiscriminatorObjective(network, config, precision.autocast)
    player = build_player("discriminator", objective, config, world, precision, lr=1e-3)
    if case.compiled:
        torch._dynamo.reset()
        compile_player(player)
    inputs = [each[world.rank :: world.size] for each in batch(precision.dtype)]
    for number, micro_batch in enumerate(zip(*(each.chunk(case.accumulation) for each in inputs), strict=True), start=1):
        *images, mixing = micro_batch
        noise = mixing[:, None].float() if loss.wgan_gp_lambda else None
        with player.exchanging(number == case.accumulation):
            loss_value, _ = player.parallel(*discriminator_inputs(objective, *images, noise))
            player.backward(loss_value / case.accumulation)
    return {name: parameter.grad.double().contiguous() for name, parameter in network.named_parameters()}


def all_gradients(cases: list[Case]) -> list[Gradients]:
    with join_world() as world:
        return [ddp_gradients(case, world) for case in cases]


def distance(a: Gradients, b: Gradients) -> float:
    """Relative, over all parameters."""
    assert a.keys() == b.keys()
    flat_a, flat_b = (torch.cat([each[name].flatten() for name in sorted(each)]) for each in (a, b))
    return ((flat_a - flat_b).norm() / flat_b.norm()).item()


EAGER = [
    *itertools.starmap(Case, itertools.product(PENALTIES, ["float64"], [1, 2, 3], [False, True])),
    *(Case(penalty, "bfloat16") for penalty in PENALTIES),
]
COMPILED = [Case("all", "bfloat16", compiled=True)]  # in float64, and in several buckets: tests/test_promises.py


@pytest.mark.parametrize("cases", [EAGER, COMPILED], ids=["eager", "compiled"])
def test_gradients_of_two_ranks_are_those_of_the_plain_formula(cases: list[Case]) -> None:
    expected = {penalty: plain_gradients(penalty) for penalty in PENALTIES}
    for one, other in itertools.combinations(PENALTIES, 2):
        assert distance(expected[one], expected[other]) > 0.2, "a penalty left out or taken for another would be seen"
    for on_ranks in run_ranks(2, all_gradients, cases):
        for case, gradients in zip(cases, on_ranks, strict=True):
            tolerance = 1e-10 if case.precision == "float64" else 0.08
            assert distance(gradients, expected[case.penalty]) < tolerance, case


def test_a_penalty_on_a_discriminator_with_batch_norm_is_refused() -> None:
    network = build(torch.float64)
    network.trunk.blocks.append(SyncBatchNorm(16))
    autocast = choose_precision("float64", torch.device("cpu")).autocast
    with pytest.raises(ConfigError, match=r"batch norm \(trunk.blocks.2\).*penalty r1: set its weight to 0"):
        DiscriminatorObjective(network, Config(loss=LossConfig(r1_gamma=1.0)), autocast)
    DiscriminatorObjective(network, Config(), autocast)


def kept_bytes(recompute: bool) -> tuple[int, Gradients]:
    """What the forward pass of a generator's update keeps for the backward pass, and the gradients and buffers after."""
    torch.manual_seed(0)
    data = DATA.model_copy(update={"resolution": 64})
    generator, discriminator = build_generator(MODEL, data).double(), build_discriminator(MODEL, data).double()
    discriminator.requires_grad_(False)
    if recompute:
        recompute_activations(generator)
        recompute_activations(discriminator)
    autocast = choose_precision("float64", torch.device("cpu")).autocast
    opponent = DiscriminatorObjective(discriminator, Config(), autocast)
    objective = GeneratorObjective(generator, opponent, Config(), autocast)
    kept = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss, _ = objective(*generator_inputs(objective, torch.randn(16, 8, dtype=torch.float64), torch.arange(16) % 5))
        held = sum(kept.values())
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in generator.named_parameters()}
    return held, gradients | {name: buffer.double() for name, buffer in generator.named_buffers()}


def test_recomputed_activations_are_not_kept_and_change_nothing() -> None:
    plain, expected = kept_bytes(recompute=False)
    recomputed, gradients = kept_bytes(recompute=True)
    assert recomputed < 0.6 * plain
    assert distance(gradients, expected) < 1e-14


@pytest.mark.parametrize("conditioning", ["projection", "adc", "contrastive", "d2d_ce", "multi_hinge"])
def test_a_detached_class_head_disturbs_nothing(conditioning: str) -> None:
    def gradients(detach: bool, weight: float) -> Gradients:
        torch.manual_seed(0)
        network = build_discriminator(MODEL.model_copy(update={"conditioning": conditioning}), DATA).double()
        autocast = choose_precision("float64", torch.device("cpu")).autocast
        config = Config(classification={"weight": weight, "detach": detach})
        objective = DiscriminatorObjective(network, config, autocast)
        objective(*discriminator_inputs(objective, *batch(torch.float64)[:4]))[0].backward()
        return {name: p.grad for name, p in network.named_parameters()}

    alone, detached, attached = gradients(False, 0.0), gradients(True, 1.0), gradients(False, 1.0)
    trunk = [name for name in alone if name.startswith("trunk.")]
    assert distance({name: detached[name] for name in trunk}, {name: alone[name] for name in trunk}) == 0
    assert distance({name: attached[name] for name in trunk}, {name: alone[name] for name in trunk}) > 1e-3
    assert detached["head.classifier.weight"].abs().max() > 1e-3
