"""A trained GAN, to be used: `gandist.load(PATH)`."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from gandist import checkpoint
from gandist.config import RUN_CONFIG, DataConfig, ModelConfig
from gandist.config_file import load_config, load_run_config, nearest, without_permissions
from gandist.data import normalize, to_uint8
from gandist.data.decode import ImageError, Resize, fit
from gandist.data.encode import upright
from gandist.distributed import World
from gandist.errors import CheckpointError, ConfigError, DataError
from gandist.models import Discriminator, build_discriminator, build_generator, full_float32, truncates, truncating
from gandist.randomness import Purpose, draw_latents, random_stream
from gandist.resolution import size_of

DESCRIPTION = "gandist.json"  # of an exported folder, beside the networks' files
NETWORKS = ("generator", "discriminator")
FORMAT = 1  # of an exported folder
BATCH_SIZE = 256  # images in one pass
NAMED = 8  # tensors in a report
IMAGE_KEYS = {"resolution", "channels", "num_classes", "resize"}  # of DataConfig: what the networks are built for
ORIGIN = ("step", "kimg", "metrics", "config", "versions")  # of a checkpoint's meta.json

Picture = Path | str | bytes | Image.Image


@dataclass(frozen=True, eq=False)
class TrainedGAN:
    """Both networks of a run, in evaluation mode and float32, on one device.

    generator:     the averaged one: latents [B, Z], labels int64 [B] → images [B, C, H, W] in [-1, 1]
    discriminator: images [B, C, H, W] in [-1, 1], labels int64 [B] → DiscriminatorOutput
    class_names:   [K]
    origin:        where it is from: "checkpoint", "step", "kimg", "metrics", "config", "versions"
    """

    generator: nn.Module
    discriminator: Discriminator
    model: ModelConfig
    data: DataConfig
    class_names: list[str]
    origin: dict[str, Any]

    @property
    def device(self) -> torch.device:
        return next(self.generator.parameters()).device

    @property
    def resize(self) -> Resize:
        """How images of other sizes are fitted."""
        return "center-crop" if self.data.resize == "none" else self.data.resize

    def class_number(self, name: str | int) -> int:
        """Of a class by its name, or by its number, which may also be written as text. Raises ConfigError."""
        if name in self.class_names:
            return self.class_names.index(name)
        numbers = range(len(self.class_names))
        if name in numbers or name in map(str, numbers):
            return int(name)
        if not self.class_names:
            raise ConfigError(f"no class {name!r}: this model was trained without classes")
        raise ConfigError(f"no class {name!r}: there are {shortened(self.class_names)}{nearest(str(name), self.class_names)}")

    def class_numbers(self, names: Sequence[str | int]) -> list[int]:
        """Of these classes, or without names of all. Raises ConfigError."""
        return [self.class_number(name) for name in names] or list(range(self.data.num_classes))

    def class_folders(self, numbers: Sequence[int]) -> dict[int, str]:
        """The directories of images of these classes. Raises ConfigError where names are no names of directories."""
        folders = {number: self.class_names[number].replace("/", "_") for number in numbers}
        for number, folder in folders.items():
            if folder in ("", ".", "..") or [*folders.values()].count(folder) > 1:
                raise ConfigError(
                    f"the class {self.class_names[number]!r} (number {number}) cannot have a directory of its own"
                )
        return folders

    def check_generates(self) -> None:
        """Raises ConfigError where images are not made of latents."""
        if self.model.translates:
            raise ConfigError(f"model.family={self.model.family} makes images of images: it translates and does not generate")

    def check_translates(self) -> None:
        """Raises ConfigError where images are not made of images."""
        if not self.model.translates:
            raise ConfigError(f"model.family={self.model.family} makes images of latents: it generates and does not translate")

    def check_classifies(self) -> None:
        """Raises ConfigError where there are no classes."""
        if not self.class_names:
            raise ConfigError("this model was trained without classes: there is nothing to tell apart")

    @torch.no_grad()
    def generate(
        self,
        images: int | Sequence[int],
        classes: Sequence[str | int] = (),
        *,
        seed: int = 0,
        truncation: float | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """uint8 [N, C, H, W] and labels int64 [N], −1 without classes, on the CPU.

        images:     how many, or their numbers: image n is a function of the seed, n and the classes
        classes:    which take turns, by name or number; none: all of them
        truncation: as `evaluation.truncation`
        """
        numbers = np.arange(images) if isinstance(images, int | np.integer) else np.asarray(images)
        if not len(numbers):
            raise ConfigError("no images are asked for")
        labels = self._labels(numbers, classes)
        return self._synthesize(self._latents(numbers.tolist(), seed, truncation), labels, truncation), labels

    @torch.no_grad()
    def interpolate(
        self,
        paths: int,
        steps: int,
        classes: Sequence[str | int] = (),
        *,
        seed: int = 0,
        truncation: float | None = None,
    ) -> torch.Tensor:
        """uint8 [paths · steps, C, H, W]: each path leads in so many images from one latent to another of the same class, along
        a great circle, where normal latents are as probable as at its ends (White 2016, 1609.04468)."""
        ends = self._latents(range(2 * paths), seed, truncation).view(paths, 2, -1)
        latents = slerp(ends[:, :1], ends[:, 1:], torch.linspace(0, 1, steps)[None, :, None])
        labels = self._labels(np.arange(paths), classes).repeat_interleave(steps)
        return self._synthesize(latents.flatten(0, 1), labels, truncation)

    @torch.no_grad()
    def translate(self, images: torch.Tensor | Picture | Sequence[Picture], to: str | int) -> torch.Tensor:
        """The images as ones of this class, uint8 [B, C, H, W], on the CPU; images: as of `classify`.

        Raises ConfigError for a generator that makes images of latents, and as `classify` does.
        """
        self.check_translates()
        labels = torch.tensor([self.class_number(to)], device=self.device)
        return self._of_images(images, lambda some: to_uint8(self.generator(some, labels.expand(len(some)))))

    @torch.no_grad()
    def classify(self, images: torch.Tensor | Picture | Sequence[Picture]) -> torch.Tensor:
        """Probabilities of the classes, float32 [B, K], on the CPU; images: as `read` takes them, or uint8 [B, C, H, W].

        Raises ConfigError for a model without classes and images of another shape, DataError for files that cannot be read.
        """
        self.check_classifies()
        return self._of_images(images, lambda some: self.discriminator.classify(some).softmax(1))

    def read(self, image: Picture) -> torch.Tensor:
        """An image of any size, by its path, its file's content or as Pillow has it → uint8 [C, H, W], as the networks know
        them: turned upright, grey or RGB, cropped and scaled to their size as `data.resize` says, which in place of `none`
        crops to the center. Raises DataError."""
        content = image
        try:
            if isinstance(image, Path | str):
                content = Path(image).read_bytes()
            pixels = fit(upright(content, self.data.channels), self.data.resolution, self.resize)
        except (ImageError, OSError) as error:
            where = f"{image}: " if isinstance(image, Path | str) else ""
            raise DataError(where + (getattr(error, "strerror", None) or str(error))) from error
        return torch.from_numpy(np.array(pixels)).permute(2, 0, 1)

    def _of_images(
        self, images: torch.Tensor | Picture | Sequence[Picture], compute: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """compute: of images [B, C, H, W] in [-1, 1] → [B, …]; gives [N, …], on the CPU. Raises as `_uint8`."""
        with full_float32():
            parts = [
                compute(normalize(some.to(self.device), torch.float32)).cpu() for some in self._uint8(images).split(BATCH_SIZE)
            ]
        return torch.cat(parts)

    def _uint8(self, images: torch.Tensor | Picture | Sequence[Picture]) -> torch.Tensor:
        """uint8 [B, C, H, W]. Raises ConfigError for a tensor that is not so, of the model's own C, H and W."""
        if isinstance(images, Picture):
            images = [images]
        if not isinstance(images, torch.Tensor):
            images = torch.stack([self.read(image) for image in images]) if images else torch.empty(0)
        wanted = (self.data.channels, *size_of(self.data.resolution))
        if images.dtype != torch.uint8 or images.shape[1:] != wanted:
            raise ConfigError(
                f"the model takes uint8 images [B, {', '.join(map(str, wanted))}], not "
                f"{str(images.dtype).removeprefix('torch.')} {list(images.shape)}: `read` makes them of files of any size"
            )
        return images

    def _labels(self, numbers: np.ndarray, classes: Sequence[str | int]) -> torch.Tensor:
        """Of images of these numbers, int64 [N]: the classes in turn."""
        chosen = self.class_numbers(classes) or [-1]
        return torch.tensor(chosen)[numbers % len(chosen)]

    def _latents(self, numbers: Sequence[int], seed: int, truncation: float | None) -> torch.Tensor:
        """float32 [N, Z]. Raises ConfigError."""
        self.check_generates()
        if seed < 0:
            raise ConfigError(f"seed={seed}: a number of 0 or more is wanted")
        bound = None if truncates(self.generator) else truncation
        streams = (random_stream(seed, Purpose.GENERATION, number) for number in numbers)
        return torch.cat([draw_latents(stream, 1, self.model.latent_dim, bound) for stream in streams])

    def _synthesize(self, latents: torch.Tensor, labels: torch.Tensor, truncation: float | None) -> torch.Tensor:
        """uint8 [N, C, H, W], on the CPU"""
        batches = zip(latents.split(BATCH_SIZE), labels.split(BATCH_SIZE), strict=True)
        with full_float32(), truncating(self.generator, truncation):
            parts = [to_uint8(self.generator(*(each.to(self.device) for each in batch))).cpu() for batch in batches]
        return torch.cat(parts)


