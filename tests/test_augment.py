"""Augmentation: each transform against NumPy and SciPy, what follows from drawing outside, derivatives, and the adaptive
probability on several ranks."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import ndimage, stats
from torch import nn

from gandist.augment import (
    AUGMENTATIONS,
    COLUMNS,
    OF_COLOURS,
    SYM6,
    AdaptiveAugment,
    AdaptiveProbability,
    DiffAugment,
    Translation,
    flip,
    shift_and_flip,
)
from gandist.distributed import join_world
from gandist.penalties import gradient_of, zero_centered
from tests.ranks import run_ranks

ALWAYS = torch.tensor(1.0)
GEOMETRIC = ("xflip", "rotate90", "xint", "scale", "rotate", "aniso", "xfrac")
COLOURS = ("brightness", "contrast", "lumaflip", "hue", "saturation")
every_pipe = pytest.mark.parametrize("pipe", AUGMENTATIONS)


def draw(count: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).random((count, columns), np.float32))


def noise(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).uniform(-1, 1, shape))


def smooth(*shape: int) -> torch.Tensor:
    """Images without anything near the highest frequencies."""
    images = ndimage.gaussian_filter(noise(*shape).numpy(), (0, 0, 2.5, 2.5), mode="mirror")
    return torch.from_numpy(images / abs(images).max())


def applied(images: torch.Tensor, **parameters: tuple[float, ...]) -> np.ndarray:
    """Transforms alone, to all images, with these parameters among the uniform numbers."""
    pipe = AdaptiveAugment(images.size(1), dict.fromkeys(parameters, 1.0))
    numbers = [(0.5, *parameters.get(name, (0.5,) * (count - 1))) for name, count in COLUMNS.items()]
    uniforms = torch.tensor(sum(numbers, ()), dtype=torch.float64).expand(len(images), -1)
    return pipe(images, uniforms, ALWAYS).numpy()


# What moves whole pixels.


def test_flip() -> None:
    images = noise(4, 3, 5, 6)
    found = flip(images, torch.tensor([0.0, 0.49, 0.5, 0.99]))
    assert torch.equal(found, torch.cat([images[:2, :, :, range(5, -1, -1)], images[2:]]))


def test_shift_and_flip() -> None:
    """Every shift is as frequent as any other, and is a crop of the image padded by reflection."""
    image = noise(1, 2, 16, 24)
    uniforms = torch.cartesian_prod(torch.tensor([0.2, 0.7]), (torch.arange(5) + 0.5) / 5, (torch.arange(7) + 0.5) / 7)
    found = shift_and_flip(image.expand(len(uniforms), -1, -1, -1), uniforms).numpy()
    crops = []
    for sides in (image.numpy()[0, :, :, ::-1], image.numpy()[0]):
        padded = np.pad(sides, ((0, 0), (2, 2), (3, 3)), mode="reflect")
        crops += [padded[:, row : row + 16, column : column + 24] for row in range(4, -1, -1) for column in range(6, -1, -1)]
    assert np.array_equal(found, np.stack(crops))


@pytest.mark.parametrize("quarters", range(4))
def test_quarter_turns(quarters: int) -> None:
    images = noise(2, 3, 8, 8)
    found = applied(images, rotate90=((quarters + 0.5) / 4,))
    assert np.array_equal(found, np.rot90(images.numpy(), -quarters, (2, 3)))


@pytest.mark.parametrize("shape", [(8, 14), (15, 9)])
@pytest.mark.parametrize("quarters", range(4))
def test_quarter_turns_of_images_that_are_not_square(shape: tuple[int, int], quarters: int) -> None:
    """About the middle, within the same frame; what comes in beyond the shorter side is a reflection."""
    images = noise(2, 3, *shape)
    side = max(shape)
    margins = [(side - each) // 2 for each in shape]
    padded = np.pad(images.numpy(), ((0, 0), (0, 0), *((margin, margin) for margin in margins)), mode="reflect")
    top, left = margins
    expected = np.rot90(padded, -quarters, (2, 3))[:, :, top : top + shape[0], left : left + shape[1]]
    assert np.array_equal(applied(images, rotate90=((quarters + 0.5) / 4,)), expected)


@pytest.mark.parametrize("shape", [(16, 24), (9, 15)])
def test_mirroring_and_whole_shifts(shape: tuple[int, int]) -> None:
    images = noise(2, 3, *shape)
    assert np.array_equal(applied(images, xflip=(0.3,)), images.numpy()[..., ::-1])
    assert np.array_equal(applied(images, xflip=(0.7,)), images.numpy())
    for right, down in ((0.0, 0.999), (0.3, 0.5), (0.9, 0.1)):
        columns, rows = (round(0.125 * (2 * u - 1) * size) for u, size in ((right, shape[1]), (down, shape[0])))
        padded = np.pad(images.numpy(), ((0, 0), (0, 0), (4, 4), (4, 4)), mode="reflect")
        expected = padded[:, :, 4 - rows : 4 - rows + shape[0], 4 - columns : 4 - columns + shape[1]]
        assert np.array_equal(applied(images, xint=(right, down)), expected)


def test_cutout() -> None:
    images = noise(1, 3, 8, 12)
    for row, column in ((0.0, 0.99), (0.45, 0.3), (0.8, 0.5)):
        expected = images.numpy().copy()
        for i in range(8):
            for j in range(12):
                if abs((i + 0.5) / 8 - row) < 1 / 4 and abs((j + 0.5) / 12 - column) < 1 / 4:
                    expected[:, :, i, j] = 0
        assert np.array_equal(applied(images, cutout=(row, column)), expected)


# What is resampled.


def test_the_wavelet() -> None:
    """Orthonormal to its own shifts by two, with six vanishing moments."""
    taps = np.array(SYM6)
    for shift in range(6):
        assert taps[2 * shift :] @ taps[: 12 - 2 * shift] == pytest.approx(1 if shift == 0 else 0, abs=1e-11)
    for moment in range(6):
        assert taps @ ((-1.0) ** np.arange(12) * (np.arange(12) / 12) ** moment) == pytest.approx(0, abs=1e-11)


def test_resampling_by_whole_pixels_changes_nothing() -> None:
    images = noise(2, 3, 16, 24)
    right, down = stats.norm.cdf(3 / 24 / 0.125), stats.norm.cdf(-2 / 16 / 0.125)
    found = applied(images, xfrac=(right, down))
    margin = 6  # the filter's reach from the edge
    inside = images.numpy()[:, :, margin + 2 : 16 - margin + 2, margin - 3 : 24 - margin - 3]
    np.testing.assert_allclose(found[:, :, margin : 16 - margin, margin : 24 - margin], inside, rtol=0, atol=1e-5)


def test_resampling_keeps_an_even_image() -> None:
    uniforms = draw(16, AdaptiveAugment.columns).double()
    pipe = AdaptiveAugment(3, dict.fromkeys(GEOMETRIC, 1.0))
    found = pipe(torch.full((16, 3, 9, 14), 0.3, dtype=torch.float64), uniforms, ALWAYS)
    torch.testing.assert_close(found, torch.full_like(found, 0.3), rtol=0, atol=1e-10)


def turn(angle: float) -> np.ndarray:
    """Of (x, y, 1), y downwards."""
    return np.array([[math.cos(angle), -math.sin(angle), 0], [math.sin(angle), math.cos(angle), 0], [0, 0, 1]])


def shift(x: float, y: float) -> np.ndarray:
    return np.array([[1, 0, x], [0, 1, y], [0, 0, 1.0]])


def transformed(images: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """By SciPy's cubic splines; matrix: where (x, y, 1) from the middle goes."""
    height, width = images.shape[2:]
    places = shift((width - 1) / 2, (height - 1) / 2)
    inverse = (places @ np.linalg.inv(matrix) @ np.linalg.inv(places))[[1, 0, 2]][:, [1, 0, 2]]
    return np.stack([[ndimage.affine_transform(c, inverse, mode="mirror", order=3) for c in image] for image in images])


