"""Evaluates a run, or any images: `python -m gandist.evaluate RUN | images A B | reference B FILE [key=value …]`."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from gandist import checkpoint
from gandist.arguments import add_choice
from gandist.config import Config, DataConfig, EvaluationConfig
from gandist.config_file import load_config, load_run_config
from gandist.data import Dataset, open_dataset
from gandist.data.collections import image_folder
from gandist.data.decode import open_image
from gandist.data.files import ImageFiles, is_folder_of_files
from gandist.distributed import World, join_world, run
from gandist.errors import ConfigError
from gandist.evaluation.comparison import MOMENTS, Comparison, Sharing
from gandist.evaluation.evaluator import Evaluation, Evaluator, record_values
from gandist.evaluation.features import EXTRACTORS, open_extractor
from gandist.evaluation.metrics import METRICS, Metric
from gandist.evaluation.reference import RealStatistics, save_reference
from gandist.models import full_float32
from gandist.redaction import redact
from gandist.resolution import as_yaml, resolution_of
from gandist.tracking import evaluation_table

IMAGE_METRICS = "evaluation.metrics=[fid, kid, precision_recall, density_coverage]"
EXAMPLES = """\
examples:
  python -m gandist.evaluate runs/digits num_images=5000
      the newest checkpoint, with keys of the run's evaluation section
  torchrun --nproc_per_node=8 -m gandist.evaluate runs/a --best metrics=[fid50k_full,precision_recall] seed=1
      the best one by checkpoint.best, with other metrics and other latents
  python -m gandist.evaluate runs/a/checkpoints/step-00012000
      this one
  torchrun --nproc_per_node=8 -m gandist.evaluate images generated data/photos-64
      any two sets of images: folders of files, or shards; the second ones are the real ones
  torchrun --nproc_per_node=8 -m gandist.evaluate reference data/photos-64 photos.npz
      the moments of real images, for evaluation.reference=photos.npz
