"""Makes images with a trained generator: `python -m gandist.generate RUN OUTPUT`."""

import argparse
import hashlib
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.functional import to_pil_image
from tqdm import tqdm

from gandist.arguments import add_checkpoint, natural, positive, positive_number
from gandist.data.collections import Samples
from gandist.data.encode import Encoding
from gandist.data.writer import ShardPlan, check_absent, whole_folder, write_shards_on_all_ranks
from gandist.distributed import World, join_world, run
from gandist.tracking.tracker import sample_grid
from gandist.trained import BATCH_SIZE, TrainedGAN, load_on_all_ranks

SHARD_SIZE = 10_000
TIMEOUT_MINUTES = 24 * 60.0  # a rank may wait for others' shards: one that is gone is noticed by its connection
OTHER_PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")  # but for .png as it is
PER_CLASS = 10  # without classes: as many rows and columns
EXAMPLES = """\
examples:
  python -m gandist.generate runs/digits digits.png
      a picture, one class a row
  python -m gandist.generate runs/digits sevens --classes 7 --images 100 --seed 1
      a folder of PNG files, in a directory of each class
  python -m gandist.generate runs/digits path.png --interpolate 12 --classes 3,8
      the way from one latent to another, one pair a row
  torchrun --nproc_per_node=8 -m gandist.generate runs/a generated --images 50000 --shards --truncation 0.7
      shards as gandist.train reads them, written by all ranks; what was killed goes on when the same command is run again
"""


class GeneratedImages:
    """Images as `gandist.data.writer` wants them. They are made in batches, so ask for them in their order."""

    def __init__(self, gan: TrainedGAN, options: argparse.Namespace, classes: Sequence[int], world: World):
        self._gan = gan
        self._options = options
        self._classes = classes
        self._made = range(0), torch.empty(0)
        self._world = world
        self._progress = tqdm(total=options.images, unit=" images", disable=None if world.is_main else True)
        digest = hashlib.sha256(f"{classes} {options.seed} {options.truncation}".encode())
        for tensor in gan.generator.state_dict().values():
            digest.update(tensor.cpu().contiguous().numpy())
        self._identity = digest.hexdigest()

    def read(self, index: int) -> Image.Image:
        numbers, images = self._made
        if index not in numbers:
            numbers = batch_of(index, self._options)
            images, _ = self._gan.generate(numbers, self._classes, seed=self._options.seed, truncation=self._options.truncation)
            self._made = numbers, images
            self._progress.update(min(len(numbers) * self._world.size, self._options.images - self._progress.n))
        return to_pil_image(images[index - numbers.start])

    def name(self, index: int) -> str:
        """All that the image follows from: shards of others are not gone on with."""
        return f"{index} of {self._identity}"


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parse(arguments)
    with join_world(TIMEOUT_MINUTES) as world:
        with world.together():
            check_absent(options.output)
        gan = load_on_all_ranks(options.run, world, step=options.step, best=options.best)
        gan.check_generates()
        classes = gan.class_numbers(options.classes)
        options.images = options.images or (options.per_class or PER_CLASS) * (len(classes) or PER_CLASS)
        if options.shards:
            write_as_shards(gan, options, classes, world)
        elif options.output.suffix == ".png":
            with world.together():
                if world.is_main:
                    draw_grid(gan, options, classes)
        else:
            write_files(gan, options, classes, world)
        if world.is_main:
            print(f"{options.output}: {_describe(options)} of {gan.origin['checkpoint']}, {gan.origin['kimg']:g} kimg")


