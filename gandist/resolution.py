"""Sizes of images: one number of pixels of squares, height and width of others; and how feature maps grow to them."""

from collections.abc import Container, Sequence
from typing import NamedTuple

Resolution = int | Sequence[int]  # of a square, or (height, width)
SMALLEST = 4  # pixels of a side of a generator's first feature map


def size_of(resolution: Resolution) -> tuple[int, int]:
    """(height, width)"""
    height, width = (resolution, resolution) if isinstance(resolution, int) else resolution
    return height, width


def resolution_of(height: int, width: int) -> int | tuple[int, int]:
    return height if height == width else (height, width)


def as_option(resolution: Resolution) -> str:
    """As commands take it: 16, or 16x32."""
    return str(resolution) if isinstance(resolution, int) else "x".join(map(str, resolution))


def as_yaml(resolution: Resolution) -> str:
    """As the configuration has it: 16, or [16,32]."""
    return str(resolution) if isinstance(resolution, int) else f"[{','.join(map(str, resolution))}]"


class Pyramid(NamedTuple):
    """Feature maps, each twice as high and as wide as the one before, up to the images.

    side:      pixels of that side of the images which is 4 pixels of the first feature map
    doublings: from there to the images
    first:     (height, width) of the first feature map
    """

    side: int
    doublings: int
    first: tuple[int, int]


def find_pyramid(resolution: Resolution, sides: Container[int] | None = None) -> Pyramid | None:
    """None where there is none: one side must be 8, 16, 32, …, or among `sides`, and the other a multiple of a quarter of it.
    Where both sides could be that one, it is the shorter."""
    height, width = size_of(resolution)
    for side in sorted((height, width)):
        doublings = (side // SMALLEST).bit_length() - 1
        if doublings < 1 or side != SMALLEST << doublings or (sides is not None and side not in sides):
            continue
        first, rest = zip(divmod(height, 1 << doublings), divmod(width, 1 << doublings), strict=True)
        if not any(rest):
            return Pyramid(side, doublings, first)
    return None
