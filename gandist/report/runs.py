"""What the folder of a run tells: numbers, pictures, configuration, how it was started."""

import base64
import io
import math
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from gandist.config import RUN_CONFIG
from gandist.errors import ReportError
from gandist.json_lines import Row, read_rows
from gandist.redaction import redacted

METRICS = "metrics.jsonl"
EVALUATIONS = "evaluations.jsonl"
STARTS = "starts.jsonl"
SAMPLES = "samples"
REAL = "real.png"
MOST_GRIDS = 40  # of a run on the page
LARGEST_GRID = 1_000_000  # bytes; larger ones are made smaller
SMALLER_GRID = 3_000_000  # pixels of these, at most
RATE = "throughput/images_per_second"
BEST = "best/"


@dataclass(frozen=True)
class Grid:
    """A picture of many images. source: a data URL; step, kimg: when it was made"""

    source: str
    step: int
    kimg: float


@dataclass(frozen=True)
class Run:
    """A training run.

    name:        short, and unique on the page
    config:      what is in config.yaml
    metrics:     rows of means over intervals, in order
    evaluations: measured values, and what was measured of each class
    starts:      one row each start; none of a run that did not write them
    """

    name: str
    folder: Path
    config: Row
    metrics: list[Row]
    evaluations: list[Row]
    starts: list[Row] = field(default_factory=list)

    @cached_property
    def hours(self) -> list[float] | None:
        """Of training, up to each row of the metrics; pauses do not count. None where no throughput is known."""
        rates = [rate if _is_number(rate := row.get(RATE)) and rate > 0 else None for row in self.metrics]
        last = next((rate for rate in rates if rate), None)
        if last is None:
            return None
        total, hours = 0.0, []
        for (before, row), rate in zip(pairwise([{"kimg": 0.0}, *self.metrics]), rates, strict=True):
            last = rate or last
            total += (row["kimg"] - before["kimg"]) * 1000 / last / 3600
            hours.append(total)
        return hours

    def curves(self) -> dict[str, Row]:
        """Name → its points: "kimg", "hours" (None where unknown) and "value", each a list."""
        rows = [{name: value for name, value in row.items() if name not in ("step", "kimg")} for row in self.metrics]
        curves = {}
        for name in dict.fromkeys(name for row in rows for name in row):
            points = [index for index, row in enumerate(rows) if name in row]
            curves[name] = {
                "kimg": [self.metrics[index]["kimg"] for index in points],
                "hours": self.hours and [self.hours[index] for index in points],
                "value": [rows[index][name] for index in points],
            }
        return curves

    def evaluation_curves(self) -> dict[str, Row]:
        """As `curves`, with "spread"; those of the best checkpoint, measured once, are not among them."""
        curves: dict[str, Row] = {}
        for record in self._records():
            if record["metric"].startswith(BEST) or "kimg" not in record:
                continue
            curve = curves.setdefault(record["metric"], {"kimg": [], "hours": self.hours and [], "value": [], "spread": []})
            curve["kimg"].append(record["kimg"])
            curve["value"].append(record["value"])
            curve["spread"].append(record.get("spread"))
            if self.hours:
                curve["hours"].append(self._at("kimg", record["kimg"], self.hours))
        return curves

    def final(self, *, best: bool = False) -> dict[str, Row]:
        """Metric → its newest record; `best`: of the best checkpoint, instead."""
        return {record["metric"]: record for record in self._records() if record["metric"].startswith(BEST) == best}

    @property
    def confusion(self) -> Row | None:
        """The newest one. "value": counts, a row for each label"""
        return self._newest("classification/confusion")

    @cached_property
    def per_class(self) -> dict[str, list[Any]]:
        """Column → the value of each class, as last measured."""
        columns: dict[str, list[Any]] = {}
        if counts := self.started.get("data", {}).get("class_counts"):
            columns["training images"] = counts
        newest = {row["metric"]: row for row in self.evaluations if row["metric"].endswith("/per_class")}
        for metric, row in newest.items():
            if metric.startswith(BEST):
                continue
            if metric == "classification/per_class":
                columns |= {name: row[name] for name in ("precision", "recall", "f1") if name in row}
            else:
                columns[metric.split("/")[-2].removesuffix("_per_class")] = row["value"]
        return columns

    @cached_property
    def class_names(self) -> list[str]:
        """As the run was started with them, or numbers in their place."""
        names = [str(name) for name in self.started.get("class_names") or ()]
        counts = [len(values) for values in self.per_class.values()]
        counts += [len(self.confusion["value"])] if self.confusion else []
        return names + [str(index) for index in range(len(names), max(counts, default=0))]

    @property
    def started(self) -> Row:
        """The last start."""
        return self.starts[-1] if self.starts else {}

    @cached_property
    def grid_files(self) -> list[Path]:
        """All sample grids, oldest first."""
        return sorted(path for path in (self.folder / SAMPLES).glob("step-*.png") if path.stem[5:].isdecimal())

    @cached_property
    def grids(self) -> list[Grid]:
        """Sample grids, oldest first: of many, some at even distances, the first and the last among them."""
        files = self.grid_files
        if len(files) > MOST_GRIDS:
            files = [files[round(index)] for index in np.linspace(0, len(files) - 1, MOST_GRIDS)]
        steps = [int(path.stem[5:]) for path in files]
        return [Grid(_data_url(path), step, self._kimg(step)) for path, step in zip(files, steps, strict=True)]

    @cached_property
    def real(self) -> str | None:
        """A data URL of the real images, if the run kept some."""
        path = self.folder / SAMPLES / REAL
        return _data_url(path) if path.exists() else None

    def _records(self) -> list[Row]:
        return [row for row in self.evaluations if _is_number(row.get("value"))]

    def _newest(self, metric: str) -> Row | None:
        return next((row for row in reversed(self.evaluations) if row["metric"] == metric), None)

    def _kimg(self, step: int) -> float:
        """When a step was; after the last row of the metrics, at the mean pace until there."""
        last = self.metrics[-1]
        later = max(0, step - last["step"]) * last["kimg"] / last["step"]
        return self._at("step", step, [row["kimg"] for row in self.metrics]) + later

    def _at(self, key: str, value: float, of: list[float]) -> float:
        """What a column of the metrics, `of`, was when the column `key` was `value`."""
        return float(np.interp(value, [0, *(row[key] for row in self.metrics)], [0, *of]))