def load(
    path: Path | str, *, step: int | None = None, best: bool = False, device: torch.device | str | None = None
) -> TrainedGAN:
    """The networks of a run's newest checkpoint, of the one of `step`, or of the best by the run's checkpoint.best; of a
    checkpoint's folder; or of a folder that `python -m gandist.export` wrote. Loads without running code or unpickling.

    device: a GPU where there is one, else the CPU
    Raises CheckpointError where there is none of these, or it is damaged.
    """
    return _open(_find(Path(path).expanduser(), step, best), device or ("cuda" if torch.cuda.is_available() else "cpu"))


def load_on_all_ranks(path: Path, world: World, *, step: int | None = None, best: bool = False) -> TrainedGAN:
    """The same on every rank, also where a newer checkpoint is written meanwhile."""
    found = None
    with world.together():
        if world.is_main:
            found = _find(path, step, best)
    found = world.broadcast(found)
    with world.together():
        return _open(found, world.device)


def _find(path: Path, step: int | None, best: bool) -> Path:
    """An exported folder, or a verified checkpoint."""
    if (path / DESCRIPTION).exists():
        if best or step is not None:
            raise ConfigError(f"{path} was exported from one checkpoint: there is no other to choose")
        return path
    best_by = None
    if best:
        run_config = path / RUN_CONFIG
        best_by = (load_run_config(path) if run_config.exists() else load_config()).checkpoint
    return checkpoint.choose(path, step=step, best_by=best_by)


