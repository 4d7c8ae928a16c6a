"""Networks, losses, penalties, averages and draws, each against an independent reference."""

import copy
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.utils import counters
from torch.autograd.graph import saved_tensors_hooks

from gandist.config import Config, DataConfig, EmaConfig, LossConfig, ModelConfig
from gandist.distributed import join_world
from gandist.ema import ExponentialMovingAverage
from gandist.engine import choose_precision
from gandist.losses import ADVERSARIAL_LOSSES
from gandist.models import build_discriminator, build_generator
from gandist.models.layers import ConditionalBatchNorm, SyncBatchNorm
from gandist.models.spectral_norm import PowerIteration, power_iteration, spectral_norm
from gandist.objective import DiscriminatorObjective, GeneratorObjective
from gandist.penalties import gradient_of, zero_centered
from gandist.randomness import Purpose, StepRandomness
from tests.games import discriminator_inputs, generator_inputs
from tests.ranks import run_ranks


def test_default_sizes() -> None:
    networks = build_generator(ModelConfig(), DataConfig()), build_discriminator(ModelConfig(), DataConfig())
    assert [sum(p.numel() for p in network.parameters()) for network in networks] == [108_881, 94_571]


def test_only_projection_sees_the_label() -> None:
    images = torch.randn(2, 1, 16, 16)
    for conditioning, sees in (("projection", True), ("auxiliary", False)):
        discriminator = build_discriminator(ModelConfig(conditioning=conditioning), DataConfig()).eval()
        a, b = (discriminator(images, torch.full((2,), label)) for label in (0, 1))
        assert torch.equal(a.logits, b.logits) != sees
        assert torch.equal(a.class_logits, b.class_logits)


def _sync_batch_norm(seed: int) -> dict[str, torch.Tensor]:
    """Output, running statistics, and first and second derivatives of this rank's share of a fixed batch."""
    with join_world() as world:
        torch.manual_seed(seed)
        x = (torch.randn(12, 3, 4, 4, dtype=torch.float64) * 3 + 50)[world.rank :: world.size].requires_grad_()
        weights = torch.randn(12, 3, 4, 4, dtype=torch.float64)[world.rank :: world.size]
        norm = SyncBatchNorm(3).double()
        output = norm(x)
        (first,) = torch.autograd.grad((output * weights).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), x)
        parts = {"output": output, "first": first, "second": second}
        parts = {name: value.detach() for name, value in parts.items()}
        return parts | {"running_mean": norm.running_mean, "running_var": norm.running_var}


@pytest.mark.parametrize("world_size", [2, 4])
def test_synchronized_batch_norm_is_batch_norm_over_all_ranks(world_size: int) -> None:
    torch.manual_seed(5)
    x = (torch.randn(12, 3, 4, 4, dtype=torch.float64) * 3 + 50).requires_grad_()
    weights = torch.randn(12, 3, 4, 4, dtype=torch.float64)
    norm = nn.BatchNorm2d(3).double()
    output = norm(x)
    (first,) = torch.autograd.grad((output * weights).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x)
    expected = {"output": output, "first": first, "second": second}
    for rank, parts in enumerate(run_ranks(world_size, _sync_batch_norm, 5)):
        for name, value in expected.items():
            torch.testing.assert_close(parts[name], value.detach()[rank::world_size], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(parts["running_mean"], norm.running_mean, rtol=1e-12, atol=0)
        torch.testing.assert_close(parts["running_var"], norm.running_var, rtol=1e-12, atol=0)


def _kept_for_backward() -> float:
    """Bytes that batch norm over two ranks keeps of a bfloat16 feature map, for each byte of it."""
    with join_world():
        x = torch.randn(4, 8, 16, 16).bfloat16().requires_grad_()
        kept = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with saved_tensors_hooks(keep, lambda tensor: tensor):
            output = SyncBatchNorm(8)(x)
        assert output.dtype == x.dtype
        return sum(kept.values()) / x.nbytes


def test_synchronized_batch_norm_keeps_its_input_as_it_came() -> None:
    """Statistics and weights beside it, but no copy in float32."""
    for factor in run_ranks(2, _kept_for_backward):
        assert 1 <= factor < 1.1


def test_conditional_batch_norm() -> None:
    layer = ConditionalBatchNorm(3, 4).double()
    nn.init.normal_(layer.gain.weight)
    nn.init.normal_(layer.bias.weight)
    x, labels = torch.randn(6, 3, 2, 2, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 3, 0])
    plain = F.batch_norm(x, None, None, training=True)
    for i, label in enumerate(labels):
        expected = plain[i] * (1 + layer.gain.weight[label])[:, None, None] + layer.bias.weight[label][:, None, None]
        torch.testing.assert_close(layer(x, labels)[i], expected)


def test_running_statistics_pass_over_what_is_not_finite() -> None:
    norm = SyncBatchNorm(2)
    norm(torch.tensor([[1.0, torch.inf], [3.0, 0.0]]))
    torch.testing.assert_close(norm.running_mean, torch.tensor([0.2, 0.0]))
    torch.testing.assert_close(norm.running_var, torch.tensor([1.1, 1.0]))