NORMAL = stats.norm.ppf
GEOMETRY = {  # parameters → the matrix of the paper, for an image of 24 × 32
    "scale": [((u,), np.diag([2 ** (0.2 * NORMAL(u))] * 2 + [1])) for u in (0.02, 0.6, 0.999)],
    "rotate": [((u, 0.0, v), turn(math.pi * (2 * v - 1)) @ turn(math.pi * (2 * u - 1))) for u, v in ((0.6, 0.5), (0.1, 0.7))],
    "aniso": [((u,), np.diag([2 ** (0.2 * NORMAL(u)), 2 ** (-0.2 * NORMAL(u)), 1])) for u in (0.02, 0.9)],
    "xfrac": [((u, v), shift(0.125 * NORMAL(u) * 32, 0.125 * NORMAL(v) * 24)) for u, v in ((0.3, 0.8), (0.99, 0.5))],
}


@pytest.mark.parametrize("name", GEOMETRY)
def test_geometric_transforms(name: str) -> None:
    images = smooth(2, 3, 24, 32)
    for parameters, matrix in GEOMETRY[name]:
        np.testing.assert_allclose(applied(images, **{name: parameters}), transformed(images.numpy(), matrix), atol=0.015)


def test_half_turns_stay_in_place() -> None:
    images = smooth(2, 1, 17, 24)
    expected = images.numpy()[:, :, ::-1, ::-1]
    np.testing.assert_allclose(applied(images, rotate=(1.0, 0.0, 0.5)), expected, atol=0.02)


