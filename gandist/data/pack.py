"""Writes image collections as shards: `python -m gandist.data.pack --help`."""

import argparse
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from gandist.arguments import positive, resolution
from gandist.data.collections import Collection, Samples, hold_out, image_folder, table
from gandist.data.encode import Encoding, encode_png
from gandist.data.index import UNLABELLED
from gandist.data.order import permutation
from gandist.data.usage import train_command
from gandist.data.writer import ShardPlan, check_absent, cut, write_shards
from gandist.distributed import run
from gandist.errors import DataError
from gandist.resolution import Resolution, as_option, resolution_of, size_of

DIGITS_SHARDS = {"train": (400, 350, 300, 250, 137), "test": (200, 160)}  # uneven on purpose: nothing may rely on size
SHARD_SIZE = 5000  # images; some 0.3 GB of 64 px PNG, 1 GB of 256 px
_SPLIT_SEED = 20


def pack_digits(folder: Path, resolution: Resolution = 16) -> dict:
    """Packs scikit-learn's handwritten digits (1,797 grey images of 8×8, 10 classes), enlarged bilinearly.

    Every fifth image of each class, in a fixed shuffled order, is held out: 1,437 to train, 360 to test. The bytes are
    the same on every machine. The folder appears whole or not at all, however many processes pack it at once.

    Returns what `_info.json` says. Raises FolderExists.
    """
    check_absent(folder)
    images, labels = _digits(resolution)
    digits = Samples(_Digits(images), np.arange(len(labels)), labels)
    train, test = hold_out(digits, 0.2, _SPLIT_SEED)
    rank = np.argsort(permutation(len(labels), _SPLIT_SEED))
    shards = []
    for split, samples in (("train", train), ("test", test)):
        shuffled = samples[np.argsort(rank[samples.indices])]
        ends = np.cumsum(DIGITS_SHARDS[split])
        for filename, start, end in zip(shard_names(split), [0, *ends], ends, strict=False):
            part = shuffled[start:end]
            shards.append(ShardPlan(filename, split, part, part.indices, digits=4))
    return write_shards(folder, "digits", [str(digit) for digit in range(10)], shards, Encoding())


def shard_names(split: str) -> list[str]:
    return [f"digits-{split}-{shard:02d}.tar" for shard in range(len(DIGITS_SHARDS[split]))]


class _Digits(NamedTuple):
    images: np.ndarray  # uint8 [n, H, W]

    def read(self, index: int) -> bytes:
        return encode_png(self.images[index])

    def name(self, index: int) -> str:
        return f"digits of {as_option(resolution_of(*self.images.shape[1:]))} px [{index}]"


def _digits(resolution: Resolution) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [1797, H, W], labels int64 [1797]."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    grey = torch.from_numpy(digits.images).unsqueeze(1) * (255 / 16)
    grey = F.interpolate(grey, size=size_of(resolution), mode="bilinear", antialias=min(size_of(resolution)) < 8)
    return grey.squeeze(1).round().to(torch.uint8).numpy(), digits.target.astype(np.int64)


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    check_absent(options.folder)
    try:
        info, skipped = options.pack(options)
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from here", file=sys.stderr)
        sys.exit(130)
    print(_summary(options.folder, info, skipped))


def _pack_digits(options: argparse.Namespace) -> tuple[dict, Counter[str]]:
    return pack_digits(options.folder, options.resolution), Counter()


def _pack_folder(options: argparse.Namespace) -> tuple[dict, Counter[str]]:
    if options.folder.resolve().is_relative_to(options.images.resolve()):
        raise DataError(f"{options.folder} is inside {options.images}, among the images: name a folder elsewhere")
    return _pack(image_folder(options.images), options)


def _pack_table(options: argparse.Namespace) -> tuple[dict, Counter[str]]:
    return _pack(table(options.table), options)


def _pack_torchvision(options: argparse.Namespace) -> tuple[dict, Counter[str]]:
    from gandist.data.torchvision_datasets import torchvision_dataset

    return _pack(torchvision_dataset(options.name, options.root), options)


def _pack(collection: Collection, options: argparse.Namespace) -> tuple[dict, Counter[str]]:
    splits = _with_held_out(collection.splits, options.hold_out) if options.hold_out else collection.splits
    channels = options.channels or (3 if options.resolution else None)
    encoding = Encoding(options.resolution, channels, options.resize, options.format)
    name = re.sub(r"[^\w-]+", "-", options.folder.name)
    shards = cut(name, splits, options.shard_size)
    info = write_shards(options.folder, name, collection.classes, shards, encoding, workers=options.workers)
    return info, collection.skipped


def _with_held_out(splits: dict[str, Samples], fraction: float) -> dict[str, Samples]:
    if "test" in splits:
        raise DataError("--hold-out makes a split test, but the images have one: leave it out")
    if (splits["train"].labels == UNLABELLED).all():
        raise DataError("--hold-out takes the same share of every class, but no image is labelled: leave it out")
    train, test = hold_out(splits["train"], fraction, _SPLIT_SEED)
    return splits | {"train": train, "test": test}