def _open(found: Path, device: torch.device | str) -> TrainedGAN:
    loaded = _load_exported(found) if (found / DESCRIPTION).exists() else _load_checkpoint(found)
    for network in (loaded.generator, loaded.discriminator):
        network.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
    return loaded


@torch.no_grad()
def take_over(what: str, source: Mapping[str, torch.Tensor], target: Mapping[str, torch.Tensor]) -> str:
    """Copies into a network's live tensors what fits of another's, by name and shape; returns what was taken and what was not.

    Raises ConfigError if nothing fits.
    """
    fitting = [key for key, tensor in target.items() if key in source and source[key].shape == tensor.shape]
    if not any(target[key].dim() > 1 for key in fitting):
        raise ConfigError(f"nothing of the {what} fits: its family or its size is another one")
    for key in fitting:
        target[key].copy_(source[key])
    left = [
        f"{key} {list(tensor.shape)}, there {list(source[key].shape) if key in source else 'absent'}"
        for key, tensor in target.items()
        if key not in fitting
    ]
    more = f" and {len(left) - NAMED} more" if len(left) > NAMED else ""
    kept = f"; left as drawn: {'; '.join(left[:NAMED])}{more}" if left else ""
    return f"the {what}: {len(fitting)} of {len(target)} tensors{kept}"