@pytest.mark.parametrize(
    "layer", [nn.Conv2d(3, 5, 3), nn.Linear(7, 4), nn.Embedding(6, 3)], ids=lambda each: type(each).__name__
)
def test_spectral_norm_is_torchs(layer: nn.Module) -> None:
    mine, theirs = copy.deepcopy(layer).double(), copy.deepcopy(layer).double()
    spectral_norm(mine)
    torch.nn.utils.parametrizations.spectral_norm(theirs)
    our, their = mine.parametrizations.weight[0], theirs.parametrizations.weight[0]
    our.u.copy_(their._u)
    our.v.copy_(their._v.view(1, *layer.weight.shape[1:]).movedim(1, -1).flatten())
    for _ in range(3):
        power_iteration(nn.Sequential(mine))  # theirs iterates in its forward
        gradients = []
        for module in (mine, theirs):
            weight = module.weight
            gradients.append(torch.autograd.grad(weight.square().sin().sum(), module.parametrizations.weight.original)[0])
        torch.testing.assert_close(mine.weight, theirs.eval().weight)
        theirs.train()
        torch.testing.assert_close(*gradients)
    before = copy.deepcopy(mine.state_dict())
    assert all(torch.equal(value, mine.state_dict()[name]) for name, value in before.items()), "a pass changes nothing"
    for _ in range(300):
        power_iteration(mine)
    torch.testing.assert_close(torch.linalg.matrix_norm(mine.weight.flatten(1), 2), torch.tensor(1.0, dtype=torch.float64))


def test_power_iteration_is_one_graph_of_each_network() -> None:
    """Compiled without a break, once, to the values of the eager one; the norms are looked for once."""
    torch._dynamo.reset()
    counters.clear()
    for width in (3, 5):
        eager = nn.Sequential(spectral_norm(nn.Conv2d(3, width, 3)), nn.ReLU(), spectral_norm(nn.Linear(7, width))).double()
        compiled = copy.deepcopy(eager)
        iterations = [PowerIteration(network) for network in (eager, compiled)]
        iterations[1].compile()
        for _ in range(3):
            before = eager.state_dict()["0.parametrizations.weight.0.u"].clone()
            for network in (eager, compiled):
                network[0].parametrizations.weight.original.detach().mul_(1.1).add_(0.01)
            iterations[1]()
            with patch.object(nn.Module, "modules", side_effect=AssertionError("a walk")):
                iterations[0]()
            torch.testing.assert_close(compiled.state_dict(), eager.state_dict(), rtol=1e-12, atol=1e-12)
            assert not torch.equal(eager.state_dict()["0.parametrizations.weight.0.u"], before)
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]


def test_adversarial_losses_are_their_formulas() -> None:
    real, fake = torch.randn(2, 50, dtype=torch.float64) * 3
    r, f = real.numpy(), fake.numpy()

    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    expected = {
        "hinge": (np.maximum(0, 1 - r).mean() + np.maximum(0, 1 + f).mean(), -f.mean()),
        "wasserstein": (f.mean() - r.mean(), -f.mean()),
        "non_saturating": (-np.log(sigmoid(r)).mean() - np.log(1 - sigmoid(f)).mean(), -np.log(sigmoid(f)).mean()),
        "saturating": (-np.log(sigmoid(r)).mean() - np.log(1 - sigmoid(f)).mean(), np.log(1 - sigmoid(f)).mean()),
        "least_squares": (((r - 1) ** 2).mean() / 2 + (f**2).mean() / 2, ((f - 1) ** 2).mean() / 2),
        "relativistic": (-np.log(sigmoid(r - f)).mean(), -np.log(sigmoid(f - r)).mean()),
    }
    assert expected.keys() == ADVERSARIAL_LOSSES.keys()
    for name, loss in ADVERSARIAL_LOSSES.items():
        judged = (fake, real) if loss.paired else (fake,)
        values = loss.discriminator(real, fake).mean().item(), loss.generator(*judged).mean().item()
        assert values == pytest.approx(expected[name], rel=1e-12)


def test_r1_of_a_quadratic() -> None:
    """D(x) = xᵀAx / 2 has the gradient Ax for symmetric A, so R1 = ½ E‖Ax‖², and its own gradient is known."""
    a = torch.randn(5, 5, dtype=torch.float64)
    a = (a + a.T).requires_grad_()
    x = torch.randn(7, 5, dtype=torch.float64)
    gradient, aux = gradient_of(lambda x: ((x @ a * x).sum(1) / 2, 3 * x), x)
    penalty = zero_centered(gradient)
    torch.testing.assert_close(aux, 3 * x)
    torch.testing.assert_close(penalty, (x @ a).square().sum(1).mean() / 2)
    (gradient,) = torch.autograd.grad(penalty, a)
    ax = (x @ a).detach()
    expected = (ax.T @ x + x.T @ ax) / 2 / len(x)  # from the symmetric part of xᵀAx
    torch.testing.assert_close(gradient, expected)