def _summary(folder: Path, info: dict, skipped: Counter[str]) -> str:
    """What was packed, and the command that trains on it."""
    splits = ", ".join(
        f"{split} {entry['num_samples']:,} images in {len(entry['filenames'])} shard(s)"
        for split, entry in info["splits"].items()
    )
    size = f"{as_option(info['resolution'])} px" if "resolution" in info else "of several sizes"
    classes = f"{len(info['classes'])} classes" if "classes" in info else "unlabelled"
    lines = [f"packed {folder}: {splits}; {size}, {info['channels']} channel(s), {classes}"]
    if skipped:
        kinds = ", ".join(f"{count} {kind}" for kind, count in skipped.most_common(10))
        lines.append(f"skipped {skipped.total():,} file(s) that are no images: {kinds}")
    return "\n".join([*lines, "train on it with:", f"  {_training_command(folder, info)}"])


def _training_command(folder: Path, info: dict) -> str:
    return train_command(
        [str(folder)],
        [str(folder)] if len(info["splits"]) > 1 else [],
        resolution=info.get("resolution"),
        square=64,
        channels=info["channels"],
        num_classes=len(info.get("classes", [])),
        unlabelled=any("unlabelled" in split for split in info["splits"].values()),
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m gandist.data.pack",
        description="Write an image collection as shuffled WebDataset shards that gandist.train reads. A pack that was "
        "killed goes on when the same command is run again.",
        epilog="Each collection has its own help: python -m gandist.data.pack folder --help",
    )
    commands = parser.add_subparsers(dest="collection", required=True, metavar="COLLECTION")

    def add(name: str, pack: Callable, summary: str, description: str, example: str) -> argparse.ArgumentParser:
        command = commands.add_parser(
            name, help=summary, description=description, epilog=f"example: python -m gandist.data.pack {name} {example}"
        )
        command.set_defaults(pack=pack)
        return command

    digits = add(
        "digits",
        _pack_digits,
        "the built-in handwritten digits, at any size",
        "Pack scikit-learn's 1,797 handwritten digits, 360 of them held out.",
        "data/digits-32 --resolution 32",
    )
    folder = add(
        "folder",
        _pack_folder,
        "image files, a directory a class",
        "Pack image files: a directory a class, whose sorted names number the classes. Directories train, val (or "
        "validation) and test that hold class directories are the splits. Images without class directories are an unlabelled "
        "set. Other files are skipped and counted.",
        "photos data/photos-64 --resolution 64 --hold-out 0.1",
    )
    folder.add_argument("images", type=Path, metavar="IMAGES", help="the folder with the images")
    listed = add(
        "table",
        _pack_table,
        "image files that a CSV or JSON lists with their labels",
        "Pack the image files that a table lists: CSV with the header file,label or file,label,split; a JSON list of such "
        "objects; or StyleGAN's dataset.json. Labels are class numbers or class names, empty where there is none; paths are "
        "relative to the table.",
        "photos/labels.csv data/photos-64 --resolution 64",
    )
    listed.add_argument("table", type=Path, metavar="TABLE", help="a .csv or .json file")
    torchvision = add(
        "torchvision",
        _pack_torchvision,
        "a data set of torchvision that is on this disk",
        "Pack torchvision.datasets.NAME from where it was downloaded to; nothing is downloaded.",
        "MNIST data/mnist-32 --root ~/datasets --resolution 32 --channels 1",
    )
    torchvision.add_argument("name", metavar="NAME", help="the class's name, such as CIFAR10")
    torchvision.add_argument("--root", type=Path, required=True, metavar="DIR", help="where it was downloaded to")

    for command in (digits, folder, listed, torchvision):
        command.add_argument("folder", type=Path, metavar="FOLDER", help="where to; made by this command")
    digits.add_argument(
        "--resolution", type=resolution, default=16, metavar="PIXELS", help="pixels, or HEIGHTxWIDTH (default: %(default)s)"
    )
    for command in (folder, listed, torchvision):
        _add_options(command)
    return parser


def _add_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--resolution",
        type=resolution,
        metavar="PIXELS",
        help="make all images squares of so many pixels, or HEIGHTxWIDTH, upright as their EXIF says (default: files are "
        "copied as they are)",
    )
    command.add_argument(
        "--resize",
        choices=["center-crop", "stretch"],
        default="center-crop",
        help="how they come to its proportions (default: %(default)s)",
    )
    command.add_argument(
        "--channels", type=int, choices=[1, 3], help="make all images grey or RGB (default: 3 with --resolution, else as found)"
    )
    command.add_argument(
        "--format",
        choices=["png", "jpg"],
        default="png",
        help="of images that are not copied: png, lossless and fast to read; jpg, quality 95, smaller (default: %(default)s)",
    )
    command.add_argument(
        "--shard-size", type=positive, default=SHARD_SIZE, metavar="N", help="images a shard (default: %(default)s)"
    )
    command.add_argument(
        "--hold-out", type=_fraction, default=0.0, metavar="FRACTION", help="this part of every class becomes the split test"
    )
    command.add_argument(
        "--workers",
        type=positive,
        default=len(os.sched_getaffinity(0)),
        metavar="N",
        help="processes (default: the cores there are, %(default)s)",
    )


def _fraction(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{value:g} is not from 0 to less than 1")
    return value


if __name__ == "__main__":
    run(main)