def slerp(start: torch.Tensor, end: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """Spherical interpolation of latents [..., Z]: start where share [..., 1] is 0, end where it is 1."""
    cosine = nn.functional.cosine_similarity(start, end, dim=-1)[..., None].clamp(-1 + 1e-6, 1 - 1e-6)
    angle = cosine.acos()
    return (((1 - share) * angle).sin() * start + (share * angle).sin() * end) / angle.sin()


def _load_checkpoint(path: Path) -> TrainedGAN:
    try:
        meta = checkpoint.read_meta(path)
        saved = meta["config"]
        model, data = _networks_and_data(saved)
        origin = {"checkpoint": str(path)} | {key: meta[key] for key in ORIGIN}
    except (ValueError, LookupError, TypeError) as error:
        raise CheckpointError(f"{path} is of another version of gandist: {' '.join(str(error).split())}") from error
    names = meta.get("class_names") or [str(number) for number in range(data.num_classes)]
    state = checkpoint.nest(checkpoint.read(path, checkpoint.AVERAGED, "discriminator"))
    weights = {"generator": state[checkpoint.AVERAGED], "discriminator": state["discriminator"]["network"]}
    return _build(path, model, data, names, origin, weights)


def _load_exported(path: Path) -> TrainedGAN:
    try:
        described = json.loads((path / DESCRIPTION).read_text())
        if described["format"] != FORMAT:
            raise CheckpointError(f"{path} was exported by another version of gandist (format {described['format']})")
        model, data = _networks_and_data(described)
        weights = {name: load_file(path / f"{name}.safetensors") for name in NETWORKS}
        origin = {key: described["origin"][key] for key in ("checkpoint", *ORIGIN)}
        return _build(path, model, data, described["class_names"], origin, weights)
    except KeyError as error:
        raise CheckpointError(f"{path} is not whole: {DESCRIPTION} has no {error}") from error
    except (OSError, ValueError, LookupError, TypeError, SafetensorError) as error:
        raise CheckpointError(f"{path} is not whole: {' '.join(str(error).split())}") from error


def _networks_and_data(saved: dict) -> tuple[ModelConfig, DataConfig]:
    return ModelConfig.model_validate(saved["model"]), DataConfig.model_validate(without_permissions(saved["data"]))


def _build(
    path: Path, model: ModelConfig, data: DataConfig, names: list[str], origin: dict, weights: dict[str, dict]
) -> TrainedGAN:
    with torch.device("cpu"):
        networks = {"generator": build_generator(model, data), "discriminator": build_discriminator(model, data)}
    try:
        for name, network in networks.items():
            network.load_state_dict(weights[name])
    except RuntimeError as error:
        raise CheckpointError(f"{path} does not fit its own configuration: {' '.join(str(error).split())}") from error
    return TrainedGAN(**networks, model=model, data=data, class_names=names, origin=origin)


def shortened(names: Sequence[str]) -> str:
    """A list of classes for an error."""
    return ", ".join(names) if len(names) <= 20 else f"{', '.join(names[:20])} and {len(names) - 20} more"
