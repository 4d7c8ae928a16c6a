"""Which shards a configuration names, and what files beside them declare of them."""

import glob
import json
import posixpath
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from braceexpand import UnbalancedBracesError
from webdataset.shardlists import expand_urls

from gandist.data.remote import PIPE, Remote, TransientError, is_remote, without_query
from gandist.errors import DataError
from gandist.redaction import redact

SPLITS = {"train": ("train", "training"), "test": ("test", "validation", "val")}  # of a folder, for data.train and data.test
INFO_FILES = ("_info.json", "info.json")
_COMPRESSED = (".gz", ".tgz", ".bz2", ".xz", ".zst")
_LISTING_THREADS = 16


@dataclass(frozen=True)
class Shard:
    """url: a path, a URL or a command; count: of samples; sha256: of the file. None: not declared"""

    url: str
    count: int | None = None
    sha256: str | None = None

    @property
    def name(self) -> str:
        return self.url if self.url.startswith(PIPE) else posixpath.basename(without_query(self.url))

    @property
    def folder(self) -> str:
        return "" if self.url.startswith(PIPE) else posixpath.dirname(without_query(self.url))

    def __str__(self) -> str:
        return redact(self.url)


@dataclass(frozen=True)
class ShardList:
    """Shards in the order that sample ids count through. classes: their names; class_counts: samples of each class.

    Both are empty where they are not declared.
    """

    shards: tuple[Shard, ...]
    classes: tuple[str, ...] = ()
    class_counts: tuple[int, ...] = ()


@dataclass(frozen=True)
class _Split:
    filenames: tuple[str, ...]
    counts: tuple[int, ...]
    sha256: tuple[str | None, ...]
    class_counts: tuple[int, ...]


@dataclass(frozen=True)
class _Info:
    """What `_info.json` (timm's form, with our additions) says of a folder."""

    classes: tuple[str, ...] = ()
    splits: dict[str, _Split] = field(default_factory=dict)


def find_shards(spec: str | Sequence[str], remote: Remote, *, split: str = "train") -> ShardList:
    """The shards that `spec` names: folders, globs, braces (`train-{0000..0007}.tar`), URLs, wids indices, lists of these.

    Of a folder whose `_info.json` lists splits, `split` is taken: train or test, or another by its name. Raises DataError
    with all that is missing.
    """
    folders = _Folders(remote)
    shards, missing = [], []
    for entry in [spec] if isinstance(spec, str) else spec:
        for name in _expand(entry):
            try:
                shards += _named(name, folders, remote, split)
            except FileNotFoundError:
                missing.append(f"no shard at {name}")
    if missing:
        raise DataError("\n".join(missing) + "\nset data.train and data.test to the shards that are there, or restore these")
    if not shards:
        raise DataError("no shards: the list is empty")
    urls = [shard.url for shard in shards]
    if repeated := sorted({url for url in urls if urls.count(url) > 1} if len(set(urls)) < len(urls) else ()):
        raise DataError(f"named twice: {', '.join(repeated)}: every sample is to come once an epoch")
    if packed := [url for url in urls if without_query(url).endswith(_COMPRESSED)]:
        raise DataError(f"{packed[0]}: compressed shards cannot be read at random: unpack them to .tar ({len(packed)} such)")
    return _declared(shards, folders)


def split_names(folder: str, remote: Remote) -> list[str]:
    """The splits that `_info.json` in a folder lists; empty without. Raises DataError."""
    return list(_Folders(remote).info(folder).splits)


def _expand(entry: str) -> list[str]:
    try:
        return expand_urls(entry if is_remote(entry) else str(Path(entry).expanduser()))
    except UnbalancedBracesError as error:
        raise DataError(f"{entry}: a brace is not closed: {error}") from error


def _named(name: str, folders: "_Folders", remote: Remote, split: str) -> Iterable[Shard]:
    """The shards behind one name. Raises FileNotFoundError if there are none."""
    if name.startswith(PIPE):
        return [Shard(name)]
    path = without_query(name)
    if path.endswith(".json"):
        return _wids_index(name, remote)
    if is_remote(name):
        is_folder = not path.endswith((".tar", *_COMPRESSED))
        is_pattern = not name.startswith("http") and glob.has_magic(name)
    else:
        is_folder, is_pattern = Path(name).is_dir(), glob.has_magic(name)
    if is_folder and not is_pattern:
        return _in_folder(name.rstrip("/"), folders, remote, split)
    if is_pattern:
        found = remote.glob(name) if is_remote(name) else sorted(glob.glob(name))
    else:
        found = [name] if is_remote(name) or Path(name).exists() else []
    if not found:
        raise FileNotFoundError(name)
    return map(Shard, found)


def _in_folder(folder: str, folders: "_Folders", remote: Remote, split: str) -> Iterable[Shard]:
    if splits := folders.info(folder).splits:
        wanted = SPLITS[split] if split in SPLITS and split not in splits else (split,)
        names = [name for name in wanted if name in splits] or (list(splits) if len(splits) == 1 else [])
        if not names:
            raise DataError(
                f"{folder}: its _info.json has the splits {', '.join(splits)}, none of them {' or '.join(wanted)}: "
                "name the shards by a pattern"
            )
        return [
            shard
            for filename in splits[names[0]].filenames
            for shard in _named(posixpath.join(folder, filename), folders, remote, split)
        ]
    if folder.startswith("http"):
        raise DataError(f"{folder}: a web folder without _info.json cannot be listed: name its shards, as -{{0000..0146}}.tar")
    return _named(posixpath.join(folder if is_remote(folder) else glob.escape(folder), "*.tar"), folders, remote, split)


