"""The Fréchet distance of two feature distributions, from moments that are summed over batches and ranks."""

import torch

from gandist.distributed import World


class Moments:
    """Mean and covariance of features, float64, in one pass (Chan, Golub and LeVeque 1983).

    Subtracting means before squaring keeps what sums of squares would lose where the mean is large.
    """

    def __init__(self, num_features: int):
        self.count = 0
        self.mean = torch.zeros(num_features, dtype=torch.float64)
        self.scatter = torch.zeros(num_features, num_features, dtype=torch.float64)  # sum of centred outer products

    def update(self, features: torch.Tensor) -> None:
        """features [B, D]"""
        features = features.detach().to("cpu", torch.float64)
        mean = features.mean(0)
        centred = features - mean
        self._merge(len(features), mean, centred.T @ centred)

    def over_ranks(self, world: World) -> "Moments":
        """The moments of all ranks' features together; a rank may have none."""
        total = Moments(len(self.mean))
        total.count = int(world.sum(torch.tensor(self.count)))
        total.mean = world.sum(self.mean * self.count) / max(total.count, 1)
        shift = self.mean - total.mean
        total.scatter = world.sum(self.scatter + self.count * torch.outer(shift, shift))
        return total

    @property
    def covariance(self) -> torch.Tensor:
        """Unbiased, float64 [D, D]"""
        return self.scatter / (self.count - 1)

    def _merge(self, count: int, mean: torch.Tensor, scatter: torch.Tensor) -> None:
        total = self.count + count
        shift = mean - self.mean
        self.scatter += scatter + torch.outer(shift, shift) * (self.count * count / total)
        self.mean += shift * (count / total)
        self.count = total


def frechet_distance(a: Moments, b: Moments) -> float:
    """‖μ₁ - μ₂‖² + tr(Σ₁ + Σ₂ - 2 (Σ₁ Σ₂)^½), the squared 2-Wasserstein distance of two Gaussians (Dowson & Landau 1982;
    of Inception features it is the FID of Heusel et al. 2017, 1706.08500).

    tr (Σ₁ Σ₂)^½ is the sum of the square roots of the eigenvalues of the symmetric Aᵀ Σ₂ A with A Aᵀ = Σ₁, so no matrix
    square root is needed and singular covariances do no harm.
    """
    eigenvalues, eigenvectors = torch.linalg.eigh(a.covariance)
    root = eigenvectors * eigenvalues.clamp(min=0).sqrt()
    cross = torch.linalg.eigvalsh(root.T @ b.covariance @ root).clamp(min=0).sqrt().sum()
    traces = a.covariance.trace() + b.covariance.trace()
    return float((a.mean - b.mean).square().sum() + traces - 2 * cross)
