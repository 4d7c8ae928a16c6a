"""Reads what W&B keeps offline: records of its own protocol, in the blocks of a LevelDB log."""

import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

BLOCK, HEADER = 1 << 15, 7
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


@dataclass
class Kept:
    """rows: of the history, as they were logged; axes: glob of metric names → what they are drawn over"""

    id: str = ""
    group: str = ""
    tags: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    axes: dict[str, str] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)
    exit_code: int | None = None


def read(path: Path) -> Kept:
    kept = Kept()
    for record in _records(path.read_bytes()):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            kept.id, kept.group, kept.tags = record.run.run_id, record.run.run_group, list(record.run.tags)
            kept.config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        elif kind == "history":
            items = record.history.item
            kept.rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
        elif kind == "metric" and record.metric.step_metric:
            kept.axes[record.metric.glob_name or record.metric.name] = record.metric.step_metric
        elif kind == "files":
            kept.files += [file.path for file in record.files.files]
        elif kind == "exit":
            kept.exit_code = record.exit.exit_code
    return kept


def _records(content: bytes) -> Iterator[Record]:
    """Until the first one that is not whole, as of a run that was killed."""
    position, pending = HEADER, b""
    while position + HEADER <= len(content):
        if (rest := BLOCK - position % BLOCK) < HEADER:
            position += rest
            continue
        checksum, size, kind = (
            int.from_bytes(content[position : position + 4], "little"),
            int.from_bytes(content[position + 4 : position + 6], "little"),
            content[position + 6],
        )
        data = content[position + HEADER : position + HEADER + size]
        if not kind:
            position += rest
            continue
        if len(data) < size:
            return
        assert zlib.crc32(bytes([kind]) + data) in (checksum, zlib.crc32(data, zlib.crc32(bytes([kind]))))
        position += HEADER + size
        pending = data if kind in (FULL, FIRST) else pending + data
        if kind in (FULL, LAST):
            record = Record()
            record.ParseFromString(pending)
            yield record
