"""Where images come from: folders and tables of files → a `Collection`, splits of labelled images."""

import csv
import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from PIL import Image

from gandist.data.index import UNLABELLED
from gandist.data.order import permutation
from gandist.errors import DataError

SPLITS = {"train": "train", "val": "validation", "validation": "validation", "test": "test"}
IMAGE_FORMATS = "png|jpe?g|jpe|jfif|webp|bmp|gif|tiff?|p[pgbn]m|tga|jp2|avif"  # by suffix
_MAX_CLASSES = 1 << 20


class ImageSource(Protocol):
    """Images by number."""

    def read(self, index: int) -> bytes | Image.Image:
        """A file's content, or the image itself. Raises OSError."""

    def name(self, index: int) -> str:
        """For messages."""


@dataclass(frozen=True)
class Samples:
    """Images of one split.

    source:  where they are
    indices: int64 [n], their numbers there
    labels:  int64 [n], -1: unlabelled
    """

    source: ImageSource
    indices: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, chosen: np.ndarray | slice) -> "Samples":
        return Samples(self.source, self.indices[chosen], self.labels[chosen])


@dataclass(frozen=True)
class Collection:
    """What is to be packed.

    splits:  of train, validation, test those that there are
    classes: their names by number; None: all is unlabelled
    skipped: files that are no images, how many of each suffix
    """

    splits: dict[str, Samples]
    classes: list[str] | None
    skipped: Counter[str] = field(default_factory=Counter)


class Files(NamedTuple):
    """Image files in a folder."""

    folder: Path
    names: Sequence[str]

    def read(self, index: int) -> bytes:
        return (self.folder / self.names[index]).read_bytes()

    def name(self, index: int) -> str:
        return str(self.folder / self.names[index])


class _Row(NamedTuple):
    file: str
    label: str | None
    split: str = "train"


