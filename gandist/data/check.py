"""Looks at every shard and every image, and says what is there: `python -m gandist.data.check SHARDS...`."""

import argparse
import hashlib
import multiprocessing
import os
import re
import signal
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from gandist.arguments import positive
from gandist.config import DataConfig
from gandist.data.cache import ShardCache
from gandist.data.decode import PILLOW_ERRORS, ImageError, decode, open_image
from gandist.data.index import LABEL, OFFSET, SIZE, LabelRule, key_at
from gandist.data.mixing import WINDOW, shuffle_quality
from gandist.data.remote import Remote, is_remote
from gandist.data.sources import SPLITS, Shard, ShardList, find_shards, split_names
from gandist.data.storage import Storage
from gandist.data.usage import train_command
from gandist.distributed import run
from gandist.errors import DataError
from gandist.redaction import redact
from gandist.resolution import resolution_of

_CHUNK = 256  # images that a process decodes at a time
_NAMED = 100  # damaged shards and images in a report
_LISTED = 5  # image sizes, empty classes
_WELL_SHUFFLED = 0.8  # share of the classes beyond the first that shuffled data would have
_LONGEST_KEY = 90  # bytes; tar headers cut longer names
_GREY = ("1", "L", "LA", "I", "I;16", "F")  # Pillow's modes


class Section(NamedTuple):
    """Shards that make one data set. split: of a folder that has several, else empty"""

    specs: tuple[str, ...]
    split: str
    found: ShardList


class Scan(NamedTuple):
    """What is in a shard. size: bytes; table: its index, int64 [n, 3]; keys: hashes of them, uint64 [at most n]"""

    shard: Shard
    size: int
    table: np.ndarray
    keys: np.ndarray


class Decoded(NamedTuple):
    """What some images of a shard are. sizes: of (width, height); formats: of (name, channels); failures: messages"""

    sizes: Counter[tuple[int, int]]
    formats: Counter[tuple[str, int]]
    failures: list[str]


@dataclass
class Findings:
    """All that was seen of a section. labels: of each shard, int64 [n]; damage: messages; repeated: a message or empty"""

    shards: int
    samples: int
    size: int  # bytes
    labels: list[np.ndarray]
    repeated: str
    damage: list[str]
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    formats: Counter[tuple[str, int]] = field(default_factory=Counter)


@dataclass(frozen=True)
class Reader:
    """Opens shards as training does, but believes no index that was made before."""

    shard_cache: ShardCache
    rule: LabelRule

    def scan(self, shard: Shard) -> Scan | DataError:
        """What is in a shard, or why it cannot be used."""
        try:
            with tempfile.TemporaryDirectory() as folder:
                opened = Storage(Path(folder), self.shard_cache, self.rule).open(shard)
                with opened.file as file:
                    keys = [key_at(file, offset) for offset in opened.table[:, OFFSET].tolist()]
                    return Scan(shard, os.fstat(file.fileno()).st_size, np.array(opened.table), _hashes(keys))
        except DataError as error:
            return error

    def decode(self, shard: Shard, rows: np.ndarray) -> Decoded:
        """Decodes the images in these rows of a shard's index. Raises DataError or OSError if it is there no longer."""
        decoded = Decoded(Counter(), Counter(), [])
        fetched = is_remote(shard.url)
        with self.shard_cache.fetch(shard.url, lambda path: None) if fetched else Path(shard.url).open("rb") as file:
            for offset, size in rows[:, [OFFSET, SIZE]].tolist():
                try:
                    image_format, channels, image_size = look_at(os.pread(file.fileno(), size, offset))
                except ImageError as error:
                    decoded.failures.append(f"{shard}: sample '{key_at(file, offset)}' (byte {offset}): {error}")
                else:
                    decoded.sizes[image_size] += 1
                    decoded.formats[image_format, channels] += 1
        return decoded


def look_at(encoded: bytes) -> tuple[str, int, tuple[int, int]]:
    """Format, channels and (width, height) of an image that can be decoded. Raises ImageError."""
    try:
        with open_image(encoded) as image:
            image_format, channels = image.format or "other", 1 if image.mode in _GREY else 3
    except PILLOW_ERRORS:
        image_format, channels = "other", 3
    height, width, _ = decode(encoded, channels).shape
    return image_format, channels, (width, height)


def find_sections(specs: Sequence[str], remote: Remote) -> list[Section]:
    """The data sets behind the arguments: the splits of each folder that has some, and all others as one."""
    folders = [spec for spec in specs if Path(spec).expanduser().is_dir()]
    splits = {folder: split_names(str(Path(folder).expanduser()), remote) for folder in folders}
    others = tuple(spec for spec in specs if not splits.get(spec))
    sections = [Section(others, "", find_shards(others, remote))] if others else []
    for folder, names in splits.items():
        sections += [Section((folder,), name, find_shards(folder, remote, split=name)) for name in names]
    return sections


