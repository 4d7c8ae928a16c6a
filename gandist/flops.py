"""Floating-point operations, counted once at the start, and what a GPU could do of them in a second."""

import copy

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

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
    with _Counter() as counter, torch.set_grad_enabled(backward):
        found = shadow(*inputs)
        if backward:
            found[0].backward()
    return counter.flops


class _Counter(TorchDispatchMode):
    """As torch's FlopCounterMode, which cannot be entered around a gradient that is part of the loss."""

    flops = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if formula := flop_registry.get(function.overloadpacket):
            self.flops += formula(*args, **(kwargs or {}), out_val=result)
        return result


def peak_flops(device: torch.device, precision: str) -> float | None:
    """None where it is not known."""
    if device.type != "cuda" or precision not in ("bfloat16", "float16"):
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAK.items() if key in name), None)
