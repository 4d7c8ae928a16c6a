"""Images → what a shard holds of them: the file as it is, or its pixels encoded anew."""

import io
import re
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image, ImageOps
from PIL.ExifTags import Base as ExifTag

from gandist.data.decode import PILLOW_ERRORS, Resize, decode, fit, open_image, unreadable
from gandist.resolution import Resolution

_SIGNATURES = {"png": rb"\x89PNG\r\n\x1a\n", "jpg": rb"\xff\xd8\xff", "webp": rb"RIFF.{4}WEBP"}
_MAY_BE_ROTATED = re.compile(rb"exif|tiff:Orientation", re.IGNORECASE)  # asking Pillow decodes the whole of a PNG


@dataclass(frozen=True)
class Encoding:
    """How images are stored. With neither `resolution` nor `channels` a file is copied if training can read its format.

    resolution: pixels of both sides, or of (height, width); None: as found
    channels:   1: grey, 3: RGB; None: as found
    resize:     how images of another size get there, see `ImageFormat`
    format:     of what is encoded anew: png is lossless and uncompressed, jpg has quality 95 and full chroma
    """

    resolution: Resolution | None = None
    channels: int | None = None
    resize: Resize = "center-crop"
    format: Literal["png", "jpg"] = "png"

    @property
    def copies(self) -> bool:
        return self.resolution is None and self.channels is None


class EncodedImage(NamedTuple):
    """size: (width, height) in pixels; channels: 1: grey, 3: colour"""

    content: bytes
    extension: str
    size: tuple[int, int]
    channels: int


def encode(image: bytes | Image.Image, encoding: Encoding) -> EncodedImage:
    """A file's content, or an image without a file, as a shard is to hold it. Raises ImageError if it cannot be decoded."""
    mode, orientation = _inspect(image)
    channels = encoding.channels or (1 if mode.startswith(("1", "L", "I", "F")) and mode != "LAB" else 3)
    pixels = _pixels(image, channels)
    if isinstance(image, bytes) and encoding.copies and (extension := _extension(image)):
        return EncodedImage(image, extension, (pixels.shape[1], pixels.shape[0]), channels)
    pixels = _turn(pixels, orientation)
    if encoding.resolution:
        pixels = fit(pixels, encoding.resolution, encoding.resize)
    encoder = encode_png if encoding.format == "png" else _encode_jpeg
    height, width = pixels.shape[:2]
    return EncodedImage(encoder(pixels[..., 0] if channels == 1 else pixels), encoding.format, (width, height), channels)


def upright(image: bytes | Image.Image, channels: int) -> np.ndarray:
    """The pixels of a file's content, or of an image without a file, uint8 [H, W, C], turned as its EXIF data say. Raises
    ImageError."""
    if isinstance(image, bytes):
        return _turn(_pixels(image, channels), _inspect(image)[1])
    try:
        return _pixels(ImageOps.exif_transpose(image), channels)
    except PILLOW_ERRORS as error:
        raise unreadable(error) from error


def encode_png(image: np.ndarray) -> bytes:
    """PNG of uint8 [H, W] or [H, W, 3], uncompressed: the same bytes everywhere, and the fastest to decode."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "png", compress_level=0)
    return buffer.getvalue()


def _encode_jpeg(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "jpeg", quality=95, subsampling="4:4:4")
    return buffer.getvalue()


def _extension(content: bytes) -> str | None:
    """Of the formats that shards may hold, by the content."""
    return next((name for name, start in _SIGNATURES.items() if re.match(start, content, re.DOTALL)), None)


def _pixels(image: bytes | Image.Image, channels: int) -> np.ndarray:
    """uint8 [H, W, C]"""
    if isinstance(image, bytes):
        return decode(image, channels)
    return np.asarray(image.convert("L" if channels == 1 else "RGB")).reshape(image.height, image.width, channels)


def _inspect(content: bytes | Image.Image) -> tuple[str, int]:
    """Pillow's mode, EXIF orientation (1: upright)."""
    if isinstance(content, Image.Image):
        return content.mode, 1
    try:
        with open_image(content) as image:
            orientation = image.getexif().get(ExifTag.Orientation, 1) if _MAY_BE_ROTATED.search(content) else 1
            return image.mode, orientation
    except PILLOW_ERRORS as error:
        raise unreadable(error) from error


def _turn(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """uint8 [H, W, C] as its EXIF orientation says it is to be looked at."""
    if orientation == 1:
        return pixels
    image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    image.getexif()[ExifTag.Orientation] = orientation
    turned = np.asarray(ImageOps.exif_transpose(image))
    return turned.reshape(*turned.shape[:2], pixels.shape[2])
