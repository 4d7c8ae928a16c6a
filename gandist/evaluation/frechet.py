"""The Fréchet distance of two feature distributions, from moments that are summed over batches and ranks."""

import torch

from gandist.distributed import World


class Moments:
    """Mean and covariance of features, float64, in one pass (Chan, Golub and LeVeque 1983).

    Subtracting means before squaring keeps what sums of squares would lose where the mean is large.
    """

    def __init__(self, count: int, mean: torch.Tensor, scatter: torch.Tensor):
        """mean: float64 [D]; scatter: float64 [D, D], the sum of centred outer products"""
        self.count, self.mean, self.scatter = count, mean, scatter

    @classmethod
    def empty(cls, num_features: int, device: torch.device | None = None) -> "Moments":
        options = {"dtype": torch.float64, "device": device}
        return cls(0, torch.zeros(num_features, **options), torch.zeros(num_features, num_features, **options))

    def update(self, features: torch.Tensor) -> None:
        """features [B, D], on the same device"""
        if not len(features):
            return
        features = features.detach().double()
        mean = features.mean(0)
        centred = features - mean
        total = self.count + len(features)
        shift = mean - self.mean
        self.scatter.addmm_(centred.T, centred)
        self.scatter.addr_(shift, shift, alpha=self.count * len(features) / total)
        self.mean += shift * (len(features) / total)
        self.count = total

    def over_ranks(self, world: World) -> "Moments":
        """The moments of all ranks' features together, on the CPU; a rank may have none."""
        count, mean = self.count, self.mean.cpu()
        sums = world.sum(torch.cat([torch.tensor([count], dtype=torch.float64), mean * count]))
        total = int(sums[0])
        mean_of_all = sums[1:] / max(total, 1)
        shift = mean - mean_of_all
        return Moments(total, mean_of_all, world.sum(self.scatter.cpu().addr(shift, shift, alpha=count)))

    @property
    def covariance(self) -> torch.Tensor:
        """Unbiased, float64 [D, D]"""
        return self.scatter / max(self.count - 1, 1)


def frechet_distance(a: Moments, b: Moments) -> float:
    """‖μ₁ - μ₂‖² + tr(Σ₁ + Σ₂ - 2 (Σ₁ Σ₂)^½), the squared 2-Wasserstein distance of two Gaussians (Dowson & Landau 1982;
    of Inception features it is the FID of Heusel et al. 2017, 1706.08500).

    tr (Σ₁ Σ₂)^½ is the sum of the square roots of the eigenvalues of the symmetric Aᵀ Σ₂ A with A Aᵀ = Σ₁, so no matrix
    square root is needed. A is Cholesky's factor, or where Σ₁ is singular the one of its eigenvectors, which takes longer.
    """
    root, singular = torch.linalg.cholesky_ex(a.covariance)
    if singular:
        eigenvalues, eigenvectors = torch.linalg.eigh(a.covariance)
        root = eigenvectors * eigenvalues.clamp(min=0).sqrt()
    cross = torch.linalg.eigvalsh(root.T @ b.covariance @ root).clamp(min=0).sqrt().sum()
    traces = a.covariance.trace() + b.covariance.trace()
    return float((a.mean - b.mean).square().sum() + traces - 2 * cross)
