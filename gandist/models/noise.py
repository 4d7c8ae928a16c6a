"""Random numbers that are a function of an image's latents: the same on any device, in any batch, as often as they are drawn.

A counter-based generator (Salmon et al. 2011): splitmix64's finalizer (Steele et al. 2014) of the number's place and a key,
which comes of the bits of all of the image's latents. A `salt` makes draws for different purposes independent.
"""

import math
from collections.abc import Sequence

import torch

# Of splitmix64, as int64: its sums and products wrap around, as they should.
_GOLDEN, _FIRST, _SECOND = (number - 2**64 for number in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def hashed_uniform(latents: torch.Tensor, shape: Sequence[int], salt: int) -> torch.Tensor:
    """latents [B, Z], whose float32 bits matter → float32 in [0, 1), [B, *shape]"""
    bits = _hash(latents, math.prod(shape), salt)
    return (_shift(bits, 40).float() * 2**-24).reshape(-1, *shape)


def hashed_normal(latents: torch.Tensor, shape: Sequence[int], salt: int) -> torch.Tensor:
    """latents [B, Z], whose float32 bits matter → standard normal float32, [B, *shape], two of each hash (Box & Muller 1958)"""
    count = math.prod(shape)
    bits = _hash(latents, (count + 1) // 2, salt)
    # In float64, as libraries and compilers round the last bit of a logarithm or cosine in their own ways.
    radius = (-2 * (((bits & 0xFFFFFFFF).double() + 0.5) * 2**-32).log()).sqrt()
    angle = (bits >> 32).double() * (2 * math.pi * 2**-32)
    return torch.cat([radius * angle.cos(), radius * angle.sin()], 1)[:, :count].float().reshape(-1, *shape)


def _hash(latents: torch.Tensor, count: int, salt: int) -> torch.Tensor:
    """int64 [B, count], all bits random"""
    bits = latents.detach().float().view(torch.int32).long()
    places = torch.arange(1, 1 + max(bits.size(1), count), device=bits.device)
    # Times _GOLDEN, 22 bits at a time: torch.compile takes multiples of places for indices, which in C++ must not overflow.
    places = sum(places * (_GOLDEN >> low & 0x3FFFFF) << low for low in (0, 22, 44))
    key = _mix(_mix(bits + places[: bits.size(1)]).sum(1, keepdim=True) + salt)
    return _mix(key + places[:count])


def _mix(x: torch.Tensor) -> torch.Tensor:
    x = (x ^ _shift(x, 30)) * _FIRST
    x = (x ^ _shift(x, 27)) * _SECOND
    return x ^ _shift(x, 31)


def _shift(x: torch.Tensor, places: int) -> torch.Tensor:
    """To the right, zeros coming in: `>>` copies the sign."""
    return (x >> places) & ((1 << (64 - places)) - 1)
