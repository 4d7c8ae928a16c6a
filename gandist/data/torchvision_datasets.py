"""The data sets of `torchvision.datasets` as a `Collection`, by what their constructors take."""

import difflib
import inspect
import shlex
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from torchvision import datasets

from gandist.data.collections import UNLABELLED, Collection, Samples, number_classes
from gandist.data.decode import ImageError
from gandist.errors import DataError

_HELD_OUT = {"test": "test", "val": "validation", "validation": "validation", "valid": "validation"}
_INSTEAD = "list its images with their labels in a CSV file and pack that table"
_CANNOT_OPEN = (RuntimeError, OSError, ValueError, ImportError)


class _Images(NamedTuple):
    dataset: datasets.VisionDataset
    title: str

    def read(self, index: int) -> bytes | Image.Image:
        image = self.dataset[index][0]
        if not isinstance(image, bytes | Image.Image):
            raise ImageError(f"a {type(image).__name__}, not an image")
        return image

    def name(self, index: int) -> str:
        return f"{self.title}[{index}]"


def torchvision_dataset(name: str, root: Path) -> Collection:
    """What `torchvision.datasets.NAME` finds in `root`; nothing is downloaded.

    The splits are train and test if it takes `train: bool`; train and the first that there is of test, val if it takes
    `split: str`; else all is train. Raises DataError.
    """
    known = {key: each for key, each in vars(datasets).items() if inspect.isclass(each)}
    if name not in known:
        lower = {key.lower(): key for key in known}
        nearest = difflib.get_close_matches(name.lower(), lower, n=1, cutoff=0.4)
        raise DataError(f"torchvision has no data set '{name}'" + (f": did you mean {lower[nearest[0]]}?" if nearest else ""))
    opened = _open_splits(known[name], root)
    labels = {split: _labels(dataset, f"{name} {split}") for split, dataset in opened.items()}
    splits = {
        split: Samples(_Images(dataset, f"{name} {split}"), np.arange(len(dataset)), labels[split])
        for split, dataset in opened.items()
    }
    known_labels = {label for each in labels.values() for label in np.unique(each).tolist()} - {UNLABELLED}
    return Collection(splits, _class_names(opened["train"], name, known_labels) if known_labels else None)


def _open_splits(kind: type, root: Path) -> dict[str, datasets.VisionDataset]:
    parameters = inspect.signature(kind).parameters
    given: dict[str, Any] = {"root": str(root), "download": False}
    if "loader" in parameters or issubclass(kind, datasets.DatasetFolder):
        given["loader"] = _read_file  # the files as they are, instead of their pixels
    given = {key: value for key, value in given.items() if key in parameters or key == "loader"}
    varied = "train" if "train" in parameters else "split" if "split" in parameters else None
    needed = [
        key
        for key, each in parameters.items()
        if each.default is each.empty and each.kind is not each.VAR_KEYWORD and key not in given and key != varied
    ]
    if needed:
        raise DataError(f"torchvision's {kind.__name__} needs {', '.join(needed)}: {_INSTEAD}")

    def open_first(*choices: dict[str, Any]) -> datasets.VisionDataset:
        return _open_first(kind, given, choices)

    if varied is None:
        return {"train": open_first({})}
    if varied == "train":
        return {"train": open_first({"train": True}), "test": open_first({"train": False})}
    default = parameters["split"].default  # such as trainval
    opened = {"train": open_first({"split": "train"}, *([{"split": default}] if isinstance(default, str) else []))}
    for value, split in _HELD_OUT.items():
        with suppress(*_CANNOT_OPEN):
            return opened | {split: kind(**given, split=value)}
    return opened


def _open_first(kind: type, given: dict[str, Any], choices: Iterable[dict[str, Any]]) -> datasets.VisionDataset:
    """With the first of the choices of arguments that the data set takes. Raises DataError if it takes none."""
    failures = []
    for arguments in choices:
        try:
            return kind(**given, **arguments)
        except _CANNOT_OPEN as error:
            failures.append(str(error).split("\n")[0].rstrip(". "))
    name, root = kind.__name__, given.get("root", "")
    fetch = shlex.quote(f"from torchvision.datasets import {name}; {name}({root!r}, download=True)")
    raise DataError(
        f"{root}: torchvision finds no {name} there ({failures[-1]}): name its folder as --root, or fetch it first: "
        f"python -c {fetch}"
    )


def _read_file(path: str | Path) -> bytes:
    return Path(path).read_bytes()


def _labels(dataset: datasets.VisionDataset, title: str) -> np.ndarray:
    """int64 [n], -1: unlabelled"""
    targets = getattr(dataset, "targets", None)
    if targets is None or len(targets) != len(dataset):
        targets = [dataset[index][1] for index in range(len(dataset))]
    targets = targets.tolist() if hasattr(targets, "tolist") else targets
    labels = np.array([UNLABELLED if target is None else target for target in targets])
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise DataError(f"torchvision's {title} does not give each image one class: {_INSTEAD}")
    return labels.astype(np.int64)


def _class_names(dataset: datasets.VisionDataset, title: str, labels: Iterable[int]) -> list[str]:
    numbers = number_classes(title, labels)
    names = getattr(dataset, "classes", None)
    if not isinstance(names, list | tuple) or len(names) < len(numbers):
        return numbers
    return [", ".join(name) if isinstance(name, list | tuple) else str(name) for name in names]
