"""Differentiable augmentation of what the discriminator sees, real and generated images alike.

Nothing is drawn here: what becomes of an image follows from its own row of uniform numbers, whatever the others of its batch
are. For given numbers every transform is affine in the images, and differentiable twice, so that a gradient penalty may be
taken with respect to the images before it.
"""

import math
from collections.abc import Callable, Mapping

import torch
from torch import nn

from gandist.config import AugmentationConfig
from gandist.models.layers import sum_over_ranks
from gandist.randomness import normal_from_uniform
from gandist.schedule import value_at


def flip(images: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Mirrors those whose number is below ½, left to right: images [B, C, H, W], uniforms [B] in [0, 1) → [B, C, H, W]"""
    return torch.where(_per_image(uniforms < 0.5), images.flip(3), images)


SHIFT_AND_FLIP = 3  # uniform numbers that one image wants


def shift_and_flip(images: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """The transform of consistency regularization (Zhang et al. 2019, 1910.12027): a horizontal flip of half of the images, and
    a shift by whole pixels, up to an eighth of the size. What comes in at the edge is a reflection.

    images [B, C, H, W], uniforms [B, 3] in [0, 1) → [B, C, H, W]
    """
    mirrored, down, right = uniforms.unbind(1)
    return _shift(flip(images, mirrored), down, right)


class Translation(nn.Module):
    """A shift by whole pixels, up to an eighth of the size either way, and nothing else: for images that are not to be mirrored
    or turned, as digits and letters. What comes in at the edge is a reflection."""

    columns = 3  # uniform numbers that one image wants

    def forward(self, images: torch.Tensor, uniforms: torch.Tensor, probability: torch.Tensor) -> torch.Tensor:
        """images [B, C, H, W], uniforms [B, 3] in [0, 1), probability [] → [B, C, H, W]"""
        chosen, down, right = uniforms.unbind(1)
        return torch.where(_per_image(chosen < probability), _shift(images, down, right), images)


class DiffAugment(nn.Module):
    """Colour (brightness, saturation, contrast), translation and cutout (Zhao et al. 2020, 2006.10738).

    Each of the five befalls an image with the probability that is given, independently; the paper's is 1.
    """

    columns = 5 + 3 + 2 + 2  # uniform numbers that one image wants: whether each is applied, then their parameters

    def forward(self, images: torch.Tensor, uniforms: torch.Tensor, probability: torch.Tensor) -> torch.Tensor:
        """images [B, C, H, W] in [-1, 1], uniforms [B, columns] in [0, 1), probability [] → [B, C, H, W]"""
        x = images.to(torch.promote_types(images.dtype, torch.float32))
        uniforms = uniforms.to(x.dtype)
        height, width = x.shape[2:]
        brightened, saturated, contrasted, moved, cut = map(_per_image, (uniforms[:, :5] < probability).unbind(1))
        light, colour, contrast = map(_per_image, uniforms[:, 5:8].unbind(1))
        down, right, row, column = uniforms[:, 8:].unbind(1)

        x = torch.where(brightened, x + (light - 0.5), x)
        x = torch.where(saturated, torch.lerp(x.mean(1, keepdim=True), x, 2 * colour), x)
        x = torch.where(contrasted, torch.lerp(x.mean((1, 2, 3), keepdim=True), x, 0.5 + contrast), x)

        rows, columns = _shifted(down, height)[:, :, None], _shifted(right, width)[:, None]
        inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
        shifted = _take(x, rows.clamp(0, height - 1), columns.clamp(0, width - 1)) * inside[:, None]
        x = torch.where(moved, shifted, x)

        tall, wide = int(height / 2 + 0.5), int(width / 2 + 0.5)
        top = (row * (height + 1 - tall % 2)).floor() - tall // 2
        left = (column * (width + 1 - wide % 2)).floor() - wide // 2
        return torch.where(cut & _inside(x, top, left, tall, wide), 0, x).to(images.dtype)


# The low-pass filter of the wavelet sym6 (Daubechies 1992, Ten Lectures on Wavelets, chapter 8).
SYM6 = (
    0.015404109327027373,
    0.0034907120842174702,
    -0.11799011114819057,
    -0.048311742585633,
    0.4910559419267466,
    0.787641141030194,
    0.3379294217276218,
    -0.07263752278646252,
    -0.021060292512300564,
    0.04472490177066578,
    0.0017677118642428036,
    -0.007800708325034148,
)
CENTRE = sum(place * tap for place, tap in enumerate(SYM6)) / sum(SYM6)  # of mass, 5.098
FIRST = 5  # the tap whose sample, of an image at twice the resolution, comes first

COLUMNS = {  # of each transform: a number that says whether it is applied, and those of its parameters
    "xflip": 2,
    "rotate90": 2,
    "xint": 3,
    "scale": 2,
    "rotate": 4,
    "aniso": 2,
    "xfrac": 3,
    "brightness": 2,
    "contrast": 2,
    "lumaflip": 2,
    "hue": 2,
    "saturation": 2,
    "cutout": 3,
}
OF_COLOURS = ("lumaflip", "hue", "saturation")  # which grey images go without

Draws = dict[str, tuple[torch.Tensor, ...]]  # of a transform: 1 where it is applied and 0 where not [B], and parameters [B]


class AdaptiveAugment(nn.Module):
    """The transforms of StyleGAN2-ADA (Karras et al. 2020, 2006.06676, appendix B), by the names that its code gives them.

    strengths: transform → what the probability is multiplied by for it; 0 for those left out

    Images that only flips, quarter turns and shifts by whole pixels befall keep their pixels' values exactly. Others are
    resampled, once for all transforms: twice the resolution by the synthesis filter of an orthogonal wavelet, bilinear
    sampling, half the resolution by the analysis filter. In the paper an image is padded by reflection first; here reflection
    is of the samples at twice the resolution, which differs a little beyond the edge, as the filter is not quite symmetric.
    And a pixel's place among these samples is the filter's centre of mass: the middle of its taps would shift turned images
    by up to 0.4 pixels.
    """

    columns = sum(COLUMNS.values())  # uniform numbers that one image wants

    def __init__(self, channels: int, strengths: Mapping[str, float]):
        super().__init__()
        self.strengths = {name: strengths.get(name, 0.0) for name in COLUMNS}
        if channels == 1:
            self.strengths |= dict.fromkeys(OF_COLOURS, 0.0)
        self.register_buffer("taps", torch.tensor(SYM6, dtype=torch.float64), persistent=False)

    def forward(self, images: torch.Tensor, uniforms: torch.Tensor, probability: torch.Tensor) -> torch.Tensor:
        """images [B, C, H, W] in [-1, 1], uniforms [B, columns] in [0, 1), probability [] → [B, C, H, W]"""
        with torch.autocast(images.device.type, enabled=False):
            x = images.to(torch.promote_types(images.dtype, torch.float32))
            draws = self._draw(uniforms.to(x.dtype), probability.to(x.dtype))
            x = _recolour(self._move(x, draws), draws)
            cut, row, column = draws["cutout"]
            height, width = x.shape[2:]
            hole = _inside(x, (row - 0.25) * height, (column - 0.25) * width, height / 2, width / 2)
            return torch.where(hole & _per_image(cut > 0), 0, x).to(images.dtype)

    def _draw(self, uniforms: torch.Tensor, probability: torch.Tensor) -> Draws:
        draws = {}
        for (name, strength), numbers in zip(self.strengths.items(), uniforms.split(list(COLUMNS.values()), 1), strict=True):
            gate, *parameters = numbers.unbind(1)
            threshold = probability * strength
            if name == "rotate":
                threshold = 1 - (1 - threshold).sqrt()  # of either turn, so that there is one at least with that probability
                angle, other_gate, other_angle = parameters
                parameters = angle, (other_gate < threshold).to(uniforms.dtype), other_angle
            draws[name] = (gate < threshold).to(uniforms.dtype), *parameters
        return draws

    def _move(self, images: torch.Tensor, draws: Draws) -> torch.Tensor:
        """Pixel blitting and general geometric transforms. Places are (x, y) in pixels from the middle, with y downwards; all
        matrices, [B, 2, 2], are those of the inverses: they say where what is at a place comes from."""
        height, width = images.shape[2:]
        mirrored, side = draws["xflip"]
        turned, quarters = draws["rotate90"]
        shifted, right, down = draws["xint"]
        mirror = 1 - 2 * mirrored * (side < 0.5)
        quarters = (4 * quarters).floor() * turned
        blit = _product(_diagonal(mirror, torch.ones_like(mirror)), _turn((2 - quarters).abs() - 1, (quarters - 1).abs() - 1))
        shift = [(0.125 * (2 * u - 1) * size).round() * shifted for u, size in ((right, width), (down, height))]
        blit_offset = -_product(blit, torch.stack(shift, 1)[:, :, None])

        scaled, scale = draws["scale"]
        turned, angle, turned_again, other_angle = draws["rotate"]
        stretched, stretch = draws["aniso"]
        shifted, right, down = draws["xfrac"]
        scale = torch.exp2(-0.2 * normal_from_uniform(scale) * scaled)
        stretch = torch.exp2(-0.2 * normal_from_uniform(stretch) * stretched)
        angles = math.pi * (2 * angle - 1) * turned, math.pi * (2 * other_angle - 1) * turned_again
        first, second = (_turn(angle.cos(), -angle.sin()) for angle in angles)
        warp = _product(_product(blit, _diagonal(scale, scale)), first)
        warp = _product(_product(warp, _diagonal(stretch, 1 / stretch)), second)
        shift = [0.125 * normal_from_uniform(u) * size * shifted for u, size in ((right, width), (down, height))]
        warp_offset = blit_offset - _product(warp, torch.stack(shift, 1)[:, :, None])

        blitted = _blit(images, blit, blit_offset)
        warped = _warp(images, warp, warp_offset, self.taps.to(images.dtype))
        return torch.where(_per_image(scaled + turned + turned_again + stretched + shifted > 0), warped, blitted)


def _blit(images: torch.Tensor, matrix: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """Every pixel is one of the image, unchanged."""
    grid = (torch.arange(size, device=images.device, dtype=images.dtype) for size in images.shape[2:])
    rows, columns = ((place + 0.5).floor() for place in _sources(images, matrix, offset, *grid))
    return _take(images, rows, columns)


def _warp(images: torch.Tensor, matrix: torch.Tensor, offset: torch.Tensor, taps: torch.Tensor) -> torch.Tensor:
    """Bilinear sampling at twice the resolution."""
    sizes = images.shape[2:]
    down, across = (_synthesis(size, taps) for size in sizes)
    fine = down @ images @ across.T
    grid = ((torch.arange(2 * size + len(SYM6) - 2, device=taps.device, dtype=taps.dtype) - CENTRE) / 2 for size in sizes)
    rows, columns = (2 * place + (CENTRE - FIRST) for place in _sources(images, matrix, offset, *grid))
    top, left = rows.floor(), columns.floor()
    below, right = (rows - top)[:, None], (columns - left)[:, None]
    upper = torch.lerp(_take(fine, top, left), _take(fine, top, left + 1), right)
    lower = torch.lerp(_take(fine, top + 1, left), _take(fine, top + 1, left + 1), right)
    down, across = (_analysis(size, taps) for size in sizes)
    return down @ torch.lerp(upper, lower, below) @ across.T


def _synthesis(size: int, taps: torch.Tensor) -> torch.Tensor:
    """[2 · size, size]: the samples at twice the resolution of pixels that go on as reflections beyond the edge"""
    samples = torch.arange(2 * size, device=taps.device) + FIRST
    pixels = torch.arange(size, device=taps.device)
    before, after = _band(taps, samples, -pixels), _band(taps, samples, 2 * (size - 1) - pixels)
    return _band(taps, samples, pixels) + before * (pixels > 0) + after * (pixels < size - 1)


def _analysis(size: int, taps: torch.Tensor) -> torch.Tensor:
    """[size, 2 · size + 10]: the pixels of these samples"""
    samples = torch.arange(2 * size + len(SYM6) - 2, device=taps.device)
    return _band(taps, samples, torch.arange(size, device=taps.device)).T


def _band(taps: torch.Tensor, samples: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    """What there is of a pixel in a sample, [samples, pixels]. A pixel's first sample has twice its number."""
    tap = samples[:, None] - 2 * pixels
    return torch.where((tap >= 0) & (tap < len(SYM6)), taps[tap.clamp(0, len(SYM6) - 1)], 0)


def _sources(
    images: torch.Tensor, matrix: torch.Tensor, offset: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where in the images what is at these rows [h] and columns [w] comes from: rows and columns [B, h, w] within them.

    matrix [B, 2, 2], offset [B, 2, 1]
    """
    middle = [(size - 1) / 2 for size in images.shape[2:]]
    y, x = (rows - middle[0])[:, None], columns - middle[1]
    (xx, xy), (yx, yy) = ((each[:, None, None] for each in row.unbind(1)) for row in matrix.unbind(1))
    right, down = offset[:, :, :, None].unbind(1)
    sources = yx * x + yy * y + (down + middle[0]), xx * x + xy * y + (right + middle[1])
    return tuple(_reflect(source, size) for source, size in zip(sources, images.shape[2:], strict=True))


def _recolour(images: torch.Tensor, draws: Draws) -> torch.Tensor:
    """All colour transforms as one. Each keeps the luma axis v = (1, 1, 1) / √3 and the plane across it: it scales one or both,
    moves along v or turns around it, so that the matrix is a·vvᵀ + b·(cos θ (1 − vvᵀ) + sin θ [v]ₓ), a circulant one."""
    brightened, brightness = draws["brightness"]
    contrasted, contrast = draws["contrast"]
    mirrored, side = draws["lumaflip"]
    turned, hue = draws["hue"]
    saturated, saturation = draws["saturation"]
    contrast = torch.exp2(0.5 * normal_from_uniform(contrast) * contrasted)
    luma = contrast * (1 - 2 * mirrored * (side < 0.5))
    colour = contrast * torch.exp2(normal_from_uniform(saturation) * saturated)
    angle = math.pi * (2 * hue - 1) * turned
    along, across = colour * angle.cos(), colour * angle.sin()
    same = _per_image((luma + 2 * along) / 3)
    before, after = (_per_image((luma - along) / 3 + sign * across / math.sqrt(3)) for sign in (1, -1))
    light = _per_image(0.2 * normal_from_uniform(brightness) * brightened * luma)
    return same * images + before * images.roll(1, 1) + after * images.roll(-1, 1) + light


def _per_image(values: torch.Tensor) -> torch.Tensor:
    return values[:, None, None, None]


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """[B, l, m] and [B, m, n] → [B, l, n], not by matmul, which a GPU may round to TF32."""
    return (a[:, :, :, None] * b[:, None]).sum(2)


def _diagonal(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.diag_embed(torch.stack([x, y], 1))


def _turn(cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return torch.stack([cos, -sin, sin, cos], 1).unflatten(1, (2, 2))


def _shift(images: torch.Tensor, down: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """images [B, C, H, W], uniforms [B] for each axis → [B, C, H, W], moved by up to an eighth, reflected at the edges"""
    height, width = images.shape[2:]
    rows, columns = _reflect(_shifted(down, height), height), _reflect(_shifted(right, width), width)
    return _take(images, rows[:, :, None], columns[:, None])


def _shifted(uniforms: torch.Tensor, size: int) -> torch.Tensor:
    """Rows or columns int64 [B, size], moved by whole numbers of up to an eighth of them either way; some are outside then."""
    most = int(size / 8 + 0.5)
    shift = (uniforms * (2 * most + 1)).floor().long() - most
    return torch.arange(size, device=uniforms.device) - shift[:, None]


def _reflect(places: torch.Tensor, size: int) -> torch.Tensor:
    """Places among rows or columns, those outside mirrored at the first and the last one as often as it takes."""
    return (size - 1) - (places.remainder(2 * (size - 1)) - (size - 1)).abs()


def _take(images: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """The pixels [B, C, h, w] of images [B, C, H, W] at whole rows and columns, which broadcast to [B, h, w].

    Not by `grid_sample`: what is gathered has derivatives of any order, which are deterministic where asked for.
    """
    places = rows.long() * images.size(3) + columns.long()
    index = places.flatten(1)[:, None].expand(-1, images.size(1), -1)
    return images.flatten(2).gather(2, index).unflatten(2, places.shape[1:])


def _inside(images: torch.Tensor, top: torch.Tensor, left: torch.Tensor, height: float, width: float) -> torch.Tensor:
    """Whether a pixel's middle is in the rectangle of its image: top and left [B], in pixels → bool [B, 1, H, W]"""
    rows, columns = (torch.arange(size, device=images.device) + 0.5 for size in images.shape[2:])
    down, right = rows - top[:, None], columns - left[:, None]
    down, right = (down >= 0) & (down < height), (right >= 0) & (right < width)
    return (down[:, :, None] & right[:, None])[:, None]


# Blitting, geometric and colour transforms of the paper ("bgc").
ADA = dict.fromkeys((name for name in COLUMNS if name != "cutout"), 1.0)
# Of R3GAN (Huang et al. 2024, 2501.05441).
R3GAN = {name: 0.5 if name in ("brightness", "contrast", *OF_COLOURS) else 1.0 for name in COLUMNS}

AUGMENTATIONS: dict[str, Callable[[int], nn.Module]] = {  # of so many channels
    "translation": lambda channels: Translation(),
    "diffaugment": lambda channels: DiffAugment(),
    "ada": lambda channels: AdaptiveAugment(channels, ADA),
    "r3gan": lambda channels: AdaptiveAugment(channels, R3GAN),
}


class AdaptiveProbability(nn.Module):
    """The probability of augmentation, led by overfitting (Karras et al. 2020, 2006.06676, section 3).

    r = E[sign D(real)], over all ranks and the images of four batches. After these the probability goes up where r is above
    the target and down where it is below, so fast that it takes `speed_kimg` thousand images from 0 to 1.

    batch_size: images of a discriminator update, over all ranks
    """

    def __init__(self, target: float, speed_kimg: float, batch_size: int):
        super().__init__()
        self.target = target
        self.speed = 1 / (1000 * speed_kimg)
        self.interval = 4 * batch_size
        self.register_buffer("probability", torch.zeros(()))
        self.register_buffer("sums", torch.zeros(3))  # since the last change: of the signs, of logits with one, of all logits

    @torch.no_grad()
    def observe(self, real_logits: torch.Tensor) -> None:
        """Logits [B] of this rank's real images, as they were augmented. A collective in training mode, and nothing otherwise;
        those that are not finite have no sign."""
        if not self.training:
            return
        known = real_logits.isfinite()
        signs = torch.where(known, real_logits.sign(), 0).sum()
        mine = torch.stack([signs, known.sum(), torch.ones_like(known).sum()]).to(self.sums.dtype)
        sums = self.sums + sum_over_ranks(mine)
        signs, judged, images = sums
        direction = torch.sign(signs - self.target * judged)
        probability = (self.probability + direction * images * self.speed).clamp(0, 1)
        due = images >= self.interval
        self.probability.copy_(torch.where(due, probability, self.probability))
        self.sums.copy_(torch.where(due, 0, sums))


class Augmentation(nn.Module):
    """What `augmentation` says of the images that the discriminator sees, real and generated.

    columns: uniform numbers that one image wants
    """

    def __init__(self, config: AugmentationConfig, channels: int, batch_size: int):
        super().__init__()
        self.pipe = AUGMENTATIONS[config.pipe](channels) if config.pipe != "none" else None
        self.columns = self.pipe.columns if self.pipe else 0
        self.given = config.probability
        self.adaptive = AdaptiveProbability(config.target, config.speed_kimg, batch_size) if config.target is not None else None

    def probability(self, seen: torch.Tensor) -> torch.Tensor:
        """Of each transformation, []; seen: images so far, []"""
        if self.adaptive:
            return self.adaptive.probability
        return value_at(self.given, seen) * torch.ones_like(seen)

    def forward(self, images: torch.Tensor, uniforms: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        """images [B, C, H, W] in [-1, 1], uniforms [B, columns] in [0, 1) → [B, C, H, W]"""
        return self.pipe(images, uniforms, self.probability(seen)) if self.pipe else images

    def observe(self, real_logits: torch.Tensor) -> None:
        """The discriminator's of the real images, [B], which the probability may adapt to."""
        if self.adaptive:
            self.adaptive.observe(real_logits)

    def statistics(self, seen: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"augmentation/probability": self.probability(seen).to(seen.dtype)} if self.pipe else {}
