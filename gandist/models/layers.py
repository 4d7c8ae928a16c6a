"""Blocks that network families share."""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


class SyncBatchNorm(_BatchNorm):
    """Batch norm over the global batch (Ioffe & Szegedy 2015, 1502.03167), on any device, differentiable twice.

    `torch.nn.SyncBatchNorm` refuses CPU tensors and has no second derivative. Every rank must bring the same number of
    samples. In evaluation, and on one rank, it is plain batch norm.
    """

    def _check_input_dim(self, input: torch.Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"batch norm wants [B, C, …], not {tuple(input.shape)}")

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if not (self.training and dist.is_initialized() and dist.get_world_size() > 1):
            return super().forward(input)
        self._check_input_dim(input)
        dims = [0, *range(2, input.dim())]
        shape = [1, -1] + [1] * (input.dim() - 2)
        x = input.to(torch.promote_types(input.dtype, torch.float32))
        # Mean and mean square, so that one exchange suffices; in float64, so that their difference is exact enough.
        var, mean = (each.double() for each in torch.var_mean(x, dims, correction=0))
        mean, mean_square = _mean_over_ranks(torch.stack([mean, var + mean.square()]))
        var = mean_square - mean.square()
        with torch.no_grad():
            self.num_batches_tracked += 1
            count = input.numel() // input.size(1) * dist.get_world_size()
            self.running_mean.lerp_(mean.to(x.dtype), self.momentum)
            self.running_var.lerp_((var * (count / (count - 1))).to(x.dtype), self.momentum)
        scale = torch.rsqrt(var + self.eps)
        normalized = (x - mean.to(x.dtype).view(shape)) * scale.to(x.dtype).view(shape)
        if self.affine:
            normalized = normalized * self.weight.view(shape) + self.bias.view(shape)
        return normalized.to(input.dtype)


class _SumOverRanks(torch.autograd.Function):
    """All-reduce whose derivative, an all-reduce, can itself be differentiated."""

    @staticmethod
    def forward(ctx, tensor: torch.Tensor) -> torch.Tensor:
        total = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        return _SumOverRanks.apply(gradient)


def _mean_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    return _SumOverRanks.apply(tensor) / dist.get_world_size()


class ConditionalBatchNorm(nn.Module):
    """Synchronized batch norm whose gain and bias belong to the class (Dumoulin et al. 2017, 1610.07629).

    Without classes all images share one gain and bias.
    """

    def __init__(self, channels: int, num_classes: int):
        super().__init__()
        self.norm = SyncBatchNorm(channels, affine=False)
        self.gain = nn.Embedding(num_classes or 1, channels)
        self.bias = nn.Embedding(num_classes or 1, channels)
        self.num_classes = num_classes
        nn.init.zeros_(self.gain.weight)
        nn.init.zeros_(self.bias.weight)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """x [B, C, H, W], labels int64 [B] → [B, C, H, W]"""
        if not self.num_classes:
            labels = torch.zeros_like(labels)
        gain = 1 + self.gain(labels)[:, :, None, None]
        bias = self.bias(labels)[:, :, None, None]
        return torch.addcmul(bias, self.norm(x), gain)