def read_runs(folders: list[Path]) -> list[Run]:
    """The runs of these folders, each once. ReportError: one is no run, has no metrics yet, or cannot be read."""
    folders = list({folder.resolve(): folder for folder in folders}.values())
    short = [folder.resolve().name for folder in folders]
    names = [name if short.count(name) == 1 else str(folder) for name, folder in zip(short, folders, strict=True)]
    return [_read_run(name, folder) for name, folder in zip(names, folders, strict=True)]


def flatten(config: Row, prefix: str = "") -> dict[str, Any]:
    """Nested sections → {"section.key": value}."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _read_run(name: str, folder: Path) -> Run:
    if not (folder / RUN_CONFIG).is_file():
        raise ReportError(f"{folder} is no run: there is no {RUN_CONFIG} in it")
    try:
        config = yaml.safe_load((folder / RUN_CONFIG).read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ReportError(f"{folder / RUN_CONFIG} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(config, dict):
        raise ReportError(f"{folder / RUN_CONFIG} is no configuration of a run")
    metrics = read_rows(folder / METRICS, "step", "kimg")
    if not metrics:
        raise ReportError(f"{folder} has no metrics yet: wait for the first interval, of tracking.every_kimg")
    starts = redacted(read_rows(folder / STARTS))  # older versions kept secrets
    return Run(name, folder, redacted(config), metrics, read_rows(folder / EVALUATIONS, "metric"), starts)


def _data_url(path: Path) -> str:
    content, kind = path.read_bytes(), "png"
    if len(content) > LARGEST_GRID:
        content, kind = _smaller(path), "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _smaller(path: Path) -> bytes:
    """The picture as a JPEG."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            picture = image.convert("RGB")
    except OSError as error:
        raise ReportError(f"{path} is damaged, or still being written: {error}") from error
    scale = min(1.0, math.sqrt(SMALLER_GRID / (picture.width * picture.height)))
    picture.resize((max(1, int(picture.width * scale)), max(1, int(picture.height * scale)))).save(
        buffer := io.BytesIO(), "JPEG", quality=90
    )
    return buffer.getvalue()


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
