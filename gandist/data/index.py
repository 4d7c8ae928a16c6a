"""The index of a shard: where in the tar each image lies, and its label. Made by one scan, which finds all damage.

A shard is an uncompressed tar. Adjacent members with one key, `KEY.png` (or jpg, jpeg, webp), `KEY.cls` and whatever else,
make one sample. Nothing of it is ever unpickled: images, integers and JSON are all that is read.
"""

import hashlib
import json
import os
import struct
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
from webdataset.tariterators import base_plus_ext

from gandist.data.sources import Shard
from gandist.errors import DataError

IMAGE_EXTENSIONS = ("png", "jpg", "jpeg", "webp")
OFFSET, SIZE, LABEL = range(3)  # columns of an index, int64 [n, 3]: byte offset and size of the image, label
UNLABELLED = -1
_BLOCK = tarfile.BLOCKSIZE
_GZIP = b"\x1f\x8b"
_ENDS = 1 << 16  # bytes at either end that tell one content from another
_MALFORMED = (tarfile.TarError, EOFError, ValueError, ArithmeticError, LookupError, struct.error)


@dataclass(frozen=True)
class LabelRule:
    """How a sample's label is read.

    source:  cls: the member KEY.cls; json:FIELD: a field of KEY.json; empty: there are no labels
    classes: names that stand for 0, 1, … where a label is not a number
    """

    source: str = "cls"
    classes: tuple[str, ...] = ()

    @property
    def extension(self) -> str:
        return self.source.partition(":")[0]

    def parse(self, content: bytes) -> int:
        """The label in a member's content; UNLABELLED for none and for negative ones. Raises ValueError."""
        value = content.decode().strip()
        if self.extension == "json":
            value = json.loads(value).get(self.source.partition(":")[2])
            if value is None:
                return UNLABELLED
        if isinstance(value, float | bool):
            raise ValueError(value)
        try:
            return max(int(value), UNLABELLED)  # a number is a number, also where classes have numbers for names
        except ValueError:
            return self.classes.index(value)


def scan(file: BinaryIO, shard: Shard, rule: LabelRule) -> np.ndarray:
    """The index of a shard that is open for reading, int64 [n, 3].

    Raises DataError for damage, also for what readers of tar pass over in silence (data behind a broken header, an
    archive that ends too early), and for anything else than was declared of the shard.
    """
    file.seek(0)
    if shard.sha256 is not None and hashlib.file_digest(file, "sha256").hexdigest() != shard.sha256:
        raise DataError(f"{shard}: damaged: its SHA-256 is not the one that _info.json declares: restore it")
    rows, keys = [], set()
    file.seek(0)
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for key, members in _samples(tar, shard):
                images = [name for name in members if name in IMAGE_EXTENSIONS]
                if len(images) != 1:
                    raise DataError(
                        f"{shard}: sample '{key}' has {sorted(members)}: wanted is one image ({', '.join(IMAGE_EXTENSIONS)})"
                        + (f" and a label ({rule.extension})" if rule.source else "")
                        + ", side by side"
                    )
                if key in keys:
                    raise DataError(f"{shard}: sample '{key}' is there twice")
                keys.add(key)
                image = members[images[0]]
                rows.append((image.offset_data, image.size, _label(tar, shard, key, members, rule)))
            _check_end(file, shard, tar.offset, len(rows))
    except _MALFORMED as error:
        if os.pread(file.fileno(), 2, 0) == _GZIP:
            raise DataError(f"{shard}: compressed shards cannot be read at random: unpack it") from error
        raise DataError(f"{shard}: damaged or truncated after {len(rows)} samples ({error}): restore it") from error
    if not rows:
        raise DataError(f"{shard}: no samples in it")
    if shard.count not in (None, len(rows)):
        raise DataError(f"{shard}: {len(rows)} samples, but the file beside it declares {shard.count}: restore one of them")
    return np.array(rows, np.int64)


def content_id(file: BinaryIO) -> bytes:
    """Tells one shard's content from another's by size and both ends, without reading the whole."""
    descriptor = file.fileno()
    size = os.fstat(descriptor).st_size
    ends = os.pread(descriptor, _ENDS, 0), os.pread(descriptor, _ENDS, max(0, size - _ENDS))
    return hashlib.sha256(b"%d %s %s" % (size, *ends)).digest()[:16]


def key_at(file: BinaryIO, offset: int) -> str:
    """The key of the image at this byte, from the tar header before it."""
    name = os.pread(file.fileno(), 100, offset - _BLOCK).rstrip(b"\0").decode(errors="replace")
    return base_plus_ext(name)[0] or name


def _samples(tar: tarfile.TarFile, shard: Shard) -> Iterator[tuple[str, dict[str, tarfile.TarInfo]]]:
    """Keys with their members by extension."""
    key, members, end = None, {}, -1
    for member in tar:
        if member.offset <= end or member.size < 0:
            raise tarfile.TarError(f"member '{member.name}' lies before the one in front of it")
        end = member.offset
        if member.isdir():
            continue
        if not member.isfile() or member.sparse is not None:
            raise DataError(f"{shard}: member '{member.name}' is a link, a device or sparse: pack plain files")
        base, extension = base_plus_ext(member.name)
        if base is None:
            raise DataError(f"{shard}: member '{member.name}' has no extension")
        if base != key:
            if members:
                yield key, members
            key, members = base, {}
        if extension.lower() in members:
            raise DataError(f"{shard}: member '{member.name}' is there twice")
        members[extension.lower()] = member
    if members:
        yield key, members


def _label(tar: tarfile.TarFile, shard: Shard, key: str, members: dict[str, tarfile.TarInfo], rule: LabelRule) -> int:
    if rule.extension not in members:
        return UNLABELLED
    content = tar.extractfile(members[rule.extension]).read()
    try:
        return rule.parse(content)
    except (ValueError, TypeError, AttributeError):
        names = " nor a name of a class" if rule.classes else ""
        raise DataError(
            f"{shard}: the label of sample '{key}' ({rule.source}) is {content[:40]!r}, not an integer{names}"
        ) from None


def _check_end(file: BinaryIO, shard: Shard, offset: int, samples: int) -> None:
    """tarfile ends in silence at a broken header; a whole archive ends in zeros."""
    file.seek(offset)
    tail = file.read(_BLOCK)
    whole = len(tail) == _BLOCK
    while whole and tail:
        whole = not any(tail)
        tail = file.read(1 << 20)
    if not whole:
        raise DataError(f"{shard}: damaged or truncated at byte {offset} after {samples} samples: restore it")