def _wids_index(url: str, remote: Remote) -> list[Shard]:
    index = _read_json(url, remote)
    if index is None:
        raise FileNotFoundError(url)

    def parse() -> list[Shard]:
        base = posixpath.dirname(without_query(url))
        return [
            Shard(_join(base, entry["url"]), None if entry.get("nsamples") is None else int(entry["nsamples"]))
            for entry in index["shardlist"]
        ]

    return _parse(url, "a wids index", parse)


def _join(folder: str, name: str) -> str:
    return name if is_remote(name) or posixpath.isabs(name) else posixpath.join(folder, name)


def _declared(shards: list[Shard], folders: "_Folders") -> ShardList:
    """Adds what the files beside the shards say."""
    names = {folder: [shard.name for shard in shards if shard.folder == folder] for folder in {s.folder for s in shards}}
    declared = {folder: folders.declared(folder, names[folder]) for folder in names if folder}
    infos = {folder: folders.info(folder) for folder in declared}
    completed = []
    for shard in shards:
        count, sha256 = declared.get(shard.folder, {}).get(shard.name, (None, None))
        completed.append(replace(shard, count=count if shard.count is None else shard.count, sha256=sha256))
    classes = {info.classes for info in infos.values()}
    if len(classes) > 1:
        raise DataError(f"{' and '.join(sorted(infos))} declare different classes: give them one list of classes")
    whole = [
        split.class_counts if {*split.filenames} <= {*names[folder]} else ()
        for folder, info in infos.items()
        for split in info.splits.values()
        if {*split.filenames} & {*names[folder]}
    ]
    known = whole and all(whole) and len({len(counts) for counts in whole}) == 1
    class_counts = tuple(map(sum, zip(*whole, strict=True))) if known else ()
    return ShardList(tuple(completed), classes.pop() if classes else (), class_counts)


class _Folders:
    """The files beside shards, each read once."""

    def __init__(self, remote: Remote):
        self.remote = remote
        self._infos: dict[str, _Info] = {}

    def info(self, folder: str) -> _Info:
        if folder not in self._infos:
            urls = [posixpath.join(folder, name) for name in INFO_FILES]
            found = ((url, values) for url in urls if (values := self._probe(url)) is not None)
            self._infos[folder] = next((_parse_info(url, values) for url, values in found), _Info())
        return self._infos[folder]

    def declared(self, folder: str, names: list[str]) -> dict[str, tuple[int | None, str | None]]:
        """Count and SHA-256 by file name: of `_info.json`, open_clip's `sizes.json` or img2dataset's `NNNNN_stats.json`."""
        if splits := self.info(folder).splits.values():
            return {
                name: (count, sha256)
                for split in splits
                for name, count, sha256 in zip(split.filenames, split.counts, split.sha256, strict=True)
            }
        if sizes := self._probe(url := posixpath.join(folder, "sizes.json")):
            return _parse(url, "open_clip's sizes.json", lambda: {name: (int(count), None) for name, count in sizes.items()})

        def stats(name: str) -> tuple[int | None, str | None]:
            values = self._probe(url := posixpath.join(folder, f"{name.removesuffix('.tar')}_stats.json"))
            return (_parse(url, "img2dataset's stats", lambda: int(values["successes"])) if values else None), None

        if stats(names[0])[0] is None:
            return {}
        with ThreadPoolExecutor(_LISTING_THREADS) as threads:
            return dict(zip(names, threads.map(stats, names), strict=True))

    def _probe(self, url: str) -> Any:
        """A JSON file that need not be there. Object stores may answer 403 for what is not."""
        try:
            return _read_json(url, self.remote)
        except (TransientError, _MalformedError):
            raise
        except DataError:
            return None


class _MalformedError(DataError):
    """A file that is there and is not what it should be."""


def _read_json(url: str, remote: Remote) -> Any:
    content = remote.read(url)
    try:
        return None if content is None else json.loads(content)
    except ValueError as error:
        raise _MalformedError(f"{url}: not valid JSON: {error}") from error


def _parse_info(url: str, values: dict) -> _Info:
    def parse() -> _Info:
        splits = {}
        for name, split in values.get("splits", {}).items():
            filenames = tuple(split["filenames"])
            splits[name] = _Split(
                filenames,
                tuple(map(int, split["shard_lengths"])),
                tuple(split.get("sha256") or [None] * len(filenames)),
                tuple(split.get("class_counts") or ()),
            )
            if not len(filenames) == len(splits[name].counts) == len(splits[name].sha256):
                raise ValueError(f"split '{name}' has lists of different length")
        return _Info(tuple(map(str, values.get("classes", ()))), splits)

    return _parse(url, "timm's _info.json", parse)


def _parse(url: str, form: str, parse: Callable[[], Any]) -> Any:
    try:
        return parse()
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _MalformedError(f"{url}: not in the form of {form} ({type(error).__name__}: {error})") from error