def test_geometric_transforms_are_composed_in_the_papers_order() -> None:
    images = smooth(1, 1, 32, 32)
    for flipped in (0.2, 0.8):
        parameters = {
            "xflip": (flipped,),
            "rotate90": (0.3,),
            "xint": (0.1, 0.6),
            "scale": (0.4,),
            "rotate": (0.55, 0.0, 0.4),
            "aniso": (0.2,),
            "xfrac": (0.7, 0.4),
        }
        matrix = np.eye(3)
        for step in (
            np.diag([-1 if flipped < 0.5 else 1, 1, 1]),
            turn(math.pi / 2),
            shift(round(0.125 * -0.8 * 32), round(0.125 * 0.2 * 32)),
            np.diag([2 ** (0.2 * NORMAL(0.4))] * 2 + [1]),
            turn(math.pi * 0.1),
            np.diag([2 ** (0.2 * NORMAL(0.2)), 2 ** (-0.2 * NORMAL(0.2)), 1]),
            turn(math.pi * -0.2),
            shift(0.125 * NORMAL(0.7) * 32, 0.125 * NORMAL(0.4) * 32),
        ):
            matrix = step @ matrix
        np.testing.assert_allclose(applied(images, **parameters), transformed(images.numpy(), matrix), atol=0.015)


# Colours.


