"""Upsampling or pooling and the convolution beside it, as one convolution and as two: `python -m benchmarks.convolution`."""

import argparse
import copy
import time
from collections.abc import Callable, Sequence
from statistics import median

import torch
from torch import nn

from benchmarks.plain import as_torch_has_it
from benchmarks.report import header, table
from gandist.models.layers import DownConv2d, UpConv2d

SHAPES = {  # of BigGAN's and SNGAN's blocks: channels and pixels of the input
    UpConv2d: [(256, 8), (256, 16), (384, 16), (96, 64)],
    DownConv2d: [(128, 32), (192, 32), (96, 128)],
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.convolution", description=__doc__)
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7, help="in which both take turns")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(header())
    rows = []
    for layer, shapes in SHAPES.items():
        for channels, side in shapes:
            together = nn.ModuleList([layer(channels, channels, 3, padding=1)])
            together.to(device=device, memory_format=torch.channels_last)
            apart = as_torch_has_it(copy.deepcopy(together))
            x = torch.randn(options.images, channels, side, side, device=device)
            x = x.to(memory_format=torch.channels_last).requires_grad_()
            steps = [timed(network[0], x) for network in (together, apart)]
            turns = [[step() for step in steps] for _ in range(options.rounds + 1)][1:]
            ours, theirs = ([turn[place] for turn in turns] for place in (0, 1))
            ratio = median(one / two for one, two in zip(ours, theirs, strict=True))
            rows.append(
                [layer.__name__, channels, side, f"{1e3 * median(ours):.2f}", f"{1e3 * median(theirs):.2f}", f"{ratio:.2f}"]
            )
    print(table(["layer", "channels", "pixels", "as one, ms", "as two, ms", "ratio"], rows))


def timed(layer: nn.Module, x: torch.Tensor) -> Callable[[], float]:
    """Seconds of a forward and a backward pass: of the processor, or by the clock where a GPU computes, then in bfloat16."""
    clock = time.perf_counter if x.is_cuda else time.process_time

    def run() -> float:
        begin = clock()
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
            result = layer(x)
        result.backward(torch.ones_like(result))
        if x.is_cuda:
            torch.cuda.synchronize()
        return clock() - begin

    return run


if __name__ == "__main__":
    main()