def draw_grid(gan: TrainedGAN, options: argparse.Namespace, classes: Sequence[int]) -> None:
    """A picture, one class a row, or one pair of latents."""
    setting = {"seed": options.seed, "truncation": options.truncation}
    rows = len(classes) or PER_CLASS
    if options.interpolate:
        images, columns = gan.interpolate(rows, options.interpolate, classes, **setting), options.interpolate
    else:
        columns = -(-options.images // rows)
        numbers = np.arange(rows * columns).reshape(columns, rows).T.ravel()  # classes take turns
        images, _ = gan.generate(numbers, classes, **setting)
        images[numbers >= options.images] = 0
    options.output.parent.mkdir(parents=True, exist_ok=True)
    sample_grid(images, columns).save(options.output)


def write_files(gan: TrainedGAN, options: argparse.Namespace, classes: Sequence[int], world: World) -> None:
    """A folder with a directory a class, or without classes of the images themselves. It appears whole or not at all."""
    folders = gan.class_folders(classes[: options.images]) or {-1: ""}
    digits = len(str(options.images - 1))
    with ExitStack() as alone:
        partial = None
        with world.together():
            if world.is_main:
                partial = alone.enter_context(whole_folder(options.output))
                for folder in folders.values():
                    (partial / folder).mkdir(exist_ok=True)
        partial = world.broadcast(partial)
        with world.together():
            for start in range(world.rank * BATCH_SIZE, options.images, world.size * BATCH_SIZE):
                numbers = batch_of(start, options)
                images, labels = gan.generate(numbers, classes, seed=options.seed, truncation=options.truncation)
                for number, image, label in zip(numbers, images, labels.tolist(), strict=True):
                    to_pil_image(image).save(partial / folders[label] / f"{number:0{digits}d}.png")


def write_as_shards(gan: TrainedGAN, options: argparse.Namespace, classes: Sequence[int], world: World) -> None:
    source = GeneratedImages(gan, options, classes, world)
    labels = np.array(classes or [-1])
    shards = []
    for start in range(0, options.images, options.shard_size):
        numbers = np.arange(start, min(start + options.shard_size, options.images))
        filename = f"{options.output.name}-train-{len(shards):05d}.tar"
        shards.append(ShardPlan(filename, "train", Samples(source, numbers, labels[numbers % len(labels)]), numbers))
    names = gan.class_names or None
    write_shards_on_all_ranks(options.output, options.output.name, names, shards, Encoding(channels=gan.data.channels), world)


def batch_of(number: int, options: argparse.Namespace) -> range:
    """The images that are made beside image `number`: the same whichever rank makes them, so that they come out the same."""
    start = number - number % BATCH_SIZE
    return range(start, min(start + BATCH_SIZE, options.images))


def _describe(options: argparse.Namespace) -> str:
    return f"paths of {options.interpolate} images" if options.interpolate else f"{options.images:,} images"


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m gandist.generate",
        description="Make images with the averaged generator of a run: a picture, PNG files, or shards. Image n follows from "
        "the seed and n alone, on any number of ranks.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_checkpoint(parser)
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="FILE.png for one picture, else a new folder")
    count = parser.add_mutually_exclusive_group()
    count.add_argument("--images", type=positive, metavar="N", help="so many in all; the classes take turns")
    count.add_argument("--per-class", type=positive, metavar="N", help=f"so many of each class (default: {PER_CLASS})")
    parser.add_argument(
        "--classes", type=lambda names: names.split(","), default=[], metavar="A,B,…", help="by name or number (default: all)"
    )
    parser.add_argument("--seed", type=natural, default=0, help="another one, other images (default: %(default)s)")
    parser.add_argument(
        "--truncation",
        type=positive_number,
        metavar="T",
        help="typical images rather than diverse ones: none of the latents is farther from 0; stylegan2: ψ",
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--interpolate", type=positive, metavar="N", help="rows of N images between two latents of a class")
    form.add_argument("--shards", action="store_true", help="a folder of WebDataset shards instead of PNG files")
    parser.add_argument(
        "--shard-size", type=positive, default=SHARD_SIZE, metavar="N", help="images a shard (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    is_picture = options.output.suffix == ".png"
    if options.output.suffix.lower() in OTHER_PICTURES and not is_picture:
        parser.error(f"{options.output}: a picture is called FILE.png")
    if options.interpolate and not is_picture:
        parser.error("--interpolate draws a picture: name a FILE.png")
    if options.interpolate and (options.images or options.per_class):
        parser.error("--interpolate draws one path a class: leave out --images and --per-class")
    if options.shards and is_picture:
        parser.error("--shards writes a folder, not a FILE.png")
    return options


if __name__ == "__main__":
    run(main)