def recolouring(channels: int, parameters: dict[str, float]) -> np.ndarray:
    """The paper's 4 × 4 matrix, of homogeneous colours; the hue turned by Rodrigues' formula."""
    v = np.array([1, 1, 1, 0])[:, None] / math.sqrt(3)
    brightness = 0.2 * NORMAL(parameters["brightness"])
    contrast = 2 ** (0.5 * NORMAL(parameters["contrast"]))
    matrix = np.eye(4)
    matrix[:3, 3] = brightness
    matrix = np.diag([contrast] * 3 + [1]) @ matrix
    if channels == 3:
        angle, saturation = math.pi * (2 * parameters["hue"] - 1), 2 ** NORMAL(parameters["saturation"])
        x, y, z = v[:3, 0]
        cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
        turned = np.eye(4)
        turned[:3, :3] = np.eye(3) + math.sin(angle) * cross + (1 - math.cos(angle)) * cross @ cross
        if parameters["lumaflip"] < 0.5:
            matrix = (np.eye(4) - 2 * v @ v.T) @ matrix
        matrix = turned @ matrix
        matrix = (v @ v.T + (np.eye(4) - v @ v.T) @ np.diag([saturation] * 3 + [1])) @ matrix
    return matrix


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("names", [*((name,) for name in COLOURS), COLOURS], ids="-".join)
def test_colour_transforms(names: tuple[str, ...], channels: int) -> None:
    images = noise(2, channels, 8, 9)
    nothing = {"brightness": 0.5, "contrast": 0.5, "lumaflip": 0.9, "hue": 0.5, "saturation": 0.5}
    for numbers in ((0.3, 0.8, 0.1, 0.2, 0.7), (0.9, 0.2, 0.6, 0.95, 0.1)):
        parameters = {name: u for name, u in zip(COLOURS, numbers, strict=True) if name in names}
        matrix = recolouring(channels, nothing | parameters)
        colours = np.concatenate([np.broadcast_to(images, (2, 3, 8, 9)), np.ones((2, 1, 8, 9))], 1)
        expected = np.einsum("cd,bdhw->bchw", matrix, colours)[:, :channels]
        found = applied(images, **{name: (u,) for name, u in parameters.items()})
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


def test_diffaugment_is_the_papers() -> None:
    height, width = 12, 9
    images = noise(40, 3, height, width)
    uniforms = draw(40, DiffAugment.columns).double()
    found = DiffAugment()(images, uniforms, ALWAYS).numpy()
    for image, numbers, result in zip(images.numpy(), uniforms.numpy(), found, strict=True):
        light, colour, contrast, down, right, row, column = numbers[5:]
        x = image + (light - 0.5)
        grey = x.mean(0, keepdims=True)
        x = (x - grey) * (2 * colour) + grey
        x = (x - x.mean()) * (contrast + 0.5) + x.mean()
        # 12/8 and 9/8 pixels are 2 and 1, halves of 12 and 9 are 6 and 5.
        padded = np.pad(x, ((0, 0), (2, 2), (1, 1)))
        first, second = 2 - (int(down * 5) - 2), 1 - (int(right * 3) - 1)
        x = padded[:, first : first + height, second : second + width].copy()
        first, second = int(row * 13) - 3, int(column * 9) - 2
        x[:, max(first, 0) : first + 6, max(second, 0) : second + 5] = 0
        np.testing.assert_allclose(result, x, rtol=0, atol=1e-12)


def test_translation_is_a_shift_of_the_reflected_image() -> None:
    height, width = 16, 9
    images, uniforms = noise(40, 3, height, width), draw(40, 3).double()
    found = Translation()(images, uniforms, ALWAYS).numpy()
    for image, (_, down, right), result in zip(images.numpy(), uniforms.numpy(), found, strict=True):
        # 16/8 and 9/8 pixels are 2 and 1.
        padded = np.pad(image, ((0, 0), (2, 2), (1, 1)), "reflect")
        first, second = 2 - (int(down * 5) - 2), 1 - (int(right * 3) - 1)
        np.testing.assert_array_equal(result, padded[:, first : first + height, second : second + width])


# Chances.


@every_pipe
def test_nothing_happens_at_probability_0(pipe: str) -> None:
    augment, images = AUGMENTATIONS[pipe](3), noise(50, 3, 8, 8).float()
    assert torch.equal(augment(images, draw(50, augment.columns), torch.tensor(0.0)), images)


@pytest.mark.parametrize("name", COLUMNS)
def test_transforms_are_as_frequent_as_they_should_be(name: str) -> None:
    count, probability, strength = 2000, 0.6, 0.5
    images = noise(1, 3, 16, 16).float().expand(count, -1, -1, -1)
    uniforms = draw(count, AdaptiveAugment.columns)
    changed = AdaptiveAugment(3, {name: strength})(images, uniforms, torch.tensor(probability)) != images
    visible = {"xflip": 1 / 2, "rotate90": 3 / 4, "xint": 15 / 16, "lumaflip": 1 / 2}.get(name, 1)
    number = changed.flatten(1).any(1).sum().item()
    assert 1e-4 < stats.binom.cdf(number, count, probability * strength * visible) < 1 - 1e-4