"""


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parse(arguments)
    overrides = [_in_its_section(override) for override in options.overrides]
    with join_world() as world:
        if options.subject[0] == "images":
            evaluation, names, about = evaluate_images(*_two(options.subject, "A B"), overrides, world)
        elif options.subject[0] == "reference":
            measure_reference(*_two(options.subject, "IMAGES FILE.npz"), options.extractor, overrides, world)
            return
        else:
            chosen = {"step": options.step, "best": options.best}
            evaluation, names, about = evaluate_run(Path(options.subject[0]), overrides, world, **chosen)
        if world.is_main:
            print(f"{about}\n{evaluation_table(evaluation, names)}")
            if options.json:
                options.json.write_text(json.dumps(evaluation.to_dict(), indent=2) + "\n")


def evaluate_run(
    path: Path, overrides: Sequence[str], world: World, *, step: int | None, best: bool
) -> tuple[Evaluation, list[str], str]:
    """One checkpoint, by the configuration of its run with these overrides; the names of its classes; and which one it is."""
    run_dir = path.resolve().parent.parent if checkpoint.is_checkpoint(path) else path
    config = load_run_config(run_dir, overrides)
    chosen = None
    with world.together():
        if world.is_main:
            chosen = checkpoint.choose(path, step=step, best_by=config.checkpoint if best else None)
    chosen = world.broadcast(chosen)
    train_set = open_dataset(config.data.train, config.data, world)
    evaluator = Evaluator(config, train_set, world, show_progress=True)
    return evaluator.measure_checkpoint(chosen), train_set.class_names, str(chosen)


def evaluate_images(measured: str, real: str, overrides: Sequence[str], world: World) -> tuple[Evaluation, list[str], str]:
    """Compares two sets of images, or one with a file of moments."""
    is_file = real.endswith(".npz")
    config = _image_config(real if not is_file else measured, [IMAGE_METRICS, *overrides], world)
    if is_file:
        overrides = [f"evaluation.reference={real}", *overrides]
        config = _image_config(measured, ["evaluation.metrics=[fid]", *overrides], world)
    compared = {name for name, metric in METRICS.items() if metric.at_most or not metric.num_fakes}
    if others := set(config.evaluation.metrics) - compared:
        raise ConfigError(
            f"evaluation.metrics has {', '.join(sorted(others))}, which measure a run, or a fixed number of generated images; "
            "images are compared by fid, kid, precision_recall, density_coverage and the like"
        )
    images = _open_images(measured, config.data, world)
    reals = images if is_file else _open_images(real, config.data, world)
    share = Sharing(config.evaluation.batch_size, world, show_progress=True)
    comparison = Comparison(config, world, share)

    def count_of(metric: Metric) -> int:
        return min(len(images), metric.num_fakes or len(images))

    def batches_of(count: int):
        return (batch[:2] for batch in images.evaluation_batches(config.evaluation.batch_size, count))

    with torch.no_grad(), full_float32():
        found = comparison.compare(batches_of, count_of, reals, config.data.num_classes)
        records, per_class = record_values(found, {})
    evaluation = Evaluation(records, per_class=per_class)
    return evaluation, reals.class_names, redact(f"{measured}: {len(images):,} images, against {real}")


def measure_reference(real: str, file: str, kind: str, overrides: Sequence[str], world: World) -> None:
    """Writes the moments of a set of images."""
    if not file.endswith(".npz"):
        raise ConfigError(f"{file}: a reference is a file.npz")
    config = _image_config(real, ["evaluation.metrics=[]", *overrides], world)
    images = _open_images(real, config.data, world)
    extractor = open_extractor(kind, config, world)
    share = Sharing(config.evaluation.batch_size, world, show_progress=True)
    reals = RealStatistics(config.data.cache_folder / "statistics", config.evaluation.batch_size, share, world)
    with full_float32():
        found = reals.measure(images, "real images", extractor, MOMENTS, None)
    with world.together():
        if world.is_main:
            about = {"images": redact(real), "resolution": config.data.resolution, "channels": config.data.channels}
            save_reference(Path(file), found.moments, extractor, about)
            print(f"{file}: the moments of {len(images):,} images in {extractor.num_features} features of {extractor.name}")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m gandist.evaluate",
        description="Measure a checkpoint of a run, or compare any two sets of images, on one rank or, with torchrun, on many.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "subject", nargs="+", metavar="RUN", help="a run's folder, a checkpoint's, `images A B`, or `reference IMAGES FILE.npz`"
    )
    add_choice(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the records there, too")
    parser.add_argument(
        "--extractor", choices=EXTRACTORS, default="inception", help="whose features a reference is of (default: %(default)s)"
    )
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)  # deepspeed's launcher appends it
    options = parser.parse_intermixed_args(arguments)
    options.overrides = [word for word in options.subject[1:] if "=" in word]
    options.subject = [word for word in options.subject if word not in options.overrides]
    if options.subject[0] not in ("images", "reference") and len(options.subject) > 1:
        parser.error(f"one run at a time; what is {options.subject[1]!r}?")
    return options


def _two(subject: Sequence[str], what: str) -> tuple[str, str]:
    if len(subject) != 3:
        raise ConfigError(f"gandist.evaluate {subject[0]} wants {what}")
    return subject[1], subject[2]


def _in_its_section(override: str) -> str:
    """Keys of the evaluation section may be written without it."""
    key = override.partition("=")[0]
    return f"evaluation.{override}" if key in EvaluationConfig.model_fields else override


def _image_config(spec: str, overrides: Sequence[str], world: World) -> Config:
    """One for images as they are: unlabelled, of the size of the first one, unless the overrides say otherwise."""
    said = {override.partition("=")[0] for override in overrides}
    settings = [f"data.train={json.dumps(spec)}", "data.test=null", "data.in_memory=0"]
    if "data.num_classes" not in said:
        settings += ["data.num_classes=0", "model.conditioning=none"]
    config = load_config(None, [*settings, *overrides])
    if {"data.resolution", "data.channels"} <= said:
        return config
    images = _open_images(spec, config.data, world)
    with world.together(), open_image(images.encoded(0)) as first:
        channels = 1 if first.mode in ("1", "L", "LA", "I", "I;16") else 3
        found = {"data.resolution": as_yaml(resolution_of(first.height, first.width)), "data.channels": channels}
    return load_config(None, [*settings, *(f"{key}={value}" for key, value in found.items()), *overrides])


def _open_images(spec: str, data: DataConfig, world: World) -> Dataset | ImageFiles:
    if not is_folder_of_files(spec):
        return open_dataset(spec, data, world)
    with world.together():
        return ImageFiles(image_folder(Path(spec)), data, world)


if __name__ == "__main__":
    run(main)