def image_folder(folder: Path) -> Collection:
    """A folder with a directory a class; or with directories train, val, test of such; or with unlabelled images.

    Raises DataError if it is none of these.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    skipped: Counter[str] = Counter()
    directories, files = _entries(folder)
    if directories and set(directories) <= SPLITS.keys():
        _skip(files, skipped)
        if {"val", "validation"} <= set(directories):
            raise DataError(f"{folder} holds both val and validation: leave one of them")
        rows = [row for name in directories for row in _list_split(folder, name, SPLITS[name], skipped)]
    else:
        rows = _list_split(folder, "", "train", skipped)
    return _collect(folder, rows, skipped, numbered=False)


def table(path: Path) -> Collection:
    """The images that a CSV or JSON file lists, with paths relative to its own folder.

    CSV has a header `file,label` or `file,label,split`; JSON is a list of such objects, or StyleGAN's
    `{"labels": [[file, label], …]}`, whose null means all images beside it, unlabelled. Labels are class numbers or class
    names, empty or null where there is none. Raises DataError.
    """
    readers = {".csv": _read_csv, ".json": _read_json}
    if path.suffix.lower() not in readers:
        raise DataError(f"{path}: a table is a .csv or a .json file")
    skipped: Counter[str] = Counter()
    try:
        rows = readers[path.suffix.lower()](path, skipped)
    except (UnicodeDecodeError, csv.Error, json.JSONDecodeError) as error:
        raise DataError(f"{path}: not a valid {path.suffix[1:]} file: {error}") from error
    if repeated := [file for file, count in Counter(row.file for row in rows).items() if count > 1]:
        raise DataError(f"{path}: '{repeated[0]}' is listed twice ({len(repeated)} such): list every image once")
    if unknown := sorted({row.split for row in rows} - SPLITS.keys()):
        raise DataError(f"{path}: no split '{unknown[0]}': there are {', '.join(SPLITS)}")
    labels = {row.label for row in rows} - {None}
    return _collect(path.parent, rows, skipped, numbered=all(re.fullmatch(r"-?\d+", label) for label in labels))


def hold_out(samples: Samples, fraction: float, seed: int) -> tuple[Samples, Samples]:
    """(rest, held out): the same share of every class to within one image, always the same images.

    Unlabelled samples stay in the rest. Raises DataError if nothing would be held out or left.
    """
    shuffled = permutation(len(samples), seed)
    labelled = shuffled[samples.labels[shuffled] != UNLABELLED]
    by_class = labelled[np.argsort(samples.labels[labelled], kind="stable")]
    count = math.ceil(round(len(by_class) * fraction, 6))
    if not 0 < count < len(samples):
        raise DataError(f"{fraction:g} of {len(labelled)} labelled images cannot be held out: take another fraction, or none")
    held_out = np.zeros(len(samples), bool)
    held_out[by_class[(np.arange(count) / fraction).astype(np.int64)]] = True
    return samples[~held_out], samples[held_out]


def number_classes(path: Path | str, labels: Iterable[int]) -> list[str]:
    """Names 0, 1, … for classes that have none. Raises DataError for labels that are no class numbers."""
    labels = set(labels)
    if wrong := [label for label in labels if not 0 <= label < _MAX_CLASSES]:
        raise DataError(f"{path}: label {wrong[0]}: classes are numbered from 0, and a missing label is left empty")
    return [str(label) for label in range(max(labels) + 1)]


def _collect(folder: Path, rows: Sequence[_Row], skipped: Counter[str], *, numbered: bool) -> Collection:
    if not rows:
        raise DataError(f"{folder}: no images in it")
    names = {row.label for row in rows} - {None}
    if numbered and names:
        classes = number_classes(folder, map(int, names))
        number = {name: int(name) for name in names}
    else:
        classes = sorted(names)
        number = {name: label for label, name in enumerate(classes)}
    source = Files(folder, [row.file for row in rows])
    labels = np.array([number.get(row.label, UNLABELLED) for row in rows], np.int64)
    split_of = np.array([SPLITS[row.split] for row in rows])
    chosen = {split: np.flatnonzero(split_of == split) for split in dict.fromkeys(SPLITS.values())}
    splits = {split: Samples(source, indices, labels[indices]) for split, indices in chosen.items() if len(indices)}
    if "train" not in splits:
        raise DataError(f"{folder}: no images of the split train, only of {', '.join(splits)}")
    return Collection(splits, classes or None, skipped)


def _list_split(folder: Path, directory: str, split: str, skipped: Counter[str]) -> list[_Row]:
    """The images of a folder with a directory a class, or with unlabelled images, in the order of their names."""
    classes, files = _entries(folder / directory)
    images = _skip(files, skipped)
    if classes and images:
        raise DataError(f"{folder / directory} holds both images ({images[0]}) and class directories: move the images into one")
    rows = [_Row(str(Path(directory, name)), None, split) for name in images]
    for name in classes:
        inside = _walk(folder, Path(directory, name), skipped)
        if not inside:
            raise DataError(f"{folder / directory / name}: no images in this class directory: remove it, or fill it")
        rows += [_Row(file, name, split) for file in inside]
    return rows


def _entries(folder: Path) -> tuple[list[str], list[str]]:
    """Names of directories and of files, sorted; hidden directories are left out."""
    with os.scandir(folder) as entries:
        is_directory = {entry.name: entry.is_dir() for entry in entries}
    names = sorted(is_directory)
    return [name for name in names if is_directory[name] and name[0] != "."], [n for n in names if not is_directory[n]]


def _walk(root: Path, below: Path, skipped: Counter[str]) -> list[str]:
    """Images at any depth below `root / below`, relative to `root`."""
    directories, files = _entries(root / below)
    images = [str(below / name) for name in _skip(files, skipped)]
    return images + [image for name in directories for image in _walk(root, below / name, skipped)]


def _skip(files: Iterable[str], skipped: Counter[str]) -> list[str]:
    """The images among files; the others are counted."""
    images = []
    for name in files:
        kind = "hidden" if name.startswith(".") else Path(name).suffix.lower() or "without suffix"
        if re.fullmatch(rf"\.({IMAGE_FORMATS})", kind):
            images.append(name)
        else:
            skipped[kind] += 1
    return images


def _read_csv(path: Path, skipped: Counter[str]) -> list[_Row]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        if not {"file", "label"} <= set(reader.fieldnames or ()):
            raise DataError(f"{path}: its first line is to be file,label or file,label,split, not {reader.fieldnames}")
        return [_row(f"{path}, line {reader.line_num}", row) for row in reader]


def _read_json(path: Path, skipped: Counter[str]) -> list[_Row]:
    content = json.loads(path.read_text("utf-8"))
    if isinstance(content, dict) and "labels" in content:
        if content["labels"] is None:
            return [_Row(file, None) for file in _walk(path.parent, Path(), skipped)]
        content = [dict(zip(("file", "label"), entry, strict=False)) for entry in _lists(path, content["labels"], list)]
    return [_row(f"{path}, entry {number}", row) for number, row in enumerate(_lists(path, content, dict))]


def _lists(path: Path, content: Any, kind: type) -> list:
    if not isinstance(content, list) or not all(isinstance(entry, kind) for entry in content):
        raise DataError(f'{path}: neither a list of {{"file": …, "label": …}} nor {{"labels": [[file, label], …]}}')
    return content


def _row(where: str, row: dict[str, Any]) -> _Row:
    file, label, split = row.get("file"), row.get("label"), row.get("split") or "train"
    if not file or not isinstance(file, str):
        raise DataError(f"{where}: no file is named")
    if isinstance(label, bool) or not isinstance(label, int | str | None):
        raise DataError(f"{where}: the label of '{file}' is {label!r}: a class is named by one number or one name")
    return _Row(file, None if label is None else str(label).strip() or None, str(split))
