"""Names the classes of images: `python -m gandist.classify RUN IMAGES…`."""

import argparse
import csv
import json
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from gandist.arguments import add_checkpoint, positive
from gandist.data.index import UNLABELLED
from gandist.distributed import World, join_alone, run
from gandist.errors import ConfigError
from gandist.evaluation.classification import Classification
from gandist.evaluation.evaluator import Evaluation, Record
from gandist.given import open_images
from gandist.tracking import evaluation_table
from gandist.trained import BATCH_SIZE, TrainedGAN, load

EXAMPLES = """\
examples:
  python -m gandist.classify runs/digits scan.png photos/
      files, and folders of files; in a folder with a directory a class, how many are recognized is told as well
  python -m gandist.classify runs/digits digits:test --top 3 --output predictions.csv
      shards: a folder, a glob, braces, an address, or the built-in digits
"""
WRITERS = (".csv", ".json")


class Prediction(NamedTuple):
    """ranking: the likeliest classes with their probabilities; label: None where none is known"""

    name: str
    label: str | None
    ranking: list[tuple[str, float]]


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parse(arguments)
    if options.output and not options.output.parent.is_dir():
        raise ConfigError(f"{options.output}: there is no folder {options.output.parent}")
    with join_alone("images are classified") as world:
        gan = load(options.run, step=options.step, best=options.best)
        predictions, evaluation = classify(gan, options.images, world, top=options.top)
    if options.output is None:
        print(_table(predictions))
    else:
        write = _write_csv if options.output.suffix == ".csv" else _write_json
        write(options.output, predictions)
        print(f"{options.output}: {len(predictions):,} images")
    if evaluation:
        print(evaluation_table(evaluation, gan.class_names))


def classify(
    gan: TrainedGAN, images: Sequence[str], world: World, *, top: int = 1
) -> tuple[list[Prediction], Evaluation | None]:
    """Of files, folders and shards; and how right they are, where there are labels. Raises ConfigError, DataError."""
    gan.check_classifies()
    verdicts = Classification(len(gan.class_names), world)
    predictions, labelled = [], 0
    for images_of_one in open_images(images, gan, world):
        names = map(images_of_one.name, range(len(images_of_one)))
        for batch, labels, _ in images_of_one.evaluation_batches(BATCH_SIZE):
            probabilities = gan.classify(batch)
            verdicts.update(probabilities, labels)
            labelled += int((labels != UNLABELLED).sum())
            values, classes = (each.tolist() for each in probabilities.topk(min(top, probabilities.size(1))))
            for label, likeliest, probable in zip(labels.tolist(), classes, values, strict=True):
                ranking = [(gan.class_names[number], value) for number, value in zip(likeliest, probable, strict=True)]
                predictions.append(Prediction(next(names), None if label == UNLABELLED else gan.class_names[label], ranking))
    return predictions, _evaluate(verdicts, labelled) if labelled else None


def _evaluate(verdicts: Classification, labelled: int) -> Evaluation:
    report = verdicts.report()
    records = [Record(f"classification/{name}", value, n_real=labelled) for name, value in report.accuracies.items()]
    return Evaluation(records, report)


def _table(predictions: Sequence[Prediction]) -> str:
    labelled = any(prediction.label is not None for prediction in predictions)
    rows = [("image", *(("label",) if labelled else ()), "class", "probability")]
    for name, label, ranking in predictions:
        (first, probability), *others = ranking
        more = "  ".join(f"{other} {value:.4f}" for other, value in others)
        rows.append((name, *((label or "-",) if labelled else ()), first, f"{probability:.4f}  {more}".rstrip()))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _write_csv(path: Path, predictions: Sequence[Prediction]) -> None:
    ranks = range(1, len(predictions[0].ranking) + 1)
    with path.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "label", *chain.from_iterable((f"class_{n}", f"probability_{n}") for n in ranks)])
        for name, label, ranking in predictions:
            writer.writerow([name, label, *chain.from_iterable(ranking)])


def _write_json(path: Path, predictions: Sequence[Prediction]) -> None:
    rows = [
        {"image": name, "label": label, "classes": [{"class": each, "probability": value} for each, value in ranking]}
        for name, label, ranking in predictions
    ]
    path.write_text(json.dumps(rows, indent=2) + "\n")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m gandist.classify",
        description="Name the classes of images with a run's discriminator, and where they have labels, tell how right it is. "
        "Images of any size are turned upright, cropped and scaled as the model wants them.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_checkpoint(parser)
    parser.add_argument("images", nargs="+", metavar="IMAGES", help="files, folders of files, or shards")
    parser.add_argument("--top", type=positive, default=1, metavar="K", help="the K likeliest classes (default: %(default)s)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="a .csv or .json file, in place of a table on the console")
    options = parser.parse_args(arguments)
    if options.output and options.output.suffix not in WRITERS:
        parser.error(f"--output {options.output}: name a file that ends in {' or '.join(WRITERS)}")
    return options


if __name__ == "__main__":
    run(main)
