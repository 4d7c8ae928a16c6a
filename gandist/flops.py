"""Floating-point operations, counted once at the start, and what a GPU could do of them in a second."""

import copy
from collections.abc import Callable

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import conv_flop_count, flop_registry

from gandist.config import Config
from gandist.engine import frozen
from gandist.models import evaluating
from gandist.objective import DiscriminatorObjective, GeneratorObjective

PEAK = {  # FLOP/s of dense bfloat16 matrix products, as the data sheets have them
    "H200": 989e12,
    "H100": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "A40": 150e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
}


def count_flops(module: nn.Module, *inputs: torch.Tensor, backward: bool = False) -> int:
    """Of matrix products and convolutions (a multiplication and an addition are two) in one forward pass of these inputs.

    backward: also in the backward pass of the first result, second derivatives of penalties included
    A copy of the module computes, in evaluation mode.
    """
    shadow = copy.deepcopy(module).eval()
    # cuDNN would try for each convolution which algorithm is fastest, and find it for a batch that never comes again.
    at_once = torch.backends.cudnn.flags(enabled=True, benchmark=False)
    with at_once, _Counter() as counter, torch.set_grad_enabled(backward):
        found = shadow(*inputs)
        if backward:
            found[0].backward()
    return counter.flops


def count_run(
    config: Config,
    discriminating: DiscriminatorObjective,
    generating: GeneratorObjective,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, int]:
    """Of one image: a forward pass of either network, and all of training for each real image ("update")."""

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(1, *shape, device=device, dtype=dtype)

    seen = torch.zeros((), device=device, dtype=dtype)
    labels = torch.zeros(1, dtype=torch.int64, device=device)
    images = zeros(config.data.channels, *config.data.size)
    latents = images if generating.translates else zeros(config.model.latent_dim)
    near = images if discriminating.wants_near else None
    real = (images, labels) if generating.wants_real else ()
    flops = {
        "generator": count_flops(generating.network, latents, labels),
        "discriminator": count_flops(discriminating.network, images, labels),
    }

    def discriminator_update(penalized: bool) -> int:
        noise = zeros(discriminating.columns.width)
        return count_flops(discriminating, images, labels, images, near, labels, noise, seen, penalized, backward=True)

    def generator_update(penalized: bool) -> int:
        return count_flops(generating, latents, labels, zeros(generating.columns.width), seen, penalized, *real, backward=True)

    with evaluating(discriminating):  # which the generator's objective holds unregistered: its copy's eval() misses it
        in_discriminator = _lazily(discriminator_update, config.loss.penalty_every)
        with frozen(discriminating.network):
            in_generator = _lazily(generator_update, config.loss.path_length_every)
    fakes = flops["generator"] * (1 if near is None else 2)
    return flops | {"update": fakes + in_discriminator + in_generator // config.train.discriminator_updates}


def _lazily(update: Callable[[bool], int], every: int) -> int:
    """The mean over updates of which one of so many has a penalty."""
    return update(True) if every == 1 else (update(True) + (every - 1) * update(False)) // every


class _Counter(TorchDispatchMode):
    """As torch's FlopCounterMode, which cannot be entered around a gradient that is part of the loss, and which counts the
    gradient of a grouped convolution's weight as if there were no groups."""

    flops = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.flops += flops_of(function, args, kwargs or {}, result)
        return result


def flops_of(function: torch._ops.OpOverload, args: tuple, kwargs: dict, result: object) -> int:
    """Of one ATen operation; 0 unless it is a matrix product or a convolution."""
    if function is torch.ops.aten.convolution_backward.default:
        return _convolution_backward(*args)
    formula = flop_registry.get(function.overloadpacket)
    return formula(*args, **kwargs, out_val=result) if formula else 0


def _convolution_backward(
    gradient: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias_sizes,
    stride,
    padding,
    dilation,
    transposed: bool,
    *rest,
) -> int:
    """Each gradient, of the input and of the weight, costs as much as the convolution."""
    *_, wanted = rest
    return conv_flop_count(list(x.shape), list(weight.shape), list(gradient.shape), transposed) * sum(wanted[:2])


def peak_flops(device: torch.device, precision: str) -> float | None:
    """None where it is not known."""
    if device.type != "cuda" or precision not in ("bfloat16", "float16"):
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAK.items() if key in name), None)
