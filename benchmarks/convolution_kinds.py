"""How fast R3GAN's kinds of convolutions are in bfloat16, in both memory formats: `python -m benchmarks.convolution_kinds`.
Bytes are those of each tensor once, so that the bandwidth is the least that a step needs."""

import argparse
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from benchmarks.report import header, record
from gandist.engine import set_determinism

COLUMNS = ["convolution", "pass", "format", "ms", "TB/s", "TFLOP/s"]
FORMATS = {"NHWC": torch.channels_last, "NCHW": torch.contiguous_format}
PASSES = ("forward", "input's gradient", "weight's gradient")


@dataclass(frozen=True)
class Kind:
    name: str
    channels: int  # of the input
    filters: int
    size: int  # of the kernel
    groups: int


def kinds(width: int) -> list[Kind]:
    """Of a residual block that many channels wide, and of the low-pass filters between the resolutions."""
    return [
        Kind("3×3 in groups of 16", 2 * width, 2 * width, 3, 2 * width // 16),
        Kind("1×1", width, 2 * width, 1, 1),
        Kind("3×3 depthwise", width, width, 3, width),
    ]


def measure(kind: Kind, which: str, memory_format: torch.memory_format, options: argparse.Namespace) -> list[str]:
    """Cells from "ms" on."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    placement = {"device": device, "dtype": torch.bfloat16}
    x = torch.randn(options.images, kind.channels, options.pixels, options.pixels, **placement)
    weight = torch.randn(kind.filters, kind.channels // kind.groups, kind.size, kind.size, **placement)
    gradient = torch.randn(options.images, kind.filters, options.pixels, options.pixels, **placement)
    x, weight, gradient = (each.contiguous(memory_format=memory_format) for each in (x, weight, gradient))
    common = [1, 1], [kind.size // 2] * 2, [1, 1], False, [0, 0], kind.groups  # strides, padding, dilation, …
    backward = torch.ops.aten.convolution_backward
    work = {
        PASSES[0]: lambda: torch.ops.aten.convolution(x, weight, None, *common),
        PASSES[1]: lambda: backward(gradient, x, weight, None, *common, [True, False, False]),
        PASSES[2]: lambda: backward(gradient, x, weight, None, *common, [False, True, False]),
    }[which]
    seconds = time_of(work, device, options.seconds)
    size = sum(each.nbytes for each in (x, weight, gradient))
    flops = 2 * gradient.numel() * math.prod(weight.shape[1:])
    return [f"{1e3 * seconds:.3f}", f"{size / seconds / 1e12:.2f}", f"{flops / seconds / 1e12:.1f}"]


def time_of(work: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Seconds of one, by the clock: the mean of as many as fit in `seconds`, after a few."""

    def run(times: int) -> float:
        begin = time.perf_counter()
        for _ in range(times):
            work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - begin) / times

    run(2)
    times = max(1, min(1000, int(seconds / run(2))))
    return run(times)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.convolution_kinds", description=__doc__)
    parser.add_argument("--images", type=int, default=128, help="real and generated of a batch of 64 (default: %(default)s)")
    parser.add_argument("--pixels", type=int, default=32, help="of both sides (default: %(default)s)")
    parser.add_argument("--width", type=int, default=768, help="channels (default: those of configs/cifar10-r3gan.yaml)")
    parser.add_argument("--seconds", type=float, default=0.2, help="measured of each (default: %(default)s)")
    options = parser.parse_args(arguments)
    set_determinism(False)  # as the trainer has it: cuDNN tries which algorithm is fastest
    print(header())
    print(line(COLUMNS), flush=True)
    for kind in kinds(options.width):
        for name, memory_format in FORMATS.items():
            for which in PASSES:
                try:
                    cells = measure(kind, which, memory_format, options)
                except RuntimeError as error:  # such as too little memory, or an algorithm that there is not
                    cells = [str(error).partition("\n")[0][:80], "", ""]
                row = [kind.name, which, name, *cells]
                record("convolutions", COLUMNS, row)
                print(line(row), flush=True)


def line(row: Sequence[str]) -> str:
    return "".join([f"{row[0]:<22}{row[1]:<19}{row[2]:<6}", *(f"{cell:>9}" for cell in row[3:])])


if __name__ == "__main__":
    main()
