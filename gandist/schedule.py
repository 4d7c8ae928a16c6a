"""Numbers of the configuration that change while a run goes on."""

from collections.abc import Iterator

import torch

from gandist.config import Cosine, Section


def value_at(value: float | Cosine, images: torch.Tensor) -> float | torch.Tensor:
    """The value after so many images [], on their device and of their dtype; a number stays as it is.

    A cosine's is start + (end − start)(1 − cos(πt))/2, where t goes from 0 to 1 within its kimg (as R3GAN's, Huang et al.
    2024, 2501.05441).
    """
    if not isinstance(value, Cosine):
        return value
    t = (images / (1000 * value.kimg)).clamp(max=1)
    return value.start + (value.end - value.start) * (1 - torch.cos(torch.pi * t)) / 2


def number_at(value: float | Cosine, images: int) -> float:
    """The same, on the host."""
    return float(value_at(value, torch.tensor(images, dtype=torch.float64)))


def scheduled(section: Section, prefix: str = "") -> Iterator[tuple[str, Cosine]]:
    """What in the configuration changes: its dotted key and its cosine."""
    for name in type(section).model_fields:
        value = getattr(section, name)
        for part in value if isinstance(value, tuple) else [value]:
            if isinstance(part, Cosine):
                yield prefix + name, part
        if isinstance(value, Section) and not isinstance(value, Cosine):
            yield from scheduled(value, f"{prefix}{name}.")
