"""The images that a command is given: files, folders of files, and shards."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from gandist.config import BUILT_IN, DataConfig
from gandist.data import Dataset, open_dataset
from gandist.data.collections import Collection, Files, Samples, image_folder
from gandist.data.files import ImageFiles, is_folder_of_files
from gandist.data.index import UNLABELLED
from gandist.distributed import World
from gandist.errors import ConfigError, DataError
from gandist.trained import TrainedGAN, shortened


def open_images(
    images: Sequence[str], gan: TrainedGAN, world: World, *, labelled: bool = True
) -> Iterator[Dataset | ImageFiles]:
    """As the model reads them: in their order, but all files that are named one by one first.

    labelled: whether their labels matter, and are to be the model's class numbers
    Raises DataError.
    """
    changed = {"resize": gan.resize, "unlabelled": "allow", "in_memory": 0, "shuffle_block": 0, "on_error": "raise"}
    data = DataConfig.model_validate(gan.data.model_dump() | changed)
    files = [name for name in images if Path(name).is_file() and not name.endswith(".tar")]
    if files:
        samples = Samples(Files(Path(), files), np.arange(len(files)), np.full(len(files), UNLABELLED))
        yield ImageFiles(Collection({"train": samples}, None), data, world, turned=True)
    for spec in images:
        if is_folder_of_files(spec):
            found = image_folder(Path(spec))
            yield ImageFiles(_numbered(found, spec, gan) if labelled else found, data, world, turned=True)
        elif spec not in files:
            yield _open_shards(spec, data, gan, world, labelled)


def _numbered(found: Collection, folder: str, gan: TrainedGAN) -> Collection:
    """With the numbers that the classes have in the model, in place of those of the folder's own."""
    if found.classes is None:
        return found
    try:
        numbers = np.array([gan.class_number(name) for name in found.classes])
    except ConfigError as error:
        raise DataError(f"{folder} has a directory that is not named like a class of the model: {error}") from error
    splits = {name: Samples(each.source, each.indices, _renumber(each.labels, numbers)) for name, each in found.splits.items()}
    return Collection(splits, gan.class_names)


def _renumber(labels: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    return np.where(labels == UNLABELLED, UNLABELLED, numbers[labels])


def _open_shards(spec: str, data: DataConfig, gan: TrainedGAN, world: World, labelled: bool) -> Dataset:
    if not Path(spec).exists() and not any(sign in spec for sign in (".tar", "://", "pipe:", BUILT_IN)):
        raise DataError(f"{spec}: no such file or folder; patterns of image files are the shell's to expand, without quotes")
    dataset = open_dataset(spec, data, world)
    if labelled and dataset.declared_classes not in ([], gan.class_names):
        raise DataError(
            f"{spec} has the classes {shortened(dataset.declared_classes)}, and the model {shortened(gan.class_names)}: their "
            "numbers do not mean the same"
        )
    return dataset
