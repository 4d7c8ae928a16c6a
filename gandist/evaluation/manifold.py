"""How two sets of features cover each other, by balls around each point that reach to its k-th neighbour."""

from collections.abc import Iterator

import torch

BLOCK = 4096  # points whose distances are held at once


def precision_recall(real: torch.Tensor, fake: torch.Tensor, k: int = 3) -> tuple[float, float]:
    """The share of fakes within a ball of the reals, and of reals within one of the fakes (Kynkäänniemi et al. 2019,
    1904.06991).

    real [N, D], fake [M, D], both larger than k
    """
    return _covered(fake, real, k), _covered(real, fake, k)


def density_coverage(real: torch.Tensor, fake: torch.Tensor, k: int = 5) -> tuple[float, float]:
    """The number of the reals' balls that a fake lies in, over k, which may exceed 1; and the share of reals whose own ball has
    a fake in it (Naeem et al. 2020, 2002.09797)."""
    reach = _reach(real, k)
    inside = sum(int((distances <= reach).sum()) for distances in _distances(fake, real))
    nearest = torch.cat([distances.min(1).values for distances in _distances(real, fake)])
    return inside / (k * len(fake)), float((nearest <= reach).double().mean())


def _covered(points: torch.Tensor, others: torch.Tensor, k: int) -> float:
    """The share of points that lie within a ball of the others."""
    reach = _reach(others, k)
    return sum(int((distances <= reach).any(1).sum()) for distances in _distances(points, others)) / len(points)


def _reach(points: torch.Tensor, k: int) -> torch.Tensor:
    """The distance of each point to its k-th neighbour, [N]."""
    # The nearest is the point itself.
    return torch.cat([distances.kthvalue(k + 1).values for distances in _distances(points, points)])


def _distances(points: torch.Tensor, others: torch.Tensor) -> Iterator[torch.Tensor]:
    """Of each point to all others, [at most BLOCK, M] at a time."""
    for block in points.split(BLOCK):
        yield torch.cdist(block, others)
