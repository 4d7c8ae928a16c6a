"""Blocks that network families share."""

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from gandist.config import DataConfig, ModelConfig
from gandist.errors import ConfigError
from gandist.resolution import Pyramid, as_yaml, find_pyramid

Layer = Callable[[nn.Module], nn.Module]  # a new convolution, linear layer or embedding → the same, initialized and normalized

_recomputing = ContextVar("recomputing", default=False)


class Block(nn.Module):
    """A part of a network that draws nothing random. With `recompute` its activations are not kept for the backward pass
    but made again there (activation checkpointing, Chen et al. 2016, 1604.06174)."""

    recompute = False

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        if not (self.recompute and torch.is_grad_enabled()):
            return super().__call__(*inputs)
        return checkpoint(
            super().__call__, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=_first_and_second_pass
        )


def _first_and_second_pass() -> tuple[AbstractContextManager, AbstractContextManager]:
    return nullcontext(), _Recomputation()


class _Recomputation:
    """Tells the layers within. A pass is made again for each derivative, so it can be entered more than once."""

    def __enter__(self) -> None:
        self._token = _recomputing.set(True)

    def __exit__(self, *error: object) -> None:
        _recomputing.reset(self._token)


def _first_time() -> bool:
    """Whether this is not recomputation, of which compiled code has none: torch 2.11 cannot compile a ContextVar."""
    return torch.compiler.is_compiling() or not _recomputing.get()


def pyramid_of(model: ModelConfig, data: DataConfig, sides: Collection[int] | None = None) -> Pyramid:
    """How the family's feature maps grow to the images. Raises ConfigError.

    sides: of the squares that it makes; None: 8, 16, 32, …
    """
    if pyramid := find_pyramid(data.resolution, sides):
        return pyramid
    possible = "8, 16, 32, 64, …" if sides is None else ", ".join(map(str, sides))
    others = "" if isinstance(data.resolution, int) else " on one side, and on the other a multiple of a quarter of that"
    raise ConfigError(f"data.resolution={as_yaml(data.resolution)}: {model.family} makes images of {possible} pixels{others}")


class Trunk(nn.Module):
    """A discriminator without its head: images [B, C, H, W] in [-1, 1] → features [B, F].

    features:       how many it gives
    layer:          what it makes of a head's layers
    couples_images: whether the features of an image depend on the others of its pass
    """

    features: int
    layer: Layer
    couples_images = False

    def stages(self) -> list[nn.Module]:
        """Its parts that have weights, from the image on."""
        lists = nn.ModuleList | nn.Sequential
        parts = [part for child in self.children() for part in (child if isinstance(child, lists) else [child])]
        return [part for part in parts if any(True for _ in part.parameters())]


