"""Whether translations follow their sources: `python -m benchmarks.style RUN` prints correlations.

Of each held-out image and its translations to all other classes, what the class does not decide: ink (the sum of the
brightness, black being none), slant, width, and place from left to right, each less its mean over the pair of classes.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from gandist.config import RUN_CONFIG
from gandist.config_file import load_config
from gandist.data import normalize, open_dataset
from gandist.distributed import join_world, run
from gandist.trained import load


def style_of(images: torch.Tensor) -> dict[str, torch.Tensor]:
    """Images [B, C, H, W] in [-1, 1] → [B] each, of the moments of the brightness."""
    mass = (images.double().mean(1) + 1) / 2 + 1e-6
    ink = mass.sum((1, 2))
    share = mass / ink[:, None, None]
    down, right = (torch.arange(side, dtype=torch.float64) for side in mass.shape[1:])
    x, y = share.sum(1) @ right, share.sum(2) @ down
    dx, dy = right - x[:, None], down - y[:, None]
    across = torch.einsum("bhw,bh,bw->b", share, dy, dx)
    height = torch.einsum("bhw,bh->b", share, dy.square())
    width = torch.einsum("bhw,bw->b", share, dx.square())
    return {"ink": ink, "slant": -across / height, "width": width, "place": x}


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.style", description=__doc__.partition("\n")[0])
    parser.add_argument("run_dir", type=Path, metavar="RUN", help="of a translator")
    run_dir = parser.parse_args(arguments).run_dir
    with join_world() as world:
        config = load_config(run_dir / RUN_CONFIG)
        gan = load(run_dir, device=world.device)
        held_out = open_dataset(config.data.test, config.data, world, split="test")
        (images, labels, _) = next(held_out.evaluation_batches(len(held_out)))
        images = normalize(images, torch.float32)
        pairs: dict[str, list[torch.Tensor]] = {}
        for source in labels.unique():
            some = images[labels == source]
            for target in range(config.data.num_classes):
                if target == source:
                    continue
                translated = style_of(gan.generator(some, torch.full((len(some),), target)))
                for name, value in style_of(some).items():
                    both = torch.stack([value, translated[name]])
                    pairs.setdefault(name, []).append(both - both.mean(1, keepdim=True))
        print(f"{gan.origin['checkpoint']}: {len(images)} images, each as {config.data.num_classes - 1} other classes")
        for name, values in pairs.items():
            print(f"{name:<6} {torch.corrcoef(torch.cat(values, 1))[0, 1]:+.2f}")


if __name__ == "__main__":
    run(main)
