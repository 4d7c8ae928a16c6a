"""The generated images that are measured: image n is a function of the seed and n, on any number of ranks. Translations are of
the images at hand, in an order that the seed chooses."""

import copy
from collections.abc import Iterator

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from gandist.config import Config
from gandist.data import Dataset, normalize, to_uint8
from gandist.distributed import World
from gandist.models import truncates, truncating
from gandist.randomness import Purpose, draw_latents, random_stream


class FakeImages:
    """What `evaluation` says of them.

    class_counts: of the training set, int64 [K]
    sources:      images of which fakes are translations; None: they are made of latents
    """

    def __init__(self, config: Config, class_counts: np.ndarray, world: World, *, seed: int, sources: Dataset | None = None):
        self.settings = config.evaluation
        self.latent_dim = config.model.latent_dim
        self.world = world
        self.seed = seed
        self.sources = sources
        self.class_counts = np.ones_like(class_counts) if self.settings.labels == "balanced" else class_counts

    def prepare(self, generator: nn.Module) -> nn.Module:
        """The generator as it is measured: its own statistics of batch norm, or, with `evaluation.standing_stats`, a copy with
        the mean of those of so many batches (Brock et al. 2019, 1809.11096, appendix D). Every rank calls it."""
        norms = [module for module in generator.modules() if isinstance(module, _BatchNorm)]
        if not (self.settings.standing_stats and norms):
            return generator
        generator = copy.deepcopy(generator).eval()
        norms = [module for module in generator.modules() if isinstance(module, _BatchNorm)]
        for norm in norms:
            norm.train()
        size = self.settings.batch_size
        for batch in range(self.settings.standing_stats):
            for norm in norms:
                norm.momentum = 1 / (batch + 1)
            stream = random_stream(self.seed, Purpose.STANDING_STATISTICS, batch)
            latents = self._latents(generator, stream, size)
            labels = torch.from_numpy(stream.permutation(proportional_labels(self.class_counts, size)))
            self._generate(generator, *(each[self.world.rank :: self.world.size] for each in (latents, labels)))
        return generator.eval()

    def batches(self, generator: nn.Module, total: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """This rank's share of `total` images: uint8 [B, C, H, W] and labels [B], in batches that are dealt to the ranks in
        turn. Batch n is a function of the seed and n."""
        if self.sources:
            for images, _, targets in self.translated(generator, total):
                yield to_uint8(generator(images, targets)), targets
            return
        for number, labels in self._labels(total):
            latents = self._latents(generator, random_stream(self.seed, Purpose.EVALUATION, number), len(labels))
            yield self._generate(generator, latents, labels)

    def translated(self, generator: nn.Module, total: int) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """What the same batches are made of: images [B, C, H, W] in [-1, 1], their labels [B], and the targets [B]."""
        dtype = next(generator.parameters()).dtype
        sources = self.sources.shuffled_batches(self.settings.batch_size, total, seed=self.seed)
        for (_, targets), (images, labels, _) in zip(self._labels(total), sources, strict=True):
            yield normalize(images, dtype), labels, targets.to(labels.device)

    def _labels(self, total: int) -> Iterator[tuple[int, torch.Tensor]]:
        """The numbers of this rank's batches, and their labels."""
        size = self.settings.batch_size
        batches = torch.from_numpy(proportional_labels(self.class_counts, total)).split(size)
        yield from list(enumerate(batches))[self.world.rank :: self.world.size]

    def _latents(self, generator: nn.Module, stream: np.random.Generator, count: int) -> torch.Tensor:
        return draw_latents(stream, count, self.latent_dim, None if truncates(generator) else self.settings.truncation)

    def _generate(self, generator: nn.Module, latents: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        device, dtype = self.world.device, next(generator.parameters()).dtype
        labels = labels.to(device)
        with truncating(generator, self.settings.truncation):
            return to_uint8(generator(latents.to(device, dtype), labels)), labels


def proportional_labels(class_counts: np.ndarray, size: int) -> np.ndarray:
    """`size` labels, int64, in proportion to these counts and sorted; −1 where there are no classes."""
    if not len(class_counts):
        return np.full(size, -1)
    places = (2 * np.arange(size) + 1) * class_counts.sum() // (2 * size)
    return np.searchsorted(np.cumsum(class_counts), places, "right")