def look_through(found: ShardList, reader: Reader, executor: Executor) -> Findings:
    """Scans all shards and decodes all images. Raises DataError or OSError for shards that vanish meanwhile."""
    results = executor.map(reader.scan, found.shards)
    results = list(tqdm(results, "scanning", len(found.shards), unit="shard", leave=False, disable=None))
    scans = [result for result in results if isinstance(result, Scan)]
    findings = Findings(
        shards=len(results),
        samples=sum(len(scan.table) for scan in scans),
        size=sum(scan.size for scan in scans),
        labels=[scan.table[:, LABEL] for scan in scans],
        repeated=_repeated_keys(scans),
        damage=[str(result) for result in results if isinstance(result, DataError)],
    )
    chunks = [(s.shard, s.table[first : first + _CHUNK]) for s in scans for first in range(0, len(s.table), _CHUNK)]
    with tqdm(desc="decoding", total=findings.samples, unit="img", leave=False, disable=None) as progress:
        for decoded in executor.map(reader.decode, *zip(*chunks, strict=True)) if chunks else ():
            findings.sizes += decoded.sizes
            findings.formats += decoded.formats
            findings.damage += decoded.failures
            progress.update(decoded.sizes.total() + len(decoded.failures))
    return findings


def report(section: Section, findings: Findings) -> str:
    """The findings for a person to read."""
    title = f"{' '.join(section.specs)}{f': {section.split}' if section.split else ''}"
    unlabelled = sum(int((labels < 0).sum()) for labels in findings.labels)
    lines = [
        ("shards", f"{findings.shards:,}, of {findings.samples:,} samples and {findings.size:,} bytes"),
        *_about_classes(findings, section.found.classes),
        ("unlabelled", "all" if 0 < unlabelled == findings.samples else f"{unlabelled:,}"),
        ("sizes", _most_common(Counter({f"{w}×{h}": count for (w, h), count in findings.sizes.items()}))),
        ("formats", _most_common(Counter({_format(*key): count for key, count in findings.formats.items()}))),
        *_about_shuffling(findings.labels),
        ("keys", findings.repeated),
        ("damage", "\n".join(_first(findings.damage, _NAMED)) or "none"),
    ]
    return "\n".join([title] + [_entry(name, text) for name, text in lines if text])


def recommendation(sections: Sequence[tuple[Section, Findings]], label: str) -> str:
    """The command that trains on these data sets."""
    found = [findings for _, findings in sections]
    sizes = sum((findings.sizes for findings in found), Counter())
    specs = {
        key: tuple(dict.fromkeys(spec for section, _ in sections if _role(section) == key for spec in section.specs))
        for key in SPLITS
    }
    side = _most_frequent_side(sizes)
    labels = [labels for findings in found for labels in findings.labels]
    num_classes = max(max(int(each.max()) + 1 for each in labels), *(len(section.found.classes) for section, _ in sections))
    return train_command(
        specs["train"] or specs["test"],
        specs["test"] if specs["train"] else (),
        resolution=resolution_of(*reversed(next(iter(sizes)))) if len(sizes) == 1 else None,
        square=1 << side.bit_length() - 1,
        channels=max(channels for findings in found for _, channels in findings.formats),
        num_classes=num_classes if num_classes > 1 and any((each >= 0).any() for each in labels) else 0,
        unlabelled=any((each < 0).any() for each in labels),
        label=label,
    )


def _hashes(keys: Sequence[str]) -> np.ndarray:
    digests = [hashlib.blake2b(key.encode(), digest_size=8).digest() for key in keys if len(key.encode()) < _LONGEST_KEY]
    return np.frombuffer(b"".join(digests), np.uint64)


def _repeated_keys(scans: Sequence[Scan]) -> str:
    """A shard's keys are all different, as its scan would have failed."""
    keys = np.concatenate([scan.keys for scan in scans] or [[]])
    order = np.argsort(keys, kind="stable")
    again = np.flatnonzero(keys[order][1:] == keys[order][:-1])
    if not len(again):
        return ""
    shard = np.repeat(np.arange(len(scans)), [len(scan.keys) for scan in scans])[order]
    one, other = (scans[shard[place]].shard for place in (again[0], again[0] + 1))
    return (
        f"{len(np.unique(keys[order][again])):,} come in more than one shard, for example in {one} and {other}: no harm, "
        "unless images were packed twice"
    )


def _about_classes(findings: Findings, names: Sequence[str]) -> Iterator[tuple[str, str]]:
    def name(label: int) -> str:
        return f"{label} ({names[label]})" if label < len(names) and names[label] != str(label) else str(label)

    labels, counts = np.unique(np.concatenate(findings.labels or [[]]), return_counts=True)
    counts, labels = counts[labels >= 0], labels[labels >= 0].astype(int)
    if not len(labels):
        yield "classes", "none"
        return
    fewest, most = counts.argmin(), counts.argmax()
    yield (
        "classes",
        f"{len(labels):,}, with {np.median(counts):,g} images in the median, at least {counts[fewest]:,} "
        f"(class {name(labels[fewest])}), at most {counts[most]:,} (class {name(labels[most])})",
    )
    total = max(int(labels[-1]) + 1, len(names))
    if total > len(labels):
        present = set(labels.tolist())
        some = [name(label) for label in range(min(total, len(labels) + _LISTED)) if label not in present][:_LISTED]
        more = [f"… and {total - len(labels) - len(some):,} more"] if total - len(labels) > len(some) else []
        yield "empty", f"{total - len(labels):,} of {total:,} classes: {', '.join(some + more)}"
    if names and labels[-1] >= len(names):
        yield "names", f"of {len(names):,} classes, but there are labels up to {labels[-1]:,}"


