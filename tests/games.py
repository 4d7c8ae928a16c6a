"""What objectives are given, by hand."""

import torch

from gandist.objective import DiscriminatorObjective, GeneratorObjective


def discriminator_inputs(
    objective: DiscriminatorObjective,
    real: torch.Tensor,
    real_labels: torch.Tensor,
    fake: torch.Tensor,
    fake_labels: torch.Tensor,
    noise: torch.Tensor | None = None,
) -> tuple:
    """noise: [B, columns]; None: zeros"""
    noise = torch.zeros(len(real), objective.columns.width) if noise is None else noise
    return real, real_labels, fake, None, fake_labels, noise, torch.zeros((), dtype=real.dtype), True


def generator_inputs(objective: GeneratorObjective, latents: torch.Tensor, labels: torch.Tensor) -> tuple:
    noise = torch.zeros(len(latents), objective.columns.width)
    real = (latents, labels.flip(0)) if objective.translates else ()
    return latents, labels, noise, torch.zeros((), dtype=latents.dtype), True, *real
