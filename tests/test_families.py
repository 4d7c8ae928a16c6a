"""Every network family: sizes against the papers', what all must be able to do, and one formula of each written out."""

import copy
import itertools
import math
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gandist.config import TRANSLATORS, Config, DataConfig, LossConfig, ModelConfig
from gandist.distributed import join_world
from gandist.engine import choose_precision
from gandist.errors import ConfigError
from gandist.flops import count_run
from gandist.models import FAMILIES, HEADS, build_discriminator, build_generator, recompute_activations, truncating
from gandist.models.biggan import LinearlyConditionedBatchNorm
from gandist.models.biggan_deep import BottleneckDownBlock, BottleneckUpBlock
from gandist.models.heads import PureProjectionHead
from gandist.models.layers import NORMS, Downsample, LowPass, Upsample
from gandist.models.noise import hashed_normal
from gandist.models.residual import ResidualDownBlock, ResidualUpBlock, SelfAttention
from gandist.models.spectral_norm import SpectralNorm, power_iteration
from gandist.models.stylegan2 import (
    DownBlock,
    MappedProjectionHead,
    MappingNetwork,
    MinibatchStandardDeviation,
    StyledConvolution,
    ToImage,
    equalized,
)
from gandist.objective import DiscriminatorObjective, GeneratorObjective
from gandist.penalties import gradient_of
from gandist.resolution import find_pyramid
from tests.games import discriminator_inputs, generator_inputs
from tests.ranks import run_ranks

CPU = torch.device("cpu")
CLASSES = 5
BATCH_SIZE = 4
SMALL = {  # of each family and some of its variants: the resolution, and what is small
    "mlp": (10, {"generator_width": 16, "discriminator_width": 16}),
    "dcgan": (16, {"generator_width": 4, "discriminator_width": 4}),
    "resnet": (32, {"generator_width": 8, "discriminator_width": 8, "attention": (16,)}),
    "biggan": (32, {"generator_width": 2, "discriminator_width": 2, "attention": (8,)}),
    "biggan_deep": (32, {"generator_width": 8, "discriminator_width": 8, "attention": (8,)}),
    "r3gan": (16, {"widths": (8, 8, 4), "group_size": 4}),
    "dcgan-batch": (8, {"generator_width": 4, "discriminator_width": 4, "discriminator_norm": "batch"}),
    "resnet-layer": (
        32,
        {"generator_width": 4, "discriminator_width": 4, "discriminator_norm": "layer", "generator_spectral_norm": True},
    ),
    "stylegan2": (8, {"generator_width": 4, "discriminator_width": 4, "mapping_layers": 2, "max_width": 6, "minibatch_std": 2}),
    "stargan": (16, {"generator_width": 4, "discriminator_width": 4}),
}
NOT_SQUARE = {  # of each family, with what is small there
    f"{family}-{height}x{width}": ((height, width), SMALL[family][1])
    for family, height, width in (
        ("mlp", 5, 9),
        ("dcgan", 8, 16),
        ("resnet", 24, 32),
        ("biggan", 40, 32),
        ("biggan_deep", 32, 48),
        ("r3gan", 32, 16),
        ("stylegan2", 6, 8),
        ("stargan", 8, 12),
    )
}
OTHERS = {  # resolutions
    "mlp": [3, (2, 7)],
    "dcgan": [8, 64, (48, 64), (16, 128)],
    "resnet": [64, 128, (80, 64), (64, 256)],
    "biggan": [64, 128, 256, 512, (192, 256)],
    "biggan_deep": [64, 512, (128, 160)],
    "r3gan": [8, 64, (8, 10)],
    "stylegan2": [16, 256, (256, 128)],
    "stargan": [8, 128, (8, 10), (6, 8), (16, 4), (48, 64)],
}
CONDITIONING = ["projection", "auxiliary", "none"]
all_families = pytest.mark.parametrize("family", SMALL)
all_shapes = pytest.mark.parametrize("family", SMALL | NOT_SQUARE)


class Networks(NamedTuple):
    config: Config
    generator: nn.Module
    discriminator: nn.Module

    def discriminating(self, loss: LossConfig, precision: str = "float64") -> DiscriminatorObjective:
        autocast = choose_precision(precision, CPU).autocast
        config = self.config.model_copy(update={"loss": loss})
        return DiscriminatorObjective(self.discriminator, config, autocast)

    def generating(self, loss: LossConfig, precision: str = "float64") -> GeneratorObjective:
        autocast = choose_precision(precision, CPU).autocast
        config = self.config.model_copy(update={"loss": loss})
        return GeneratorObjective(self.generator, self.discriminating(loss, precision), config, autocast)


def combinations(families: Iterable[str], conditionings: Iterable[str]) -> Iterator[tuple[str, str]]:
    """A translator cannot do without classes."""
    for family, conditioning in itertools.product(families, conditionings):
        if conditioning != "none" or family.partition("-")[0] not in TRANSLATORS:
            yield family, conditioning


def build(family: str, conditioning: str = "projection", *, channels: int = 3, dtype: torch.dtype = torch.float64) -> Networks:
    """A small one, its weights a little off their first values, among which there are zeros."""
    torch.manual_seed(0)
    resolution, sizes = (SMALL | NOT_SQUARE)[family]
    config = Config(
        model=ModelConfig(family=family.partition("-")[0], conditioning=conditioning, latent_dim=8, **sizes),
        data=DataConfig(resolution=resolution, channels=channels, num_classes=0 if conditioning == "none" else CLASSES),
        classification={"weight": 0.7},
        evaluation={"metrics": []},
    )
    networks = [make(config.model, config.data) for make in (build_generator, build_discriminator)]
    for network in networks:
        network.to(dtype=dtype, memory_format=torch.channels_last)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
        for _ in range(5):
            power_iteration(network)
    return Networks(config, *networks)