def test_transforms_of_diffaugment_are_independent() -> None:
    """At an even chance all 32 combinations of the five are as frequent."""
    pipe, count = DiffAugment(), 4000
    uniforms = draw(count, pipe.columns)
    drawn = (uniforms[:, :5] < 0.5).long() @ (2 ** torch.arange(5))
    image = torch.zeros(1, 1, 8, 8)
    image[:, :, :4] = 1
    assert stats.chisquare(drawn.bincount(minlength=32)).pvalue > 1e-4
    unchanged = (pipe(image.expand(count, -1, -1, -1), uniforms, torch.tensor(0.5)) == image).flatten(1).all(1)
    assert unchanged[drawn == 0].all()


def test_pipes() -> None:
    """Grey images have no colours; R3GAN halves the chances of all colour transforms."""
    assert [make(3).columns for make in AUGMENTATIONS.values()] == [3, 12, 31, 31]
    ada, r3gan = AUGMENTATIONS["ada"](3).strengths, AUGMENTATIONS["r3gan"](3).strengths
    assert ada == dict.fromkeys(GEOMETRIC + COLOURS, 1.0) | {"cutout": 0.0}
    assert r3gan == dict.fromkeys(GEOMETRIC, 1.0) | dict.fromkeys(COLOURS, 0.5) | {"cutout": 1.0}
    assert {name for name, strength in AUGMENTATIONS["r3gan"](1).strengths.items() if not strength} == set(OF_COLOURS)


@every_pipe
@pytest.mark.parametrize(("channels", "height", "width"), [(1, 8, 8), (3, 33, 20), (3, 256, 64)])
def test_images_do_not_depend_on_their_batch(pipe: str, channels: int, height: int, width: int) -> None:
    augment, images = AUGMENTATIONS[pipe](channels), noise(6, channels, height, width)
    uniforms = draw(6, augment.columns)
    together = augment(images, uniforms, torch.tensor(0.8))
    assert together.isfinite().all()
    for some in ([3, 0, 5, 1, 4, 2], [0, 3], [1, 4], [2, 5]):
        found = augment(images[some], uniforms[some], torch.tensor(0.8))
        torch.testing.assert_close(found, together[some], rtol=0, atol=1e-12)


@every_pipe
def test_formats(pipe: str) -> None:
    """Memory formats change nothing, and neither does autocast; bfloat16 images are computed with in float32."""
    augment, images = AUGMENTATIONS[pipe](3), noise(8, 3, 16, 16).float()
    uniforms = draw(8, augment.columns)
    expected = augment(images, uniforms, ALWAYS)
    torch.testing.assert_close(augment(images.to(memory_format=torch.channels_last), uniforms, ALWAYS), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(augment(images, uniforms, ALWAYS), expected)
    short = augment(images.bfloat16(), uniforms, ALWAYS)
    assert short.dtype == torch.bfloat16
    assert torch.equal(short, augment(images.bfloat16().float(), uniforms, ALWAYS).bfloat16())


# Derivatives.


def functions() -> dict[str, tuple[Callable[..., torch.Tensor], int]]:
    """Of images and uniform numbers; and how many of these an image wants."""
    pipes = {name: make(3) for name, make in AUGMENTATIONS.items()}
    found = {name: (lambda x, u, pipe=pipe: pipe(x, u, ALWAYS), pipe.columns) for name, pipe in pipes.items()}
    return found | {"shift_and_flip": (shift_and_flip, 3)}


@pytest.mark.parametrize("name", functions())
def test_derivatives(name: str) -> None:
    function, columns = functions()[name]
    uniforms = draw(2, columns).double()
    images = noise(2, 3, 8, 9).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: function(x, uniforms), images, fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda x: function(x, uniforms).square(), images, fast_mode=True)


