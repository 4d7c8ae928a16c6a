"""Everything random of a step, from (seed, step): the same at any world size, with nothing to save."""

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch


class Purpose(IntEnum):
    """Each draws from a stream of its own. The numbers are part of what a seed means: never renumber them."""

    DISCRIMINATOR = 0
    GENERATOR = 1
    EVALUATION = 2
    SAMPLES = 3
    DISCRIMINATOR_NOISE = 4
    STANDING_STATISTICS = 5
    GENERATOR_NOISE = 6
    FLIPS = 7
    GENERATION = 8


def random_stream(seed: int, purpose: Purpose, *key: int) -> np.random.Generator:
    """A counter-based generator (Philox) for this purpose and key."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(seed, spawn_key=(purpose, *key))))


def draw_latents(stream: np.random.Generator, count: int, latent_dim: int, truncation: float | None = None) -> torch.Tensor:
    """Standard normal float32 [count, latent_dim]; with `truncation`, none farther from 0 than that (the truncation trick of
    Brock et al. 2019, 1809.11096, section 3.1)."""
    if truncation is None:
        return torch.from_numpy(stream.standard_normal((count, latent_dim), np.float32))
    below = torch.special.ndtr(torch.tensor(-truncation, dtype=torch.float64))
    uniform = torch.from_numpy(stream.random((count, latent_dim)))
    return torch.special.ndtri(torch.lerp(below, 1 - below, uniform)).float()


@dataclass(frozen=True)
class StepRandomness:
    """What this rank's places of the global batch draw.

    batch_size:   global
    class_counts: of the training set, int64 [K]; labels are drawn as frequent as they are there. K = 0: they are all −1
    """

    seed: int
    batch_size: int
    latent_dim: int
    class_counts: np.ndarray
    rank: int
    world_size: int

    def draw(self, purpose: Purpose, step: int, update: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents float32 [B / world_size, Z] and labels int64 [B / world_size] of one update of a step."""
        stream = random_stream(self.seed, purpose, step, update)
        latents = draw_latents(stream, self.batch_size, self.latent_dim)
        if len(self.class_counts):
            samples = stream.integers(self.class_counts.sum(), size=self.batch_size)  # of the training set, sorted by class
            labels = np.searchsorted(np.cumsum(self.class_counts), samples, "right")
        else:
            labels = np.full(self.batch_size, -1)
        return latents[self._mine], torch.from_numpy(labels[self._mine])

    def draw_uniform(self, purpose: Purpose, step: int, update: int, width: int) -> torch.Tensor:
        """float32 in [0, 1), [B / world_size, width]"""
        stream = random_stream(self.seed, purpose, step, update)
        return torch.from_numpy(stream.random((self.batch_size, width), np.float32)[self._mine])

    @property
    def _mine(self) -> slice:
        return slice(self.rank, None, self.world_size)


class Columns:
    """What the uniform numbers of an image are for: so many for each name."""

    def __init__(self, **widths: int):
        self.widths = widths
        self.width = sum(widths.values())

    def split(self, numbers: torch.Tensor) -> dict[str, torch.Tensor]:
        """[B, width] → name: [B, its width]"""
        return dict(zip(self.widths, numbers.split(list(self.widths.values()), 1), strict=True))


def normal_from_uniform(uniforms: torch.Tensor) -> torch.Tensor:
    """Standard normal numbers of uniform float32 ones in [0, 1), which are multiples of 2⁻²⁴."""
    return 2**0.5 * torch.erfinv(2 * uniforms + (2**-24 - 1))
