"""Statistics of real images: measured once, and kept."""

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from gandist.distributed import World
from gandist.errors import ConfigError
from gandist.evaluation.features import Extractor
from gandist.evaluation.frechet import Moments
from gandist.evaluation.statistics import Statistics, Wanted, collect

FORMAT = 1
ORIGINAL = "inception-2015-12-05"  # the extractor of files that do not name theirs
_COUNT, _MEAN, _COVARIANCE, _MADE = "count", "mu", "sigma", "made"


class Images(Protocol):
    """A set of images to be measured, as gandist.data.Dataset is one.

    identity: tells these images, as they are decoded, from any others; None where it is not known
    """

    identity: str | None
    num_classes: int

    def __len__(self) -> int: ...

    def evaluation_batches(self, batch_size: int, limit: int | None = None) -> Iterator[tuple]:
        """This rank's share of all, or of `limit` that are evenly spaced."""


Share = Callable[[Iterator, int, str], Iterable]  # batches, how many images on all ranks, what they are


class RealStatistics:
    """Those of each set, extractor and number of images are measured once a run; where the images are known, once and for all:
    they are kept in `folder`. Rank 0 alone has them."""

    def __init__(self, folder: Path, batch_size: int, share: Share, world: World):
        self.folder = folder
        self.batch_size = batch_size
        self.share = share
        self.world = world
        self._known: dict[tuple, dict[frozenset[str], Statistics]] = {}

    def measure(self, images: Images, what: str, extractor: Extractor, parts: frozenset[str], limit: int | None) -> Statistics:
        """parts: fields of Statistics; limit: so many of the images at most. Every rank calls it equally often; only rank 0's
        answer counts."""
        known = self._known.setdefault((id(images), extractor.name, limit), {})
        for measured, statistics in known.items():
            if parts <= measured:
                return statistics
        known[parts] = self._find(images, what, extractor, parts, limit)
        return known[parts]

    def _find(self, images: Images, what: str, extractor: Extractor, parts: frozenset[str], limit: int | None) -> Statistics:
        count = min(len(images), limit or len(images))
        path = None
        if images.identity:
            made = {"format": FORMAT, "images": images.identity, "count": count, "parts": sorted(parts), **extractor.identity}
            name = hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()[:32]
            path = self.folder / f"{name}.npz"
        if path and self.world.broadcast(path.exists()):
            return _load(path) if self.world.is_main else Statistics()
        shared = self.share(images.evaluation_batches(self.batch_size, limit), count, what)
        pairs = ((batch[0], batch[1]) for batch in shared)
        found = collect(pairs, {what: Wanted(extractor, parts, images.num_classes)}, self.world)[what]
        if path and self.world.is_main:
            _write(path, _arrays(found) | {_MADE: np.array(json.dumps(made))})
        return found if self.world.is_main else Statistics()


def save_reference(path: Path, moments: Moments, extractor: Extractor, about: dict[str, object]) -> None:
    """A file of moments that `evaluation.reference` can name: count, mu, sigma, and how it was made."""
    _write(path, _moments_arrays(moments) | {_MADE: np.array(json.dumps(extractor.identity | about))})


def load_reference(path: Path, extractor: Extractor) -> Moments | None:
    """None if it is another extractor's. A file of mu and sigma alone, as others make them, is Inception's, of an unknown
    number of images: 0.

    Raises ConfigError for what is no such file.
    """
    try:
        with np.load(path) as arrays:
            made = json.loads(str(arrays[_MADE])) if _MADE in arrays else {"extractor": ORIGINAL}
            if any(value != extractor.identity[key] for key, value in made.items() if key in extractor.identity):
                return None
            moments = _moments(arrays)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"evaluation.reference={path} cannot be read as moments of real images: {error}", on_every_rank=False
        ) from error
    if moments.scatter.shape != (extractor.num_features,) * 2:
        raise ConfigError(
            f"evaluation.reference={path} has {len(moments.mean)} features, {extractor.name} has {extractor.num_features}",
            on_every_rank=False,
        )
    return moments


def _moments(arrays: Mapping[str, np.ndarray]) -> Moments:
    count = int(arrays[_COUNT]) if _COUNT in arrays else 0
    mean, covariance = (torch.from_numpy(arrays[name]).double() for name in (_MEAN, _COVARIANCE))
    return Moments(count, mean, covariance * max(count - 1, 1))


def _moments_arrays(moments: Moments) -> dict[str, np.ndarray]:
    return {_COUNT: np.array(moments.count), _MEAN: moments.mean.numpy(), _COVARIANCE: moments.covariance.numpy()}


def _arrays(statistics: Statistics) -> dict[str, np.ndarray]:
    arrays = {}
    if statistics.moments is not None:
        arrays |= _moments_arrays(statistics.moments)
    if statistics.class_moments is not None:
        for name in ("count", "mean", "scatter"):
            arrays["class_" + name] = np.stack([np.asarray(getattr(each, name)) for each in statistics.class_moments])
    if statistics.features is not None:
        arrays["features"] = statistics.features.numpy()
    return arrays


def _load(path: Path) -> Statistics:
    with np.load(path) as arrays:
        class_moments = None
        if "class_count" in arrays:
            means, scatters = torch.from_numpy(arrays["class_mean"]), torch.from_numpy(arrays["class_scatter"])
            class_moments = list(map(Moments, arrays["class_count"].tolist(), means, scatters))
        return Statistics(
            moments=_moments(arrays) if _MEAN in arrays else None,
            class_moments=class_moments,
            features=torch.from_numpy(arrays["features"]) if "features" in arrays else None,
        )


def _write(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".partial-", suffix=".npz", delete=False) as file:
        partial = Path(file.name)
    try:
        np.savez(partial, **arrays)
        partial.chmod(0o644)
        partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)
