"""The pictures of a run: real images, and generated ones of the same classes and always of the same latents, or translations
always of the same images."""

import torch
from PIL import Image
from torch import nn

from gandist.config import Config
from gandist.data import Dataset, normalize, to_uint8
from gandist.distributed import World
from gandist.models import evaluating
from gandist.randomness import Purpose, draw_latents, random_stream
from gandist.tracking.tracker import Samples, sample_grid

PER_CLASS = 10
MAX_CLASSES = 32
LOOKED_AT = 2000  # real images, among which PER_CLASS of each class are looked for


class Preview:
    """One row a class, of the first MAX_CLASSES; without classes, as many rows as columns. Where images are translated, one row
    an image: itself, and then as each class. On rank 0 alone.

    sources: where the images are that are translated
    """

    def __init__(self, config: Config, train_set: Dataset, sources: Dataset, world: World, dtype: torch.dtype):
        rows = range(min(config.data.num_classes, MAX_CLASSES)) or [-1] * PER_CLASS
        self.labels = torch.tensor(rows).repeat_interleave(PER_CLASS).to(world.device)
        self.sources = self._find_sources(sources) if config.model.translates else None
        if self.sources is None:
            stream = random_stream(config.seed, Purpose.SAMPLES)
            latents = draw_latents(stream, len(self.labels), config.model.latent_dim)
        else:
            latents = normalize(self.sources, dtype).repeat(len(rows), 1, 1, 1)
        self.latents = latents.to(world.device, dtype)
        self.real = self._find_real(train_set)
        self.real_grid = sample_grid(self.real, PER_CLASS)

    @torch.no_grad()
    def draw(self, generator: nn.Module, discriminator: nn.Module) -> Samples:
        """generator: the averaged one. Both networks keep their modes."""
        images = to_uint8(generator(self.latents, self.labels))
        kinds = {"real": self.real.to(images.device), "fake": images}
        with evaluating(discriminator):
            logits = {
                name: discriminator(normalize(each, self.latents.dtype), self.labels).logits.tolist()
                for name, each in kinds.items()
            }
        return Samples(self._grid(images.cpu()), self._diversity(images), logits)

    def _grid(self, images: torch.Tensor) -> Image.Image:
        if self.sources is None:
            return sample_grid(images, PER_CLASS)
        columns = torch.stack([self.sources, *images.split(PER_CLASS)])
        return sample_grid(columns.transpose(0, 1).flatten(0, 1), len(columns))

    def _find_sources(self, images: Dataset) -> torch.Tensor:
        """uint8 [PER_CLASS, C, H, W], of as many classes as can be."""
        return self._find_real(images).unflatten(0, (-1, PER_CLASS)).transpose(0, 1).flatten(0, 1)[:PER_CLASS]

    def _find_real(self, dataset: Dataset) -> torch.Tensor:
        """uint8 [N, C, H, W]; black where there are not as many of a class."""
        images, labels = dataset.some(LOOKED_AT)
        found = torch.zeros((len(self.labels), *images.shape[1:]), dtype=torch.uint8)
        for row, label in enumerate(self.labels[::PER_CLASS].tolist()):
            chosen = (labels == label).nonzero()[:PER_CLASS, 0] if label >= 0 else torch.arange(PER_CLASS) + row * PER_CLASS
            chosen = chosen[chosen < len(images)]
            found[row * PER_CLASS : row * PER_CLASS + len(chosen)] = images[chosen]
        return found

    def _diversity(self, fake: torch.Tensor) -> float | None:
        """The mean distance of two generated images of a class, as a share of that of two real ones."""
        distances = [
            torch.stack([torch.pdist(row.flatten(1).float()).mean() for row in images.cpu().split(PER_CLASS)]).mean()
            for images in (fake, self.real)
        ]
        return float(distances[0] / distances[1]) if distances[1] else None
