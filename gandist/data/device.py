"""Batches on the device: they cross as uint8 and become images there."""

from collections.abc import Iterator
from typing import NamedTuple

import torch

from gandist.data.loader import Batch


class DeviceBatch(NamedTuple):
    """images: uint8 [B, C, H, W], channels last; labels: int64 [B], −1 for none; skipped: as in Batch"""

    images: torch.Tensor
    labels: torch.Tensor
    skipped: dict[int, str]


def on_device(batches: Iterator[Batch], device: torch.device) -> Iterator[DeviceBatch]:
    """The same batches on `device`. To a GPU the next one is copied on a stream of its own while this one is used."""
    if device.type != "cuda":
        yield from (_move(batch, device) for batch in batches)
        return
    copying = torch.cuda.Stream(device)
    ahead: DeviceBatch | None = None
    for batch in batches:
        with torch.cuda.stream(copying):
            copied = _move(batch, device)
        if ahead is not None:
            yield ahead
        torch.cuda.current_stream(device).wait_stream(copying)
        ahead = copied
        for tensor in ahead[:2]:
            tensor.record_stream(torch.cuda.current_stream(device))
    if ahead is not None:
        yield ahead


def upload(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A CPU tensor on the device, without waiting for what the device still has to do."""
    if device.type != "cuda":
        return tensor
    # A view with gaps, such as one rank's rows, would be gathered in pageable memory on its way.
    return tensor.contiguous().pin_memory().to(device, non_blocking=True)


def normalize(images: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """uint8 → [-1, 1]"""
    return images.to(dtype) / 127.5 - 1


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """[-1, 1] → uint8, rounded to the nearest level."""
    return (images * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)


def _move(batch: Batch, device: torch.device) -> DeviceBatch:
    images = batch.images.to(device, non_blocking=True).permute(0, 3, 1, 2)
    return DeviceBatch(images, batch.labels.to(device, non_blocking=True), batch.skipped)