class SyncBatchNorm(_BatchNorm):
    """Batch norm over the global batch (Ioffe & Szegedy 2015, 1502.03167), on any device, differentiable twice.

    `torch.nn.SyncBatchNorm` refuses CPU tensors, has no second derivative and cannot be compiled in one piece. Every rank
    must bring the same number of samples. The running statistics skip what is not finite, and recomputation.
    """

    def _check_input_dim(self, input: torch.Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"batch norm wants [B, C, …], not {tuple(input.shape)}")

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return super().forward(input)
        self._check_input_dim(input)
        output, mean, var = self._normalize_alone(input) if rank_and_size()[1] == 1 else self._normalize_together(input)
        if _first_time():
            self._track(mean, var)
        return output

    def _normalize_alone(self, input: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The output, and the batch's mean and unbiased variance."""
        mean, var = torch.zeros_like(self.running_mean), torch.zeros_like(self.running_var)
        output = F.batch_norm(input, mean, var, self.weight, self.bias, training=True, momentum=1.0, eps=self.eps)
        return output, mean, var

    def _normalize_together(self, input: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As alone, over all ranks."""
        weight, bias = (
            (self.weight, self.bias)
            if self.affine
            else (torch.ones_like(self.running_var), torch.zeros_like(self.running_mean))
        )
        with torch.autocast(input.device.type, enabled=False):
            output, mean, var = _NormalizeOverRanks.apply(input, weight, bias, self.eps)
        count = input.numel() // input.size(1) * dist.get_world_size()
        return output, mean, var * (count / (count - 1))

    def _track(self, mean: torch.Tensor, var: torch.Tensor) -> None:
        self.num_batches_tracked += 1
        _move([self.running_mean, self.running_var], [mean, var], self.momentum)


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


class _NormalizeOverRanks(torch.autograd.Function):
    """Batch norm over the global batch, differentiable twice. It computes in float32 at least, and keeps its input as it came.

    input [B, C, …], weight and bias [C] → the same normalized, and mean and biased variance of all ranks, float64 [C]
    """

    @staticmethod
    def forward(
        input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        # Mean and mean square, so that one exchange suffices; in float64, so that their difference is exact enough.
        var, mean = torch.var_mean(input.to(_wide(input)), _all_but_channels(input), correction=0)
        mean, var = mean.double(), var.double()
        mean, mean_square = mean_over_ranks(torch.stack([mean, var + mean.square()]))
        var = mean_square - mean.square()
        scale = weight * torch.rsqrt(var + eps)
        output = torch.addcmul(_along(input, bias - mean * scale), input, _along(input, scale))
        # A copy in any case: torch 2.11, compiled, loses the gradient of an output that `.to` hands on as it is.
        return output.to(input.dtype, copy=True), mean, var

    @staticmethod
    def setup_context(ctx, inputs: tuple, outputs: tuple[torch.Tensor, ...]) -> None:
        input, weight, _, ctx.eps = inputs
        ctx.save_for_backward(input, weight, *outputs[1:])

    @staticmethod
    def backward(ctx, gradient: torch.Tensor, of_mean: torch.Tensor, of_var: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        input, weight, mean, var = ctx.saved_tensors
        dims = _all_but_channels(input)
        centered = input - _along(input, mean)
        of_shift = gradient.sum(dims, dtype=_wide(input)).double()
        of_scale = (gradient * centered).sum(dims).double()
        # By mean and variance, which all ranks share, in one exchange.
        inverse = torch.rsqrt(var + ctx.eps)
        of_mean = of_mean - weight * inverse * of_shift
        of_var = of_var - weight * inverse**3 / 2 * of_scale
        of_mean, of_var = mean_over_ranks(torch.stack([of_mean, of_var])) * (input.size(1) / input.numel())
        of_input = torch.addcmul(_along(input, of_mean), centered, _along(input, 2 * of_var))
        of_input = torch.addcmul(of_input, gradient, _along(input, weight * inverse))
        return of_input.to(input.dtype), (inverse * of_scale).to(weight.dtype), of_shift.to(weight.dtype), None


def _wide(x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _all_but_channels(x: torch.Tensor) -> list[int]:
    return [0, *range(2, x.dim())]


def _along(x: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """values [C] for the channels of x [B, C, …]"""
    return values.to(_wide(x)).view(1, -1, *[1] * (x.dim() - 2))


NORMS: dict[str, Callable[[int], nn.Module]] = {  # model.discriminator_norm: channels → a norm of their feature map
    "spectral": nn.Identity,  # it is of the weights
    "batch": SyncBatchNorm,
    "layer": partial(nn.GroupNorm, 1),  # over [C, H, W] (Ba et al. 2016, 1607.06450), with a gain and bias a channel
    "none": nn.Identity,
}


def plain(layer: nn.Module) -> nn.Module:
    """The layer as torch makes it, but embeddings as small as the weights of a linear layer."""
    if isinstance(layer, nn.Embedding):
        nn.init.normal_(layer.weight, std=layer.embedding_dim**-0.5)
    return layer


def track(running: torch.Tensor, value: torch.Tensor, momentum: float) -> None:
    """Moves a running mean toward the mean over ranks of a batch's value; every rank calls it. What is not finite is skipped,
    and recomputation."""
    if _first_time():
        _move([running], [mean_over_ranks(value.detach())], momentum)


@torch.no_grad()
def _move(running: list[torch.Tensor], values: list[torch.Tensor], momentum: float) -> None:
    # Not `running.lerp_`, which functorch refuses in a `vjp`, where a compiled gradient penalty runs.
    changes = torch._foreach_sub([value.to(each.dtype) for each, value in zip(running, values, strict=True)], running)
    torch._foreach_add_(running, [change.nan_to_num(0.0, 0.0, 0.0) for change in changes], alpha=momentum)


def rank_and_size() -> tuple[int, int]:
    """Of the process group, if there is one."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """[…] of each rank → […], their sum, differentiable twice."""
    return _SumOverRanks.apply(tensor) if rank_and_size()[1] > 1 else tensor


def mean_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """[…] of each rank → […], differentiable twice."""
    return sum_over_ranks(tensor) / rank_and_size()[1]


def gather_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """[B, …] of each rank → [world_size · B, …] of all, in their order, differentiable twice."""
    rank, size = rank_and_size()
    nothing = torch.zeros_like(tensor)
    return sum_over_ranks(torch.cat([tensor if other == rank else nothing for other in range(size)]))


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
        return modulate(self.norm(x), 1 + self.gain(labels), self.bias(labels))


def modulate(x: torch.Tensor, gain: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """x [B, C, H, W], gain and bias [B, C] → [B, C, H, W]"""
    shape = (*gain.shape, 1, 1)
    return torch.addcmul(bias.view(shape), x, gain.view(shape))


class UpConv2d(nn.Conv2d):
    """Each pixel four times, then this 3×3 convolution: together a transposed one of 4×4, with 4/9 of the products and without
    the larger feature map. The same but for rounding."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] → [B, C', 2H, 2W]"""
        transposed = self.weight.transpose(0, 1).flip(2, 3).contiguous(memory_format=torch.channels_last)
        kernel = F.avg_pool2d(transposed, 2, stride=1, padding=1, divisor_override=1)
        return F.conv_transpose2d(x, kernel, self.bias, stride=2, padding=1)


class DownConv2d(nn.Conv2d):
    """This 3×3 convolution, then the mean of each 2×2 pixels: together one of 4×4, as for `UpConv2d`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] → [B, C', H/2, W/2]"""
        return F.conv2d(x, F.avg_pool2d(self.weight, 2, stride=1, padding=1), self.bias, stride=2, padding=1)


class LowPass(nn.Module):
    """The low-pass filter [1, 3, 3, 1] along both axes; padding: zeros around the feature map."""

    def __init__(self, padding: int, gain: float = 1.0):
        super().__init__()
        self.padding = padding
        self.register_buffer("kernel", gain * _low_pass_filter(), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] → as many channels, of H + 2 · padding − 3"""
        return F.conv2d(x, self.kernel.expand(x.size(1), -1, -1, -1), padding=self.padding, groups=x.size(1))


class Upsample(nn.Module):
    """Twice the resolution: zeros between the pixels, then the low-pass filter [1, 3, 3, 1] along both axes."""

    def __init__(self):
        super().__init__()
        self.register_buffer("kernel", 4 * _low_pass_filter(), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] → [B, C, 2H, 2W]"""
        kernel = self.kernel.expand(x.size(1), -1, -1, -1)
        return F.conv_transpose2d(x, kernel, stride=2, padding=1, groups=x.size(1))


class Downsample(nn.Module):
    """Half the resolution: the low-pass filter [1, 3, 3, 1] along both axes, then every second pixel."""

    def __init__(self):
        super().__init__()
        self.register_buffer("kernel", _low_pass_filter(), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] → [B, C, H/2, W/2]"""
        return F.conv2d(x, self.kernel.expand(x.size(1), -1, -1, -1), stride=2, padding=1, groups=x.size(1))


def _low_pass_filter() -> torch.Tensor:
    """[1, 1, 4, 4], of sum 1"""
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
    return torch.outer(taps, taps)[None, None]
