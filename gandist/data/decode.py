"""Encoded images → uint8 pixels: by the fastest decoder that takes the format, at one size.

JPEG goes to simplejpeg where it is installed, else like PNG and WebP to torchvision, and what these refuse to Pillow. The
decoders agree to the bit: tests hold them to it. The content decides which it is, never the file's name.
"""

import io
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torchvision.io import ImageReadMode, decode_image

from gandist.resolution import Resolution, as_yaml, resolution_of, size_of

try:
    import simplejpeg
except ImportError:  # an extra: faster, not necessary
    simplejpeg = None

Resize = Literal["none", "center-crop", "stretch"]
PILLOW_ERRORS = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)  # at an image that it cannot read
_FORMATS = ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000"]  # Pillow's names
_FORMATS += ["AVIF"] if find_spec("PIL.AvifImagePlugin") else []  # since Pillow 11.3
_FORMATS += ["TGA"]  # last, as it has no mark at its beginning
_JPEG = b"\xff\xd8\xff"
_CMYK = ("CMYK", "YCCK")  # which simplejpeg converts in its own way
_COLOUR_SPACE = {1: "GRAY", 3: "RGB"}


class ImageError(Exception):
    """An image that cannot be used. The text says why, not which one: the caller knows."""


@dataclass(frozen=True)
class ImageFormat:
    """What images are decoded to.

    resolution: pixels of both sides, or of (height, width)
    channels:   1: grey, 3: RGB
    resize:     what is done to images of another size. none: they are refused; center-crop: the largest part in the middle
                that has the proportions is scaled; stretch: all of it is scaled, whatever its proportions
    """

    resolution: Resolution
    channels: int
    resize: Resize = "none"

    @property
    def shape(self) -> tuple[int, int, int]:
        """(H, W, C)"""
        return *size_of(self.resolution), self.channels


def decode_into(pixels: np.ndarray, encoded: bytes, image_format: ImageFormat) -> None:
    """Decodes an image into `pixels`, contiguous uint8 [H, W, C] of the format's shape. Raises ImageError."""
    if simplejpeg and encoded.startswith(_JPEG):
        try:
            height, width, colour_space, _ = simplejpeg.decode_jpeg_header(encoded)
            if (height, width) == pixels.shape[:2] and colour_space not in _CMYK:
                simplejpeg.decode_jpeg(encoded, _COLOUR_SPACE[image_format.channels], buffer=pixels)
                return
        except ValueError:
            pass  # the decoders below say what is wrong
    pixels[:] = fit(decode(encoded, image_format.channels), image_format.resolution, image_format.resize)


def decode(encoded: bytes, channels: int) -> np.ndarray:
    """An image of any size, uint8 [H, W, C]. Raises ImageError."""
    if channels == 1 and encoded[8:12] == b"WEBP":  # of which torchvision makes no grey
        return _decode_with_pillow(encoded, channels)
    try:
        mode = ImageReadMode.GRAY if channels == 1 else ImageReadMode.RGB
        image = decode_image(torch.frombuffer(bytearray(encoded), dtype=torch.uint8), mode)
        if len(image) == channels and image.dtype == torch.uint8:  # else there are 16 bits
            return image.permute(1, 2, 0).numpy()
    except (RuntimeError, ValueError):
        pass
    return _decode_with_pillow(encoded, channels)


def fit(pixels: np.ndarray, resolution: Resolution, resize: Resize) -> np.ndarray:
    """uint8 [H, W, C] → uint8 of that resolution, by Lanczos' filter. Raises ImageError if `resize` is none."""
    height, width, channels = pixels.shape
    wanted_height, wanted_width = size_of(resolution)
    if (height, width) == (wanted_height, wanted_width):
        return pixels
    if resize == "none":
        raise ImageError(
            f"{width}×{height} pixels, but data.resolution is {as_yaml(resolution)}: set it to your images' size, "
            f"{as_yaml(resolution_of(height, width))}, say data.resize=center-crop, or pack them at one size"
        )
    if resize == "center-crop":
        rows = max(1, min(height, round(width * wanted_height / wanted_width)))
        columns = max(1, min(width, round(height * wanted_width / wanted_height)))
        top, left = (height - rows) // 2, (width - columns) // 2
        pixels = pixels[top : top + rows, left : left + columns]
    image = Image.fromarray(pixels[..., 0] if channels == 1 else pixels)
    resized = image.resize((wanted_width, wanted_height), Image.Resampling.LANCZOS)
    return np.asarray(resized).reshape(wanted_height, wanted_width, channels)


def open_image(encoded: bytes) -> Image.Image:
    """With Pillow, in a format that it decodes itself: for others it starts programs, for EPS one that runs what is in it."""
    return Image.open(io.BytesIO(encoded), formats=_FORMATS)


def _decode_with_pillow(encoded: bytes, channels: int) -> np.ndarray:
    try:
        with open_image(encoded) as image:
            if image.mode.startswith(("I", "F")):
                raise ImageError(f"{image.mode} pixels, which are not 8 bits a channel: convert them to 8 bits")
            return np.asarray(image.convert("L" if channels == 1 else "RGB")).reshape(image.height, image.width, channels)
    except PILLOW_ERRORS as error:
        raise unreadable(error) from error


def unreadable(error: Exception) -> ImageError:
    """What to raise where Pillow raised this."""
    reason = "its format is unknown, or it is damaged" if isinstance(error, UnidentifiedImageError) else error
    return ImageError(f"the image cannot be decoded ({reason}): replace it")
