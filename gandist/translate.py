"""Makes of images images of another class: `python -m gandist.translate RUN IMAGES… --to CLASS --output OUTPUT`."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torchvision.transforms.functional import to_pil_image

from gandist.arguments import add_checkpoint
from gandist.data.writer import check_absent, whole_folder
from gandist.distributed import World, join_alone, run
from gandist.errors import ConfigError
from gandist.given import open_images
from gandist.tracking.tracker import sample_grid
from gandist.trained import BATCH_SIZE, TrainedGAN, load

EXAMPLES = """\
examples:
  python -m gandist.translate runs/digits-translate scan.png photos/ --to 7 --output sevens
      a folder with a file for each image, under its own name
  python -m gandist.translate runs/digits-translate scan.png photos/ --output translated.png
      a picture: each image, and beside it its translations to all classes
"""


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parse(arguments)
    with join_alone("images are translated") as world:
        check_absent(options.output)
        gan = load(options.run, step=options.step, best=options.best)
        gan.check_translates()
        classes = gan.class_numbers(options.to)
        write = draw_grid if options.output.suffix == ".png" else write_files
        count = write(gan, options.images, classes, options.output, world)
    print(f"{options.output}: {count:,} image(s) as {', '.join(gan.class_names[number] for number in classes)}")


def draw_grid(gan: TrainedGAN, images: Sequence[str], classes: Sequence[int], output: Path, world: World) -> int:
    """A picture: one row an image, itself and then as each class. Returns how many images there were."""
    opened = open_images(images, gan, world, labelled=False)
    sources = torch.cat([batch.cpu() for given in opened for batch, *_ in given.evaluation_batches(BATCH_SIZE)])
    columns = [sources, *(gan.translate(sources, number) for number in classes)]
    output.parent.mkdir(parents=True, exist_ok=True)
    sample_grid(torch.stack(columns, 1).flatten(0, 1), len(columns)).save(output)
    return len(sources)


def write_files(gan: TrainedGAN, images: Sequence[str], classes: Sequence[int], output: Path, world: World) -> int:
    """A folder with a directory a class, in which the files are called as the images; it appears whole or not at all."""
    names: dict[str, str] = {}  # of files, and of the images that they are made of
    folders = gan.class_folders(classes)
    with whole_folder(output) as partial:
        for folder in folders.values():
            (partial / folder).mkdir()
        for given in open_images(images, gan, world, labelled=False):
            sources = map(given.name, range(len(given)))
            for batch, *_ in given.evaluation_batches(BATCH_SIZE):
                files = [_new_name(next(sources), names) for _ in batch]
                for number, folder in folders.items():
                    for file, image in zip(files, gan.translate(batch, number), strict=True):
                        to_pil_image(image).save(partial / folder / file)
    return len(names)


def _new_name(source: str, names: dict[str, str]) -> str:
    """Of a file. Raises ConfigError where two images would have the same."""
    name = f"{Path(source).stem}.png"
    if name in names:
        raise ConfigError(f"{source} and {names[name]} would both become {name}: translate them one after the other")
    names[name] = source
    return name


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m gandist.translate",
        description="Make of images images of other classes, with the averaged generator of a run that translates "
        "(model.family=stargan). Images of any size are turned upright, cropped and scaled as the model wants them.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_checkpoint(parser)
    parser.add_argument("images", nargs="+", metavar="IMAGES", help="files, folders of files, or shards")
    parser.add_argument(
        "--to", type=lambda names: names.split(","), default=[], metavar="A,B,…", help="by name or number (default: all)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("translated"),
        metavar="OUTPUT",
        help="FILE.png for one picture, else a new folder (default: %(default)s)",
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    run(main)