def _about_shuffling(labels: Sequence[np.ndarray]) -> Iterator[tuple[str, str]]:
    quality = shuffle_quality(labels)
    if quality is None:
        return
    counted = f"{quality.as_packed:.1f} classes in {WINDOW} consecutive samples, {quality.ideal:.1f} in shuffled data"
    if quality.share(quality.in_shard) < _WELL_SHUFFLED:
        verdict = (
            "POOR: the shards are sorted by class.\ndata.shuffle_block would shuffle badly, as each shard holds few classes: "
            "use data.shuffle_block=0, or pack anew in shuffled order"
        )
    elif quality.share(quality.as_packed) < _WELL_SHUFFLED:
        verdict = (
            "sorted by class within the shards.\nNo harm here, as data.shuffle_block shuffles whole shards; readers with "
            "a shuffle buffer would need them packed anew"
        )
    else:
        verdict = "good"
    yield "shuffling", f"{counted}: {verdict}"


def _role(section: Section) -> str:
    """The key of SPLITS that a section is for."""
    return next((key for key, names in SPLITS.items() if section.split in names), "" if section.split else "train")


def _most_frequent_side(sizes: Counter[tuple[int, int]]) -> int:
    """Pixels of the shorter side."""
    sides: Counter[int] = Counter()
    for size, count in sizes.items():
        sides[min(size)] += count
    return sides.most_common(1)[0][0]


def _format(name: str, channels: int) -> str:
    return f"{name} {'grey' if channels == 1 else 'colour'}"


def _most_common(counts: Counter[str]) -> str:
    return ", ".join(_first([f"{name} ({count:,})" for name, count in counts.most_common()], _LISTED))


def _first(texts: Sequence[str], number: int) -> list[str]:
    return [*texts[:number], *([f"… and {len(texts) - number:,} more"] if len(texts) > number else [])]


def _entry(name: str, text: str) -> str:
    return f"  {name:<12}" + text.replace("\n", "\n" + " " * 14)


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process ends its workers
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)


@contextmanager
def _processes(workers: int) -> Iterator[Executor]:
    """Processes that are gone afterwards, at once after an exception."""
    executor = ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), _start_worker)
    try:
        yield executor
    except BaseException as error:
        for process in multiprocessing.active_children():
            process.kill()
        if isinstance(error, BrokenProcessPool):
            raise DataError("a checking process died, perhaps for lack of memory: try again with fewer --workers") from error
        raise
    finally:
        executor.shutdown(cancel_futures=True)


def _label(text: str) -> str:
    if not re.fullmatch(r"cls|none|json:.+", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not cls, json:FIELD or none")
    return text


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m gandist.data.check",
        description="Look at every shard and every image, and say what is there, what is damaged, and which settings fit.",
        epilog="example: python -m gandist.data.check 'data/mine/train-{0000..0146}.tar' --label json:class",
    )
    parser.add_argument("shards", nargs="+", help="as for data.train: folders, globs, braces, URLs; all splits of a folder")
    parser.add_argument("--label", type=_label, default="cls", metavar="cls|json:FIELD|none", help="default: %(default)s")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument(
        "--workers", type=positive, default=cores, metavar="N", help="decoding processes (default: %(default)s)"
    )
    parser.add_argument("--cache-dir", type=Path, default=DataConfig().cache_dir, help="where URLs go (default: %(default)s)")
    parser.add_argument("--allow-pipe", action="store_true", help="as data.allow_pipe: run the commands behind pipe: names")
    options = parser.parse_args(arguments)

    config = DataConfig(cache_dir=options.cache_dir, allow_pipe=options.allow_pipe)
    remote = Remote(allow_pipe=config.allow_pipe)
    shard_cache = ShardCache(config.cache_folder / "shards", config.cache_limit, remote)
    checked = []
    with _processes(options.workers) as executor:
        for section in find_sections(options.shards, remote):
            rule = LabelRule("" if options.label == "none" else options.label, section.found.classes)
            checked.append((section, look_through(section.found, Reader(shard_cache, rule), executor)))
            print(redact(report(*checked[-1])), end="\n\n", flush=True)
    if any(findings.sizes for _, findings in checked):
        print(redact(f"train on it with:\n  {recommendation(checked, options.label)}"))
    if damage := sum(len(findings.damage) for _, findings in checked):
        raise DataError(f"{damage:,} damaged shards or images: restore or replace them")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the processes go too
    run(main)