def test_the_objectives_gradient_is_that_of_the_plain_formula() -> None:
    """Spectral norm, class head, one concatenated pass and vjp, against separate passes and autograd.grad."""
    torch.manual_seed(0)
    data, gamma, weight = DataConfig(), 2.0, 0.7
    network = build_discriminator(ModelConfig(), data).double().eval()  # eval: power iteration stands still
    precision = choose_precision("float64", torch.device("cpu"))
    config = Config(loss=LossConfig(r1_gamma=gamma), classification={"weight": weight})
    objective = DiscriminatorObjective(network, config, precision.autocast)
    real, fake = torch.rand(2, 6, 1, 16, 16, dtype=torch.float64) * 2 - 1
    real_labels, fake_labels = torch.randint(10, (2, 6))

    loss, _ = objective(*discriminator_inputs(objective, real, real_labels, fake, fake_labels))
    gradients = torch.autograd.grad(loss, list(network.parameters()))

    real.requires_grad_()
    on_real, on_fake = network(real, real_labels), network(fake, fake_labels)
    (image_gradient,) = torch.autograd.grad(on_real.logits.sum(), real, create_graph=True)
    expected = (1 - on_real.logits).clamp(min=0).mean() + (1 + on_fake.logits).clamp(min=0).mean()
    expected = expected - weight * F.log_softmax(on_real.class_logits, 1).gather(1, real_labels[:, None]).mean()
    expected = expected + gamma / 2 * image_gradient.square().sum((1, 2, 3)).mean()
    torch.testing.assert_close(loss, expected)
    for mine, theirs in zip(gradients, torch.autograd.grad(expected, list(network.parameters())), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_objectives_leave_the_other_player_alone(precision: str) -> None:
    config = Config(model=ModelConfig(conditioning="auxiliary"), loss=LossConfig(adversarial="non_saturating"))
    generator, discriminator = (make(config.model, config.data) for make in (build_generator, build_discriminator))
    autocast = choose_precision(precision, torch.device("cpu")).autocast
    objective = GeneratorObjective(generator, DiscriminatorObjective(discriminator, config, autocast), config, autocast)
    assert {id(p) for p in objective.parameters()} == {id(p) for p in generator.parameters()}
    discriminator.requires_grad_(False)
    loss, statistics = objective(*generator_inputs(objective, torch.randn(4, config.model.latent_dim), torch.arange(4)))
    loss.backward()
    assert loss.dtype == torch.float32
    assert statistics.keys() == {"loss/generator", "loss/generator_classification"}
    assert all(p.grad is not None and p.grad.isfinite().all() for p in generator.parameters())
    assert all(p.grad is None for p in discriminator.parameters())


def test_average_has_its_half_life() -> None:
    module = nn.BatchNorm1d(3)
    nn.init.zeros_(module.weight)
    ema = ExponentialMovingAverage(module, EmaConfig(half_life_kimg=1))
    nn.init.ones_(module.weight)
    module.running_mean.fill_(7)
    for _ in range(50):
        ema.update(images=40, seen=0)
    torch.testing.assert_close(ema.module.weight, torch.full((3,), 0.75))  # two half-lives
    torch.testing.assert_close(ema.module.running_mean, module.running_mean)
    assert not ema.module.training


def test_average_that_ramps_up_and_follows_a_schedule() -> None:
    """Half-lives in images: at first a copy; then 5 % of what was seen; then that of the schedule."""
    cosine = {"start": 0, "end": 4, "kimg": 20}
    ema = ExponentialMovingAverage(nn.Linear(1, 1), EmaConfig(half_life_kimg=cosine, ramp_up=0.05))
    assert [ema.half_life(seen) for seen in (0, 10_000, 20_000, 80_000, 200_000)] == pytest.approx([0, 500, 1000, 4000, 4000])
    nn.init.ones_(ema.source.weight)
    ema.update(images=40, seen=0)
    assert torch.equal(ema.module.weight, ema.source.weight)
    nn.init.zeros_(ema.source.weight)
    ema.update(images=500, seen=10_000)
    assert ema.module.weight.item() == pytest.approx(0.5)


def test_draws_belong_to_places_of_the_global_batch() -> None:
    counts = np.array([100, 0, 300])

    def draw(rank: int, world_size: int, seed: int = 0, step: int = 5, purpose: Purpose = Purpose.GENERATOR, update: int = 0):
        return StepRandomness(seed, 1200, 8, counts, rank, world_size).draw(purpose, step, update)

    latents, labels = draw(0, 1)
    for rank in range(4):
        mine = draw(rank, 4)
        assert torch.equal(mine[0], latents[rank::4])
        assert torch.equal(mine[1], labels[rank::4])
    others = [draw(0, 1, seed=1), draw(0, 1, step=6), draw(0, 1, purpose=Purpose.DISCRIMINATOR), draw(0, 1, update=1)]
    assert all(not torch.equal(other[0], latents) for other in others)
    assert abs(latents.mean()) < 0.05
    assert abs(latents.std() - 1) < 0.05
    assert labels.bincount(minlength=3)[1] == 0
    assert abs((labels == 2).double().mean() - 0.75) < 0.05
