"""Noise that is a function of the latents, against Python's integers and the distributions it should have."""

import math

import numpy as np
import pytest
import scipy.stats
import torch

from gandist.models.noise import hashed_normal, hashed_uniform

DRAWS = {"uniform": (hashed_uniform, scipy.stats.uniform), "normal": (hashed_normal, scipy.stats.norm)}
both = pytest.mark.parametrize(("draw", "distribution"), DRAWS.values(), ids=DRAWS)


def latents(count: int = 64, size: int = 16) -> torch.Tensor:
    return torch.randn(count, size, generator=torch.Generator().manual_seed(0))


def splitmix64(x: int) -> int:
    """The finalizer (Steele et al. 2014), of non-negative integers."""
    x %= 2**64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


@pytest.mark.parametrize("salt", [3, -2])
def test_the_hash_is_splitmix64_of_all_coordinates(salt: int) -> None:
    z, golden, size = latents(2, 5), 0x9E3779B97F4A7C15, 7
    uniform, normal = (draw(z, (size,), salt) for draw in (hashed_uniform, hashed_normal))
    for image, latent in enumerate(z.numpy().view(np.int32).astype(object)):
        key = splitmix64(sum(splitmix64(int(bits) + place * golden) for place, bits in enumerate(latent, start=1)) + salt)
        numbers = [splitmix64(key + place * golden) for place in range(1, size + 1)]
        assert uniform[image].tolist() == [(number >> 40) * 2**-24 for number in numbers]
        cosines, sines = [], []
        for number in numbers[:4]:
            radius = math.sqrt(-2 * math.log((number % 2**32 + 0.5) / 2**32))
            angle = 2 * math.pi * (number >> 32) / 2**32
            cosines.append(radius * math.cos(angle))
            sines.append(radius * math.sin(angle))
        assert normal[image].tolist() == pytest.approx([*cosines, *sines[:3]], rel=1e-6, abs=1e-7)


@both
def test_distribution(draw, distribution) -> None:
    found = draw(latents(), (3, 32, 32), 1)
    assert (found.shape, found.dtype) == ((64, 3, 32, 32), torch.float32)
    assert scipy.stats.kstest(found.flatten().numpy(), distribution.cdf).pvalue > 0.01
    for image in found[:8]:
        assert scipy.stats.kstest(image.flatten().numpy(), distribution.cdf).pvalue > 1e-3
    assert draw(latents(), (), 1).shape == (64,)


@both
def test_nothing_is_correlated(draw, distribution) -> None:
    z = latents()
    near = z.clone()
    near[:, 7] = torch.nextafter(z[:, 7], torch.tensor(9.0))  # one bit of one coordinate
    found = draw(z, (32, 32), 1)
    others = {
        "the pixel beside it": (found[:, :, 1:], found[:, :, :-1]),
        "the pixel below it": (found[:, 1:], found[:, :-1]),
        "the pixel of the same hash": (found[:, 16:], found[:, :16]),
        "the next image": (found[1:], found[:-1]),
        "the next salt": (found, draw(z, (32, 32), 2)),
        "nearly the same latents": (found, draw(near, (32, 32), 1)),
        "a coordinate": (found, z[:, 7, None, None].expand_as(found)),
        "coordinates": (found[:, 0, :16], z),
    }
    for name, (a, b) in others.items():
        for x, y in ((a, b), (a.square(), b.square())):
            correlation = np.corrcoef(x.flatten(), y.flatten())[0, 1]
            assert abs(correlation) < 4 / math.sqrt(a.numel()), name


@both
def test_batches_do_not_matter(draw, distribution) -> None:
    z = latents(8)
    whole = draw(z, (5, 5), 3)
    order = torch.tensor([3, 1, 7, 0, 2, 6, 5, 4])
    assert torch.equal(draw(z[order], (5, 5), 3), whole[order])
    assert torch.equal(torch.cat([draw(each, (5, 5), 3) for each in z.split([1, 3, 4])]), whole)
    assert torch.equal(draw(z.double(), (5, 5), 3), whole)
    assert torch.equal(torch.stack([draw(z[rank::2], (5, 5), 3) for rank in range(2)], 1).flatten(0, 1), whole)


@both
def test_compiled_it_is_the_same(draw, distribution) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(draw, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(latents(), (5, 5), 3), draw(latents(), (5, 5), 3))


@both
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_it_is_the_same(draw, distribution) -> None:
    here, there = draw(latents(), (32, 32), 3), draw(latents().cuda(), (32, 32), 3).cpu()
    torch.testing.assert_close(there, here, rtol=1e-6, atol=0)
