"""Shards of synthetic photographs: clouds of every scale, shapes with soft light, grain. The same at every call."""

import io
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import webdataset as wds
from PIL import Image, ImageDraw
from tqdm import tqdm

CLASSES = 10


@dataclass(frozen=True)
class PhotoSet:
    """size: pixels of both sides; grain: standard deviation of the noise, in grey levels; quality: of the JPEG"""

    size: int
    samples: int
    shards: int
    quality: int
    grain: float

    def folder(self, parent: Path) -> Path:
        """The shards, made where they are not there yet."""
        folder = parent / f"photos-{self.size}px-q{self.quality}-{self.samples}-in-{self.shards}"
        if not folder.exists():
            parent.mkdir(parents=True, exist_ok=True)
            partial = Path(tempfile.mkdtemp(prefix=".photos-", dir=parent))
            try:
                self._write(partial)
                partial.rename(folder)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
        return folder

    def _write(self, folder: Path) -> None:
        with tqdm(total=self.samples, desc=f"making {self.size} px photos", unit="img", disable=None) as progress:
            size = self.samples // self.shards
            for shard in range(self.shards):
                with wds.TarWriter(str(folder / f"{shard:04d}.tar"), mtime=0) as writer:
                    for sample in range(shard * size, (shard + 1) * size):
                        writer.write({"__key__": f"{sample:08d}", "jpg": self.jpeg(sample), "cls": str(sample % CLASSES)})
                        progress.update()

    def jpeg(self, number: int) -> bytes:
        random = np.random.default_rng([self.size, number])
        image = _clouds(random, self.size)
        _draw_shapes(random, image)
        pixels = np.asarray(image) + random.normal(0, self.grain, (self.size, self.size, 1))
        buffer = io.BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "jpeg", quality=self.quality)
        return buffer.getvalue()


def _clouds(random: np.random.Generator, size: int) -> Image.Image:
    """Noise of amplitude proportional to its wavelength, as in natural images."""
    total = np.full((size, size, 3), random.uniform(60, 190, 3))
    cells = 2
    while cells < size:
        noise = random.integers(0, 256, (cells, cells, 3), np.uint8)
        smooth = Image.fromarray(noise).resize((size, size), Image.Resampling.BICUBIC)
        total += (np.asarray(smooth) - 128.0) * (1.2 / cells)
        cells *= 2
    return Image.fromarray(total.clip(0, 255).astype(np.uint8))


def _draw_shapes(random: np.random.Generator, image: Image.Image) -> None:
    draw = ImageDraw.Draw(image)
    for _ in range(5):
        left, top = random.uniform(-0.2, 0.9, 2) * image.width
        right, bottom = (left, top) + random.uniform(0.1, 0.5, 2) * image.width
        colour = tuple(random.integers(0, 256, 3).tolist())
        shape = draw.ellipse if random.random() < 0.6 else draw.rectangle
        shape((left, top, right, bottom), fill=colour)