class Penalized(nn.Module):
    """R1 of a small discriminator behind an augmentation, with respect to the images before it."""

    def __init__(self, pipe: str):
        super().__init__()
        torch.manual_seed(0)
        self.augment = AUGMENTATIONS[pipe](3)
        self.network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Softplus(), nn.Flatten(), nn.Linear(4 * 6 * 6, 1)).double()

    def forward(self, images: torch.Tensor, uniforms: torch.Tensor, probability: torch.Tensor) -> torch.Tensor:
        def discriminate(images: torch.Tensor) -> tuple[torch.Tensor, tuple[()]]:
            return self.network(self.augment(images, uniforms, probability)).squeeze(1), ()

        return zero_centered(gradient_of(discriminate, images)[0])


@every_pipe
def test_penalties_compiled_or_not(pipe: str) -> None:
    images, gradients = noise(3, 3, 8, 8), []
    for backend in (None, "aot_eager"):
        module = Penalized(pipe)
        if backend:
            torch._dynamo.reset()
            module.compile(backend=backend, fullgraph=True)
        module(images, draw(3, module.augment.columns).double(), ALWAYS).backward()
        gradients.append([parameter.grad for parameter in module.network.parameters()][:-1])
    for eager, compiled in zip(*gradients, strict=True):
        assert eager.any()
        torch.testing.assert_close(compiled, eager, rtol=1e-9, atol=1e-12)


# The adaptive probability.

BATCH = 8


def batches() -> torch.Tensor:
    """Logits of 60 batches, of real images that are taken for real ever more often, and then less."""
    sure = 3 * torch.sin(torch.arange(60) / 8)
    logits = torch.randn(60, BATCH, generator=torch.Generator().manual_seed(0)) + sure[:, None]
    logits[7, 3], logits[20], logits[21, ::2] = torch.nan, -torch.inf, torch.inf
    return logits


def trajectory(micro_batches: int) -> list[float]:
    """The probability after each batch, on this rank."""
    with join_world() as world:
        adaptive = AdaptiveProbability(target=0.6, speed_kimg=0.4, batch_size=BATCH)
        probabilities = []
        for logits in batches():
            for part in logits[world.rank :: world.size].chunk(micro_batches):
                adaptive.observe(part)
            probabilities.append(adaptive.probability.item())
        return probabilities


@pytest.mark.parametrize(("world_size", "micro_batches"), [(1, 1), (1, 4), (2, 2), (4, 1)])
def test_adaptive_probability_is_the_same_on_all_ranks(world_size: int, micro_batches: int) -> None:
    probability, seen, expected = 0.0, [], []
    for number, logits in enumerate(batches().tolist(), 1):
        seen += [math.copysign(1, logit) for logit in logits if math.isfinite(logit)]
        if number % 4 == 0:
            probability += math.copysign(4 * BATCH / 400, np.mean(seen) - 0.6)
            probability = min(max(probability, 0), 1)
            seen = []
        expected.append(probability)
    assert min(expected[12:]) == 0
    assert max(expected) > 0.3
    for found in run_ranks(world_size, trajectory, micro_batches):
        assert found == pytest.approx(expected, abs=1e-6)


def test_adaptive_probability_without_signs() -> None:
    """In evaluation mode nothing is observed; what is not finite tells nothing; it ends at 0 and 1; it can be compiled."""
    adaptive = AdaptiveProbability(target=0.6, speed_kimg=0.1, batch_size=4)
    adaptive.eval().observe(torch.ones(16))
    assert not adaptive.sums.any()
    adaptive.train().observe(torch.full((16,), torch.nan))
    assert adaptive.probability == 0
    observe = torch.compile(adaptive.observe, backend="aot_eager", fullgraph=True)
    for _ in range(3):
        observe(torch.ones(16))
    assert adaptive.probability.item() == pytest.approx(0.48)
    for _ in range(10):
        observe(torch.ones(16))
    assert adaptive.probability == 1
    for _ in range(20):
        observe(-torch.ones(16))
    assert adaptive.probability == 0