def draw(networks: Networks, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Latents, or what is translated, labels and images."""
    random = torch.Generator().manual_seed(1)
    data = networks.config.data
    latents = torch.randn(BATCH_SIZE, 8, dtype=torch.float64, generator=random)
    images = torch.rand(BATCH_SIZE, data.channels, *data.size, dtype=torch.float64, generator=random)
    labels = torch.arange(BATCH_SIZE) if data.num_classes else torch.full((BATCH_SIZE,), -1)
    images = 2 * images - 1
    return (images.flip(0) if networks.config.model.translates else latents).to(dtype), labels, images.to(dtype)


def penalties(networks: Networks) -> dict[str, float]:
    """Those that the discriminator allows."""
    return {} if networks.discriminator.trunk.couples_images else {"r1_gamma": 1.0, "r2_gamma": 1.0}


def test_every_family_is_tested() -> None:
    assert SMALL.keys() >= FAMILIES.keys() == OTHERS.keys() == {name.partition("-")[0] for name in NOT_SQUARE}


@pytest.mark.parametrize(("family", "conditioning"), list(combinations(SMALL | NOT_SQUARE, CONDITIONING)))
def test_shapes(family: str, conditioning: str) -> None:
    networks = build(family, conditioning, channels=1 if conditioning == "projection" else 3)
    latents, labels, images = draw(networks)
    generated = networks.generator(latents, labels)
    assert (generated.shape, generated.dtype) == (images.shape, torch.float64)
    if networks.config.model.family not in ("r3gan", "stylegan2"):
        assert generated.abs().max() <= 1
    output = networks.discriminator(generated, labels)
    assert (output.logits.shape, output.class_logits.shape) == ((BATCH_SIZE,), (BATCH_SIZE, networks.config.data.num_classes))
    assert output.features.shape[0] == BATCH_SIZE


@pytest.mark.usefixtures("shapes_alone")
@pytest.mark.parametrize(("family", "resolution"), [(family, each) for family, sizes in OTHERS.items() for each in sizes])
def test_other_resolutions(family: str, resolution: int | tuple[int, int]) -> None:
    model = ModelConfig(family=family, latent_dim=840, generator_width=8, discriminator_width=8)
    data = DataConfig(resolution=resolution, channels=3)
    latents = torch.zeros(4, 3, *data.size) if model.translates else torch.zeros(4, 840)
    labels = torch.zeros(4, dtype=torch.int64)
    images = build_generator(model, data)(latents, labels)
    assert images.shape == (4, 3, *data.size)
    assert build_discriminator(model, data)(images, labels).logits.shape == (4,)


@pytest.mark.parametrize(
    ("family", "conditioning", "precision"),
    [
        *((*each, "float64") for each in combinations(FAMILIES, CONDITIONING)),
        *((*each, "bfloat16") for each in combinations(FAMILIES, HEADS)),
        *itertools.product(sorted((SMALL | NOT_SQUARE).keys() - FAMILIES.keys()), ["projection"], ["float64"]),
    ],
)
def test_every_parameter_is_trained(family: str, conditioning: str, precision: str) -> None:
    dtype = choose_precision(precision, CPU).dtype
    networks = build(family, conditioning, dtype=dtype)
    latents, labels, images = draw(networks, dtype)
    loss = LossConfig(adversarial="non_saturating", **penalties(networks))
    objective = networks.discriminating(loss, precision)
    losses = [objective(*discriminator_inputs(objective, images, labels, images.flip(0), labels))[0]]
    losses[0].backward()
    networks.discriminator.requires_grad_(False)
    objective = networks.generating(loss, precision)
    losses.append(objective(*generator_inputs(objective, latents, labels))[0])
    losses[1].backward()
    assert [loss.dtype for loss in losses] == [dtype] * 2
    for network in (networks.generator, networks.discriminator):
        for name, parameter in network.named_parameters():
            assert parameter.dim(), f"{name}: DeepSpeed refuses a scalar"
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.any(), name


@all_shapes
def test_second_derivatives_are_right(family: str) -> None:
    """The gradient of a gradient penalty, against the difference of two penalties."""
    networks = build(family)
    _, labels, images = draw(networks)
    discriminator = networks.discriminator

    def penalty() -> torch.Tensor:
        gradient, _ = gradient_of(lambda x: (discriminator(x, labels).logits, None), images)
        return gradient.square().sum()

    parameters = [p for name, p in discriminator.named_parameters() if "classifier" not in name]
    gradients = torch.autograd.grad(penalty(), parameters, allow_unused=True, materialize_grads=True)
    directions = [torch.randn_like(parameter) for parameter in parameters]
    slope = sum((gradient * direction).sum() for gradient, direction in zip(gradients, directions, strict=True))
    for module in discriminator.modules():
        if isinstance(module, SpectralNorm):
            module.eval()  # σ follows the weights
    values = []
    for step in (1e-8, -2e-8):  # so small that no activation crosses 0
        with torch.no_grad():
            torch._foreach_add_(parameters, directions, alpha=step)
        values.append(penalty().item())
    assert (values[0] - values[1]) / 2e-8 == pytest.approx(slope.item(), rel=1e-4)


def test_second_derivatives_are_not_made_group_by_group() -> None:
    networks = build("r3gan")
    _, labels, images = draw(networks)
    gradient, _ = gradient_of(lambda x: (networks.discriminator(x, labels).logits, None), images)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        gradient.square().sum().backward()
    convolutions = sum(event.count for event in profile.key_averages() if event.key == "aten::_convolution")
    layers = sum(isinstance(module, nn.Conv2d) for module in networks.discriminator.modules())
    assert convolutions < 2 * layers


@all_families
def test_the_class_changes_images_and_logits(family: str) -> None:
    networks = build(family)
    latents, labels, images = draw(networks)
    others = (labels + 1) % CLASSES
    generator, discriminator = networks.generator.eval(), networks.discriminator.eval()
    changes = [
        generator(latents, labels) - generator(latents, others),
        discriminator(images, labels).logits - discriminator(images, others).logits,
    ]
    for change in changes:
        assert change.reshape(BATCH_SIZE, -1).abs().amax(1).min() > 1e-4


@all_families
def test_images_are_coupled_where_it_says_so(family: str) -> None:
    trunk = build(family).discriminator.trunk
    images = draw(build(family))[2]
    together, alone = trunk(images), torch.cat([trunk(images[:2]), trunk(images[2:])])
    assert trunk.couples_images == (not torch.allclose(together, alone))


def gradients(networks: Networks, *, compiled: bool) -> dict[str, torch.Tensor]:
    """And what buffers then hold."""
    latents, labels, images = draw(networks)
    loss = LossConfig(**penalties(networks), reconstruction_weight=10 if networks.config.model.translates else 0)
    discriminating, generating = networks.discriminating(loss), networks.generating(loss)
    if compiled:
        torch._dynamo.reset()
        discriminating.compile(backend="aot_eager", fullgraph=True)
        generating.compile(backend="aot_eager", fullgraph=True)
    discriminating(*discriminator_inputs(discriminating, images, labels, images.flip(0), labels))[0].backward()
    networks.discriminator.requires_grad_(False)
    generating(*generator_inputs(generating, latents, labels))[0].backward()
    named = {"G": networks.generator, "D": networks.discriminator}
    buffers = {f"{player}.{name}": buffer for player, network in named.items() for name, buffer in network.named_buffers()}
    return buffers | {f"{player}.{name}": p.grad for player, network in named.items() for name, p in network.named_parameters()}


@all_families
def test_recomputed_the_gradients_are_the_same(family: str) -> None:
    networks = build(family)
    recompute_activations(networks.generator)
    recompute_activations(networks.discriminator)
    assert_same(gradients(networks, compiled=False), gradients(build(family), compiled=False))


@pytest.mark.parametrize("family", ["biggan", "r3gan", "stylegan2"])  # which have the parts of the others
def test_compiled_the_gradients_are_the_same(family: str) -> None:
    assert_same(gradients(build(family), compiled=True), gradients(build(family), compiled=False))


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-9, atol=1e-9)


@all_shapes
def test_flops_are_counted(family: str) -> None:
    networks = build(family)
    objectives = networks.discriminating(LossConfig(**penalties(networks))), networks.generating(LossConfig())
    flops = count_run(networks.config, *objectives, CPU, torch.float64)
    assert flops["update"] > 3 * (flops["generator"] + flops["discriminator"])
    plain = networks.discriminating(LossConfig()), networks.generating(LossConfig())
    without_penalties = count_run(networks.config, *plain, CPU, torch.float64)["update"]
    # The discriminator's weights have no gradients in the generator's update.
    assert without_penalties <= 4 * flops["generator"] + 8 * flops["discriminator"]
    assert all(p.grad is None for objective in objectives for p in objective.parameters())


# Sizes.


def parameters(model: ModelConfig, data: DataConfig) -> tuple[int, int]:
    """Of the generator, and of the discriminator without the classifier, which the papers have not."""
    networks = build_generator(model, data), build_discriminator(model, data)
    return tuple(sum(p.numel() for name, p in network.named_parameters() if "classifier" not in name) for network in networks)


def linear(inputs: int, outputs: int, taps: int = 1) -> int:
    """The parameters of a linear layer, or of a convolution of so many taps."""
    return (inputs * taps + 1) * outputs


@pytest.mark.usefixtures("shapes_alone")
@pytest.mark.parametrize("classes", [0, 10])
def test_sngan_has_the_size_of_its_table(classes: int) -> None:
    """Table 4 of 1802.05957, counted by hand: of G the linear layer, three blocks of two convolutions, a shortcut and two
    batch norms, the last batch norm, the last convolution; of D four blocks, two of them with a shortcut, the linear layer,
    the embedding of the projection. With 10 classes G has 4.30 and D 1.06 million parameters."""
    model = ModelConfig(
        family="resnet",
        latent_dim=128,
        generator_width=256,
        discriminator_width=128,
        conditioning="projection" if classes else "none",
    )
    norms = 2 * 2 * 256 * (classes or 1)
    block = 2 * linear(256, 256, 9) + linear(256, 256) + norms
    generator = linear(128, 4 * 4 * 256) + 3 * block + 2 * 256 + linear(256, 3, 9)
    down = [
        linear(3, 128, 9) + linear(128, 128, 9) + linear(3, 128),
        2 * linear(128, 128, 9) + linear(128, 128),
        2 * linear(128, 128, 9),
        2 * linear(128, 128, 9),
    ]
    discriminator = sum(down) + linear(128, 1) + classes * 128
    found = parameters(model, DataConfig(resolution=32, channels=3, num_classes=classes))
    assert found == (generator, discriminator)
    if classes:
        assert [round(count / 1e6, 2) for count in found] == [4.30, 1.06]


@pytest.mark.usefixtures("shapes_alone")
def test_wgan_gp_has_the_size_of_its_residual_networks() -> None:
    """Those for CIFAR-10 of 1704.00028, appendix F, counted by hand."""
    model = ModelConfig(
        family="resnet",
        latent_dim=128,
        generator_width=128,
        discriminator_width=128,
        conditioning="none",
        discriminator_norm="none",
    )
    block = 2 * linear(128, 128, 9) + linear(128, 128) + 2 * 2 * 128
    generator = linear(128, 4 * 4 * 128) + 3 * block + 2 * 128 + linear(128, 3, 9)
    first = linear(3, 128, 9) + linear(128, 128, 9) + linear(3, 128)
    discriminator = first + 6 * linear(128, 128, 9) + linear(128, 128) + linear(128, 1)
    assert parameters(model, DataConfig(resolution=32, channels=3, num_classes=0)) == (generator, discriminator)


@pytest.mark.usefixtures("shapes_alone")
def test_dcgan_with_batch_norm_has_no_needless_biases() -> None:
    model = ModelConfig(family="dcgan", discriminator_width=64, conditioning="none", discriminator_norm="batch")
    _, found = parameters(model, DataConfig(resolution=32, channels=3, num_classes=0))
    blocks = [16 * before * 2 * before + 2 * 2 * before for before in (64, 128, 256)]
    assert found == linear(3, 64, 9) + sum(blocks) + linear(512, 1)


@pytest.mark.usefixtures("shapes_alone")
def test_biggan_has_its_published_size() -> None:
    model = ModelConfig(family="biggan", latent_dim=120, generator_width=96, discriminator_width=96, attention=(64,))
    found = parameters(model, DataConfig(resolution=128, channels=3, num_classes=1000))
    assert [round(count / 1e6, 2) for count in found] == [70.43, 87.98]


@pytest.mark.usefixtures("shapes_alone")
@pytest.mark.parametrize(("resolution", "published"), [(128, [50.4, 34.6]), (256, [55.9]), (512, [56.2])])
def test_biggan_deep_has_its_published_sizes(resolution: int, published: list[float]) -> None:
    """Those of generators are of networks whose last convolution makes 128 channels, of which three are used."""
    model = ModelConfig(family="biggan_deep", latent_dim=128, generator_width=128, discriminator_width=128, attention=(64,))
    generator, discriminator = parameters(model, DataConfig(resolution=resolution, channels=3, num_classes=1000))
    generator += linear(128, 128, 9) - linear(128, 3, 9)
    found = [round(count / 1e6, 1) for count in (generator, discriminator)]
    assert found[: len(published)] == published


@pytest.mark.usefixtures("shapes_alone")
@pytest.mark.parametrize(
    ("resolution", "classes", "widths", "group_size", "published"),
    [
        (32, 10, [768] * 4, 16, [20.78, 21.28]),
        (64, 0, [768] * 4 + [384], 16, [22.43, 22.38]),
        (256, 0, [768] * 4 + [384, 192, 96], 16, [23.06, 23.01]),
        (32, 1000, [1536] * 4, 32, [82.91, 86.55]),
        (64, 1000, [1536] * 5, 32, [103.57, 107.21]),
    ],
    ids=["cifar10", "ffhq64", "ffhq256", "imagenet32", "imagenet64"],
)
def test_r3gan_has_its_published_sizes(
    resolution: int, classes: int, widths: list[int], group_size: int, published: list[float]
) -> None:
    conditioning = "projection" if classes else "none"
    model = ModelConfig(family="r3gan", conditioning=conditioning, widths=tuple(widths), group_size=group_size)
    found = parameters(model, DataConfig(resolution=resolution, channels=3, num_classes=classes))
    assert [round(count / 1e6, 2) for count in found] == published


@pytest.mark.parametrize(
    ("resolution", "width", "mapping_layers", "published"),
    [(1024, 32, 8, (30_370_060, 29_012_513)), (1024, 32, 2, (28_794_124, 29_012_513)), (256, 64, 8, (24_767_458, 24_001_089))],
    ids=["ffhq1024", "two-layers", "ffhq256"],
)
def test_stylegan2_has_its_published_size(resolution: int, width: int, mapping_layers: int, published: tuple[int, int]) -> None:
    """As its training logs print them, and, for 256 pixels, as counted by hand."""
    sizes = {"generator_width": width, "discriminator_width": width, "mapping_layers": mapping_layers}
    model = ModelConfig(family="stylegan2", conditioning="none", latent_dim=512, **sizes)
    assert parameters(model, DataConfig(resolution=resolution, channels=3, num_classes=0)) == published
    if mapping_layers == 8:
        assert published == count_stylegan2(
            [min(512, width * resolution // pixels) for pixels in (4 << n for n in range(9)) if pixels <= resolution]
        )


def test_stylegan2_ada_for_cifar10_has_the_size_that_is_counted_by_hand() -> None:
    """Mapping networks of two layers and of eight, an embedding with a bias in both networks, no shortcuts."""
    sizes = {"generator_width": 512, "discriminator_width": 512, "mapping_layers": 2, "discriminator_architecture": "plain"}
    model = ModelConfig(family="stylegan2", latent_dim=512, **sizes)
    generator, discriminator = count_stylegan2([512] * 4)
    generator += linear(10, 512) + linear(1024, 512) - 7 * linear(512, 512)
    discriminator += linear(10, 512) + 9 * linear(512, 512) - linear(512, 1) - 3 * 512 * 512
    assert parameters(model, DataConfig(resolution=32, channels=3, num_classes=10)) == (generator, discriminator)


@pytest.mark.usefixtures("shapes_alone")
def test_stargan_has_its_published_size() -> None:
    """As its training prints it for CelebA with five attributes, and counted by hand: convolutions before norms have no bias,
    nor have the last ones of both networks."""
    model = ModelConfig(family="stargan", generator_width=64, discriminator_width=64, conditioning="auxiliary")
    data = DataConfig(resolution=128, channels=3, num_classes=5)
    found = [sum(p.numel() for p in make(model, data).parameters()) for make in (build_generator, build_discriminator)]
    outside = 49 * (3 + 5) * 64 + 2 * 64 + 49 * 64 * 3
    resampling = 2 * 16 * (64 * 128 + 128 * 256) + 2 * (128 + 256) + 2 * (128 + 64)
    generator = outside + resampling + 6 * 2 * (9 * 256 * 256 + 2 * 256)
    trunk = sum(linear(before, after, 16) for before, after in pairwise([3, 64, 128, 256, 512, 1024, 2048]))
    assert found == [generator, trunk + 9 * 2048 + 4 * 2048 * 5] == [8_430_528, 44_762_048]


def count_stylegan2(widths: list[int]) -> tuple[int, int]:
    """Of the unconditional networks with these channels from 4 pixels up and 512 latents."""

    def styled(before: int, after: int) -> int:
        return linear(512, before) + linear(before, after, 9) + 1

    generator = 8 * linear(512, 512) + 16 * widths[0] + styled(widths[0], widths[0])
    generator += sum(linear(512, width) + linear(width, 3) for width in widths)
    discriminator = linear(3, widths[-1]) + linear(widths[0] + 1, widths[0], 9) + linear(16 * widths[0], widths[0])
    discriminator += linear(widths[0], 1)
    for low, high in pairwise(widths):
        generator += styled(low, high) + styled(high, high)
        discriminator += linear(high, high, 9) + linear(high, low, 9) + high * low
    return generator, discriminator


# Formulas.


class TimesLabel(nn.Module):
    """In place of a norm."""

    def __init__(self, channels: int):
        super().__init__()

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return x * labels[:, None, None, None]


def test_residual_blocks_are_the_papers() -> None:
    """There, shortcuts are upsampled before and pooled after their convolution."""
    x, labels = torch.randn(3, 4, 6, 6, dtype=torch.float64), torch.tensor([1, 2, 3])
    up = ResidualUpBlock(4, 5, TimesLabel, nn.Module.double)
    scale = labels[:, None, None, None]
    h = F.conv2d(F.relu(x * scale).repeat_interleave(2, 2).repeat_interleave(2, 3), up.conv1.weight, up.conv1.bias, padding=1)
    h = F.conv2d(F.relu(h * scale), up.conv2.weight, up.conv2.bias, padding=1)
    shortcut = F.conv2d(x.repeat_interleave(2, 2).repeat_interleave(2, 3), up.shortcut.weight, up.shortcut.bias)
    torch.testing.assert_close(up(x, labels), h + shortcut)

    for first in (True, False):
        down = ResidualDownBlock(4, 6, 5, halve=True, preactivate=not first, layer=nn.Module.double)
        h = F.conv2d(x if first else F.relu(x), down.conv1.weight, down.conv1.bias, padding=1)
        h = F.conv2d(F.relu(h), down.conv2.weight, down.conv2.bias, padding=1)
        whole = h + F.conv2d(x, down.shortcut.weight, down.shortcut.bias)
        torch.testing.assert_close(down(x), whole.unflatten(2, (3, 2)).unflatten(4, (3, 2)).mean((3, 5)))


@pytest.mark.parametrize("name", ["batch", "layer"])
def test_norms_of_the_discriminator_are_their_formulas(name: str) -> None:
    """Batch norm, over all places of all images; layer norm, over all places and channels. Neither in the first block."""
    x = torch.randn(3, 4, 6, 6, dtype=torch.float64)
    block = ResidualDownBlock(4, 6, 5, halve=False, preactivate=True, layer=nn.Module.double, norm=NORMS[name]).double()

    def norm(x: torch.Tensor, module: nn.Module) -> torch.Tensor:
        nn.init.normal_(module.weight)
        nn.init.normal_(module.bias)
        dims = (0, 2, 3) if name == "batch" else (1, 2, 3)
        deviation = x - x.mean(dims, keepdim=True)
        normalized = deviation / (deviation.square().mean(dims, keepdim=True) + 1e-5).sqrt()
        return normalized * module.weight[:, None, None] + module.bias[:, None, None]

    h = F.conv2d(F.relu(norm(x, block.norm1)), block.conv1.weight, block.conv1.bias, padding=1)
    h = F.conv2d(F.relu(norm(h, block.norm2)), block.conv2.weight, block.conv2.bias, padding=1)
    shortcut = F.conv2d(x, block.shortcut.weight, block.shortcut.bias)
    torch.testing.assert_close(block(x), h + shortcut)
    assert (block.conv1.bias is None) == (name == "batch")
    first = ResidualDownBlock(3, 6, 6, halve=True, preactivate=False, layer=nn.Module.double, norm=NORMS[name])
    assert {each.partition(".")[0] for each, _ in first.named_parameters()} == {"conv1", "conv2", "shortcut"}


def test_dcgans_batch_norm_is_in_all_but_the_first_layer() -> None:
    networks = build("dcgan-batch")
    trunk, images = networks.discriminator.trunk, draw(networks)[2]
    x = F.leaky_relu(F.conv2d(images, trunk.from_image.weight, trunk.from_image.bias, padding=1), 0.1)
    for block in trunk.blocks:
        x = F.conv2d(x, block.downsample.weight, stride=2, padding=1)
        mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), correction=0, keepdim=True)
        x = (x - mean) / (var + 1e-5).sqrt() * block.norm.weight[:, None, None] + block.norm.bias[:, None, None]
        x = torch.where(x > 0, x, 0.1 * x)
    torch.testing.assert_close(trunk(images), x.mean((2, 3)))


def test_sagans_generator_has_spectral_norm() -> None:
    model = ModelConfig(
        family="resnet", generator_width=8, discriminator_width=8, attention=(16,), generator_spectral_norm=True
    )
    generator = build_generator(model, DataConfig(resolution=32)).double()
    with torch.no_grad():
        for parameter in generator.parameters():
            parameter += torch.randn_like(parameter)
    for _ in range(200):
        power_iteration(generator)
    layers = [module for module in generator.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    assert len(layers) == 1 + 3 * 3 + 4 + 1
    for layer in layers:
        assert torch.linalg.matrix_norm(layer.weight.flatten(1), 2).item() == pytest.approx(1, abs=1e-3)
        assert torch.linalg.matrix_norm(layer.parametrizations.weight.original.flatten(1), 2) > 2


def test_self_attention_is_the_formula() -> None:
    layer = SelfAttention(8, nn.Module.double).double()
    x = torch.randn(2, 8, 4, 4, dtype=torch.float64)
    assert torch.equal(layer(x), x)
    nn.init.constant_(layer.gain, 0.3)
    query, key, value = (
        torch.einsum("oc,bchw->bohw", each.weight[:, :, 0, 0], x) for each in (layer.query, layer.key, layer.value)
    )
    key, value = (each.unflatten(2, (2, 2)).unflatten(4, (2, 2)).amax((3, 5)).flatten(2) for each in (key, value))
    expected = x.clone()
    for image in range(2):
        for place in range(16):
            row, column = divmod(place, 4)
            weights = torch.stack([query[image, :, row, column].dot(key[image, :, other]) for other in range(4)]).exp()
            seen = sum(weights[other] / weights.sum() * value[image, :, other] for other in range(4))
            expected[image, :, row, column] += 0.3 * layer.output.weight[:, :, 0, 0] @ seen
    torch.testing.assert_close(layer(x), expected)


def test_resampling_is_filtering() -> None:
    taps = np.array([1, 3, 3, 1]) / 8
    x = np.random.default_rng(0).normal(size=(6, 6))

    def filtered(image: np.ndarray, gain: float) -> np.ndarray:
        """Along both axes, full length."""
        rows = np.stack([np.convolve(row, taps) for row in image])
        return gain * np.stack([np.convolve(column, taps) for column in rows.T]).T

    stuffed = np.zeros((12, 12))
    stuffed[::2, ::2] = x
    cases = [
        (Upsample(), filtered(stuffed, 4)[1:13, 1:13]),
        (Downsample(), filtered(x, 1)[2:8:2, 2:8:2]),
        (LowPass(padding=1, gain=4.0), filtered(x, 4)[2:7, 2:7]),
        (LowPass(padding=2), filtered(x, 1)[1:8, 1:8]),
    ]
    for layer, expected in cases:
        found = layer.double()(torch.tensor(x).expand(2, 3, 6, 6))
        torch.testing.assert_close(found, torch.tensor(expected).expand_as(found))


@pytest.mark.parametrize("resolution", [64, (64, 96), (64, 48)])
@pytest.mark.parametrize("family", ["resnet", "biggan_deep"])
def test_attention_comes_after_the_blocks_of_its_resolution(family: str, resolution: int | tuple[int, int]) -> None:
    model = ModelConfig(family=family, attention=(16, 32), generator_width=2, discriminator_width=2)
    data = DataConfig(resolution=resolution, channels=3)
    seen = []
    for network in (build_generator(model, data), build_discriminator(model, data)):
        for module in network.modules():
            if isinstance(module, SelfAttention):
                module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[2]))
        network(torch.zeros(2, 64) if not seen else torch.zeros(2, 3, *data.size), torch.zeros(2, dtype=torch.int64))
    assert seen == [16, 32, 32, 16]


def test_biggans_norms_are_linear_in_chunk_and_class() -> None:
    networks = build("biggan")
    latents, labels, _ = draw(networks)
    generator = networks.generator.eval()
    seen = []
    for module in generator.modules():
        if isinstance(module, LinearlyConditionedBatchNorm):
            module.register_forward_hook(lambda module, inputs, output: seen.append((module, *inputs, output)))
    generator(latents, labels)
    assert len(seen) == 6
    for number, (module, x, condition, output) in enumerate(seen):
        first = 2 * (1 + number // 2)  # the two norms of a block share a chunk of two
        expected = torch.cat([latents[:, first : first + 2], generator.embedding.weight[labels]], 1)
        torch.testing.assert_close(condition, expected)
        normalized = (x - module.norm.running_mean[:, None, None]) / (module.norm.running_var[:, None, None] + 1e-5).sqrt()
        gain, bias = (condition @ weight.T for weight in (module.gain.weight, module.bias.weight))
        torch.testing.assert_close(output, normalized * (1 + gain)[:, :, None, None] + bias[:, :, None, None])


def test_bottlenecks_are_the_papers() -> None:
    """Figure 16 of 1809.11096."""
    x, labels = torch.randn(3, 16, 6, 6, dtype=torch.float64), torch.tensor([1, 2, 3])
    scale = labels[:, None, None, None]

    def convolve(x: torch.Tensor, layer: nn.Conv2d) -> torch.Tensor:
        return F.conv2d(F.relu(x), layer.weight, layer.bias, padding=layer.kernel_size[0] // 2)

    def upsample(x: torch.Tensor) -> torch.Tensor:
        return x.repeat_interleave(2, 2).repeat_interleave(2, 3)

    def pool(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(2, (-1, 2)).unflatten(4, (-1, 2)).mean((3, 5))

    up = BottleneckUpBlock(16, 8, double=True, norm=TimesLabel).double()
    h = convolve(upsample(F.relu(convolve(x * scale, up.conv1) * scale)), up.conv2)
    h = convolve(convolve(h * scale, up.conv3) * scale, up.conv4)
    torch.testing.assert_close(up(x, labels), h + upsample(x[:, :8]))

    down = BottleneckDownBlock(16, 24, halve=True).double()
    h = convolve(pool(F.relu(convolve(convolve(convolve(x, down.conv1), down.conv2), down.conv3))), down.conv4)
    widened = F.conv2d(x, down.widen.weight, down.widen.bias)
    torch.testing.assert_close(down(x), h + pool(torch.cat([x, widened], 1)))
    assert [layer.out_channels for layer in (up.conv1, up.conv2, up.conv3, up.conv4)] == [4, 4, 4, 8]
    assert [layer.out_channels for layer in (down.conv1, down.conv2, down.conv3, down.conv4)] == [6, 6, 6, 24]


def test_biggan_deeps_norms_are_linear_in_the_whole_latent_and_the_class() -> None:
    networks = build("biggan_deep")
    latents, labels, _ = draw(networks)
    generator = networks.generator
    conditions = []
    for module in generator.modules():
        if isinstance(module, LinearlyConditionedBatchNorm):
            module.register_forward_pre_hook(lambda module, inputs: conditions.append(inputs[1]))
    generator.project.register_forward_pre_hook(lambda module, inputs: conditions.append(inputs[0]))
    generator(latents, labels)
    assert len(conditions) == 1 + 3 * 2 * 4
    for condition in conditions:
        torch.testing.assert_close(condition, torch.cat([latents, generator.embedding.weight[labels]], 1))


@pytest.mark.parametrize("family", ["biggan", "biggan_deep"])
def test_biggan_begins_orthogonal(family: str) -> None:
    model = ModelConfig(family=family, generator_width=2, discriminator_width=2)
    for network in (build_generator(model, DataConfig(resolution=32)), build_discriminator(model, DataConfig(resolution=32))):
        for module in network.modules():
            if hasattr(module, "parametrizations"):
                matrix = module.weight.flatten(1)
                matrix = matrix if len(matrix) <= matrix.size(1) else matrix.T
                torch.testing.assert_close(matrix @ matrix.T, torch.eye(len(matrix)), rtol=0, atol=1e-4)


def test_r3gan_begins_as_the_paper_says() -> None:
    model = ModelConfig(family="r3gan", generator_width=64, discriminator_width=64, latent_dim=256)
    data = DataConfig(resolution=16, channels=3, num_classes=20)
    torch.manual_seed(0)
    generator, discriminator = build_generator(model, data), build_discriminator(model, data)
    gain = math.sqrt(2 / 1.04) * 6 ** (-1 / 4)  # six blocks in either network
    expected = {
        "head.project": 1 / 8,
        "head.embedding": (20 * 64) ** -0.5,
        "project": 512**-0.5,
        "basis": 1,
        "gather": 1 / 4,
        "expand": gain / 8,
        "mix": gain / (9 * 16) ** 0.5,
        "to_image": 1 / 8,
        "from_image": 3**-0.5,
        "embedding": 20**-0.5,
    }
    for name, parameter in [*generator.named_parameters(), *discriminator.named_parameters()]:
        if name.endswith(("contract.weight", "bias")) and "classifier" not in name:
            assert not parameter.any(), name
        elif "classifier" not in name:
            std = next(value for part, value in expected.items() if part in name)
            assert parameter.std().item() == pytest.approx(std, rel=0.12), name
    latents, labels = torch.randn(2, 256), torch.tensor([3, 4])
    x = generator.project(torch.cat([latents, generator.embedding(labels)], 1))[:, :, None, None] * generator.basis
    x = generator.to_image(Upsample()(Upsample()(x)))  # its blocks are the identity at first
    torch.testing.assert_close(generator(latents, labels), x)


def test_r3gans_logit_is_the_projection_alone() -> None:
    head = PureProjectionHead(6, 4, nn.Module.double).double()
    features, labels = torch.randn(3, 6, dtype=torch.float64), torch.tensor([3, 0, 3])
    logits, *_ = head(features, labels)
    for logit, feature, label in zip(logits, features, labels, strict=True):
        torch.testing.assert_close(logit, (head.project.weight @ feature).dot(head.embedding.weight[label]))
    assert [name for name, _ in build("r3gan", "none").discriminator.head.named_parameters()] == ["adversarial.weight"]


def test_stargan_is_its_formulas() -> None:
    networks = build("stargan", "auxiliary")
    images, labels, _ = draw(networks)
    generator, discriminator = networks.generator, networks.discriminator

    def norm(x: torch.Tensor, module: nn.Module) -> torch.Tensor:
        """Of each channel of each image."""
        mean, var = x.mean((2, 3), keepdim=True), x.var((2, 3), keepdim=True, correction=0)
        return (x - mean) / (var + 1e-5).sqrt() * module.weight[:, None, None] + module.bias[:, None, None]

    first, *middle = generator.blocks
    maps = F.one_hot(labels, CLASSES)[:, :, None, None].expand(-1, -1, 16, 16)
    x = F.relu(norm(F.conv2d(torch.cat([images, maps], 1), first.convolution.weight, padding=3), first.norm))
    for number, block in enumerate(middle):
        weight = block.convolution.weight
        if number < 2:
            x = F.relu(norm(F.conv2d(x, weight, stride=2, padding=1), block.norm))
        elif number < 8:
            inner = F.relu(norm(F.conv2d(x, block.first.convolution.weight, padding=1), block.first.norm))
            x = x + norm(F.conv2d(inner, weight, padding=1), block.norm)
        else:
            x = F.relu(norm(F.conv_transpose2d(x, weight, stride=2, padding=1), block.norm))
    expected = torch.tanh(F.conv2d(x, generator.to_image.weight, padding=3))
    torch.testing.assert_close(generator(images, labels), expected)

    x = images
    for block in discriminator.trunk.blocks:
        x = F.conv2d(x, block.convolution.weight, block.convolution.bias, stride=2, padding=1)
        x = torch.where(x > 0, x, 0.01 * x)
    assert x.shape == (BATCH_SIZE, 16, 2, 2)
    patches = F.conv2d(x, discriminator.head.adversarial.weight, padding=1)
    output = discriminator(images, labels)
    torch.testing.assert_close(output.logits, patches.flatten(1).mean(1))
    torch.testing.assert_close(output.class_logits, torch.einsum("bchw,kchw->bk", x, discriminator.head.classifier.weight))


def test_mlp_is_its_formula() -> None:
    networks = build("mlp", channels=1)
    latents, labels, images = draw(networks)
    weights = copy.deepcopy(networks.generator.state_dict())
    x = torch.cat([latents, weights["embedding.weight"][labels]], 1)
    for layer in ("hidden1", "hidden2"):
        x = (x @ weights[f"{layer}.weight"].T + weights[f"{layer}.bias"]).clamp(min=0)
    x = torch.tanh(x @ weights["to_image.weight"].T + weights["to_image.bias"]).view(BATCH_SIZE, 1, 10, 10)
    torch.testing.assert_close(networks.generator(latents, labels), x)
    weights = networks.discriminator.trunk.state_dict()
    x = images.reshape(BATCH_SIZE, -1)
    for layer in ("hidden1", "hidden2"):
        x = x @ weights[f"{layer}.weight"].T + weights[f"{layer}.bias"]
        x = torch.where(x > 0, x, 0.2 * x)
    torch.testing.assert_close(networks.discriminator.trunk(images), x)


# StyleGAN2.


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def lrelu(x: torch.Tensor) -> torch.Tensor:
    return 2**0.5 * torch.where(x > 0, x, 0.2 * x)


def shake(module: nn.Module) -> nn.Module:
    """Off its first values, in float64."""
    module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return module


@pytest.mark.parametrize("up", [False, True])
def test_styled_convolution_is_the_papers(up: bool) -> None:
    """Equations 1 and 3 on the weight of each image; upsampled as zeros between the pixels, a convolution of all of them, and
    then the low-pass filter."""
    layer = shake(StyledConvolution(4, 5, 6, number=3, up=up))
    x, w, latents = random(3, 4, 6, 6), random(3, 6), torch.randn(3, 6)
    found = layer(x, w, latents)
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=torch.float64)
    for image in range(3):
        style = w[image] @ layer.style.parametrizations.weight.original.T / 6**0.5 + layer.style.bias
        weight = layer.weight / 36**0.5 * style[:, None, None]
        weight = weight / (weight.square().sum((1, 2, 3), keepdim=True) + 1e-8).sqrt()
        y = x[image : image + 1]
        if up:
            stuffed = y.new_zeros(1, 4, 11, 11)
            stuffed[:, :, ::2, ::2] = y
            y = F.conv2d(stuffed, weight.flip(2, 3), padding=2)  # 13 × 13
            y = F.conv2d(y.transpose(0, 1), 4 * torch.outer(taps, taps)[None, None] / 64, padding=1).transpose(0, 1)
        else:
            y = F.conv2d(y, weight, padding=1)
        y = y[0] + layer.noise_strength * hashed_normal(latents, y.shape[2:], 3)[image]
        torch.testing.assert_close(found[image], lrelu(y + layer.bias[:, None, None]), rtol=1e-6, atol=1e-6)


def test_images_are_modulated_sums() -> None:
    layer = shake(ToImage(4, 3, 6))
    x, w = random(2, 4, 5, 5), random(2, 6)
    style = w @ layer.style.weight.T + layer.style.bias
    expected = torch.einsum("oc,bc,bchw->bohw", layer.weight[:, :, 0, 0] / 2, style, x) + layer.bias[:, None, None]
    torch.testing.assert_close(layer(x, w), expected)


def test_synthesis_adds_up_the_images_of_all_resolutions() -> None:
    networks = build("stylegan2")
    generator = networks.generator.eval()
    latents, labels, _ = draw(networks)
    w = generator.mapping(latents, labels)
    ws = [w + 0.1 * number for number in range(4)]
    block = generator.blocks[0]
    x = generator.conv(generator.constant.expand(BATCH_SIZE, -1, -1, -1), ws[0], latents)
    image = block.upsample(generator.to_image(x, ws[1]))
    x = block.conv2(block.conv1(x, ws[1], latents), ws[2], latents)
    torch.testing.assert_close(generator.synthesize(torch.stack(ws, 1), latents), image + block.to_image(x, ws[3]))
    assert [layer.number for layer in generator.modules() if isinstance(layer, StyledConvolution)] == [0, 1, 2]


@pytest.mark.parametrize(("latent_dim", "classes"), [(6, 0), (6, 4), (0, 4)])
def test_mapping_network_is_its_formula(latent_dim: int, classes: int) -> None:
    network = shake(MappingNetwork(latent_dim, classes, 5, layers=3))
    latents, labels = random(3, 6), torch.tensor([2, 0, -1])
    parts = [latents] if latent_dim else []
    if classes:
        weight = network.embedding.parametrizations.weight.original / 2
        parts.append(torch.stack([weight[:, 2], weight[:, 0], torch.zeros(5)]) + network.embedding.bias)
    x = torch.cat([part / (part.square().mean(1, keepdim=True) + 1e-8).sqrt() for part in parts], 1)
    for layer in network.layers:
        weight, bias = (layer.parametrizations[name].original * 0.01 for name in ("weight", "bias"))
        x = lrelu(x @ weight.T / x.size(1) ** 0.5 + bias)
    torch.testing.assert_close(network(latents if latent_dim else None, labels), x)


def test_equalized_layers_begin_with_unit_gain() -> None:
    for layer, fan_in in (
        (nn.Linear(300, 200), 300),
        (nn.Conv2d(30, 80, 3), 270),
        (nn.Embedding(300, 200), 300),
    ):
        for rate in (1.0, 0.01):
            module = equalized(copy.deepcopy(layer), rate=rate, bias=1.0)
            assert module.parametrizations.weight.original.std().item() * rate == pytest.approx(1, rel=0.02)
            assert module.weight.std().item() == pytest.approx(fan_in**-0.5, rel=0.02)
            if not isinstance(layer, nn.Embedding):
                assert module.bias.unique().item() == pytest.approx(1)
    generator = build_generator(ModelConfig(family="stylegan2", latent_dim=512, generator_width=256), DataConfig(resolution=8))
    for name, parameter in generator.named_parameters():
        if name.endswith(("bias", "bias.original", "noise_strength")):
            assert parameter.unique().item() == (1 if "style" in name else 0), name
        else:
            assert parameter.std().item() == pytest.approx(100 if "mapping.layers" in name else 1, rel=0.05), name
    w = generator.mapping(torch.randn(64, 512), torch.arange(64) % 10)
    assert 0.5 < w.square().mean() < 2


def test_styles_are_mixed_in_training() -> None:
    model = ModelConfig(family="stylegan2", latent_dim=8, generator_width=2, mapping_layers=2, style_mixing=0.75)
    generator = build_generator(model, DataConfig(resolution=64)).double()
    latents, labels = random(2000, 8), torch.arange(2000) % 10
    first = generator.mapping(latents, labels)
    second = generator.mapping(hashed_normal(latents, (8,), -1).double(), labels)
    found = generator.styles(latents, labels)
    assert found.shape == (2000, 10, 8)
    is_first = (found == first[:, None]).all(2)
    assert (is_first | (found == second[:, None]).all(2)).all()
    crossover = is_first.sum(1)
    assert torch.equal(is_first, torch.arange(10) < crossover[:, None]), "one crossover an image"
    counts = crossover.bincount(minlength=11).tolist()
    assert counts[0] == 0
    assert abs(counts[10] - 500) < 80, "a quarter is not mixed"
    assert max(abs(count - 1500 / 9) for count in counts[1:10]) < 55
    generator.eval()
    assert torch.equal(generator.styles(latents, labels), first[:, None].expand(-1, 10, -1))
    generator.train().style_mixing = 0.0
    assert torch.equal(generator.styles(latents, labels), first[:, None].expand(-1, 10, -1))


@pytest.mark.parametrize("training", [False, True])
def test_an_image_depends_on_its_latents_alone(training: bool) -> None:
    networks = build("stylegan2")
    generator = networks.generator.train(training)
    latents, labels, _ = draw(networks)
    images = generator(latents, labels)
    torch.testing.assert_close(generator(latents, labels), images, rtol=0, atol=0)
    for number in range(BATCH_SIZE):
        torch.testing.assert_close(generator(latents[[number]], labels[[number]]), images[[number]])


def test_truncation_draws_toward_the_mean() -> None:
    networks = build("stylegan2")
    generator = networks.generator
    latents, labels, _ = draw(networks)
    nn.init.normal_(generator.w_average)
    whole = generator.eval().styles(latents, labels)
    with truncating(generator, 0.3):
        torch.testing.assert_close(generator.styles(latents, labels), 0.7 * generator.w_average + 0.3 * whole)
        images = generator(latents, labels)
    assert generator.truncation is None
    assert torch.equal(generator.styles(latents, labels), whole)
    assert not torch.equal(generator(latents, labels), images)


def running_means() -> dict[str, torch.Tensor]:
    """After three passes of either network over this rank's share of a batch, of which the second is not finite."""
    with join_world() as world:
        networks = build("stylegan2")
        generator, discriminator = networks.generator, networks.discriminator.trunk
        random = torch.Generator().manual_seed(2)
        for number in range(3):
            latents = torch.randn(8, 8, dtype=torch.float64, generator=random)
            images = torch.rand(8, 3, 8, 8, dtype=torch.float64, generator=random)
            if number == 1:
                latents[0], images[0] = torch.inf, torch.nan
            generator(latents[world.rank :: world.size], torch.arange(8)[world.rank :: world.size] % CLASSES)
            discriminator(images[world.rank :: world.size])
        if world.rank == 0:  # alone: nothing is exchanged in evaluation mode
            generator.eval()(latents[:1], torch.zeros(1, dtype=torch.int64))
            discriminator.eval()(images[:1])
        return {"w": generator.w_average, "std": discriminator.compare.running_std}


def test_running_means_are_those_of_all_ranks() -> None:
    networks = build("stylegan2")
    random = torch.Generator().manual_seed(2)
    w_average, std_average = torch.zeros(8, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    for number in range(3):
        latents = torch.randn(8, 8, dtype=torch.float64, generator=random)
        images = torch.rand(8, 3, 8, 8, dtype=torch.float64, generator=random)
        if number == 1:
            continue
        w = networks.generator.mapping(latents, torch.arange(8) % CLASSES)
        w_average = 0.998 * w_average + 0.002 * w.mean(0)
        trunk = networks.discriminator.trunk
        x = trunk.blocks[0](lrelu(trunk.from_image(images)))
        std_average = 0.9 * std_average + 0.1 * deviations(x, 2).mean()
    for means in run_ranks(2, running_means):
        torch.testing.assert_close(means["w"], w_average)
        torch.testing.assert_close(means["std"], std_average)


def deviations(x: torch.Tensor, group_size: int) -> torch.Tensor:
    """Of each image's group."""
    number = len(x) // group_size
    found = []
    for image in range(len(x)):
        members = torch.stack([x[image % number + step * number] for step in range(group_size)])
        found.append(((members - members.mean(0)).square().mean(0) + 1e-8).sqrt().mean())
    return torch.stack(found)


def test_minibatch_standard_deviation_is_its_formula() -> None:
    layer = MinibatchStandardDeviation(3).double()
    x = random(12, 4, 5, 5)
    found = layer(x)
    assert torch.equal(found[:, :4], x)
    torch.testing.assert_close(found[:, 4], deviations(x, 3)[:, None, None].expand(-1, 5, 5))
    for size in (2, 4):  # ranks
        for rank in range(size):
            torch.testing.assert_close(layer(x[rank::size]), found[rank::size])
    nn.init.constant_(layer.running_std, 0.7)
    alone = layer.eval()(x[:1])
    torch.testing.assert_close(alone[0, 4], torch.full((5, 5), 0.7, dtype=torch.float64))
    with pytest.raises(
        ConfigError, match=r"model.minibatch_std=3 does not divide the 4 images .* or say model.minibatch_std=0"
    ):
        layer.train()(x[:4])


def test_images_are_judged_alone_in_evaluation() -> None:
    networks = build("stylegan2")
    _, labels, images = draw(networks)
    discriminator = networks.discriminator
    assert discriminator.trunk.couples_images
    together = discriminator.eval()(images, labels)
    for number in range(BATCH_SIZE):
        alone = discriminator(images[[number]], labels[[number]])
        torch.testing.assert_close(alone.class_logits, together.class_logits[[number]])
        torch.testing.assert_close(alone.logits, together.logits[[number]])
    without = ModelConfig(family="stylegan2", discriminator_width=4, minibatch_std=0)
    trunk = build_discriminator(without, DataConfig(resolution=8, channels=3)).double().trunk
    assert not trunk.couples_images
    torch.testing.assert_close(trunk(images[:1]), trunk(images)[:1])


@pytest.mark.parametrize("residual", [True, False])
def test_stylegan2s_blocks_are_filtered_before_they_are_halved(residual: bool) -> None:
    block = shake(DownBlock(4, 5, residual=residual))
    x = random(2, 4, 8, 8)
    h = lrelu(F.conv2d(x, block.conv1.parametrizations.weight.original / 6, block.conv1.bias, padding=1))
    h = LowPass(padding=2).double()(h)
    h = F.conv2d(h, block.conv2.parametrizations.weight.original / 6)[:, :, ::2, ::2] + block.conv2.bias[:, None, None]
    h = lrelu(h)
    if residual:
        filtered = LowPass(padding=1).double()(x)
        h = (h + F.conv2d(filtered, block.shortcut[1].parametrizations.weight.original / 2)[:, :, ::2, ::2]) / 2**0.5
    torch.testing.assert_close(block(x), h)


def test_stylegan2s_logit_is_the_projection_on_the_mapped_label() -> None:
    head = shake(MappedProjectionHead(6, 4, equalized))
    features, labels = random(3, 6), torch.tensor([3, 0, 3])
    logits, *_ = head(features, labels)
    project = head.project.parametrizations.weight.original / 6**0.5
    for logit, feature, label in zip(logits, features, head.mapping(None, labels), strict=True):
        torch.testing.assert_close(logit, (project @ feature + head.project.bias).dot(label) / 6**0.5)


# Images that are not square.


@pytest.mark.parametrize(
    ("resolution", "sides", "expected"),
    [
        (16, None, (16, 2, (4, 4))),
        ((16, 32), None, (16, 2, (4, 8))),
        ((32, 16), None, (16, 2, (8, 4))),
        ((16, 32), (32, 64), (32, 3, (2, 4))),
        ((48, 64), None, (64, 4, (3, 4))),
        ((64, 80), None, (64, 4, (4, 5))),
        ((4, 8), None, (8, 1, (2, 4))),
        (4, None, None),
        (24, None, None),
        ((24, 40), None, None),
        ((16, 18), None, None),
        ((16, 48), (32, 64), None),
    ],
)
def test_feature_maps_have_a_side_of_four_pixels(
    resolution: int | tuple[int, int], sides: tuple[int, ...] | None, expected: tuple | None
) -> None:
    assert find_pyramid(resolution, sides) == expected


def test_a_pair_of_equal_sides_is_a_square() -> None:
    for family in FAMILIES:
        resolution, sizes = SMALL[family]
        model = ModelConfig(family=family, latent_dim=8, **sizes)
        states = []
        for same in (resolution, (resolution, resolution)):
            torch.manual_seed(0)
            data = DataConfig(resolution=same, channels=3)
            states.append(build_generator(model, data).state_dict() | build_discriminator(model, data).state_dict())
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


# Mistakes.


@pytest.mark.parametrize(
    ("family", "resolution", "model", "message"),
    [
        ("dcgan", 12, {}, "data.resolution=12: dcgan makes images of 8, 16"),
        ("r3gan", 12, {}, "data.resolution=12: r3gan makes images of 8, 16"),
        ("r3gan", 4, {}, "data.resolution=4: r3gan makes images of 8, 16"),
        (
            "dcgan",
            (12, 20),
            {},
            r"=\[12,20\]: dcgan makes images of 8, 16, .* on one side, and on the other a multiple",
        ),
        ("stylegan2", (4, 6), {}, r"=\[4,6\]: stylegan2 makes images of 8, 16, 32, 64, … pixels on one side"),
        ("biggan", (16, 128), {}, r"=\[16,128\]: biggan makes images of 32, 64, 128, 256, 512 pixels on one side"),
        ("r3gan", (16, 20), {"widths": (8, 8)}, r"model.widths=\[8, 8\]: images of 16x20 pixels want 3 of them"),
        ("r3gan", 16, {"widths": (8, 8)}, r"model.widths=\[8, 8\]: images of 16 pixels want 3 of them"),
        ("r3gan", 16, {"group_size": 7}, "model.group_size=7 does not divide 2 × 16.*choose"),
        ("stylegan2", 12, {}, "data.resolution=12: stylegan2 makes images of 8, 16"),
        ("stylegan2", 4, {}, "data.resolution=4: stylegan2 makes images of 8, 16"),
        ("resnet", 16, {}, "data.resolution=16: resnet makes images of 32, 64, 128 pixels"),
        ("biggan", 16, {}, "data.resolution=16: biggan makes images of 32, 64, 128, 256, 512 pixels"),
        ("resnet", 32, {"attention": (32,)}, r"model.attention=\[32\]: for images of 32 pixels .* of 8, 16 pixels: choose"),
        ("biggan", 64, {"attention": (4, 8)}, r"model.attention=\[4, 8\]: for images of 64 pixels .* of 8, 16, 32 pixels"),
        ("biggan", 32, {"latent_dim": 63}, "model.latent_dim=63: biggan splits it into 4 equal parts.*such as 80"),
    ],
)
def test_impossible_networks_are_refused(family: str, resolution: int | tuple[int, int], model: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_generator(ModelConfig(family=family, **model), DataConfig(resolution=resolution))
