"""Where numbers and pictures of a run go: the console, files in the run folder, Weights & Biases."""

import json
import math
import os
import secrets
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

from gandist.config import Config
from gandist.distributed import World
from gandist.evaluation.evaluator import Evaluation

METRICS = "metrics.jsonl"
EVALUATIONS = "evaluations.jsonl"
SAMPLES = "samples"
GRID_CELL = 64  # pixels that a small image is enlarged to at least

Scalars = dict[str, float]


class Meter:
    """Means of statistics since the last reading and over all ranks; the device is waited for only when read.

    Values that are not finite are left out, as the updates they come from are.
    """

    def __init__(self, world: World):
        self.world = world
        self._totals: dict[tuple[str, ...], torch.Tensor] = {}  # names → their sums and counts, [2, len(names)]

    def update(self, statistics: Iterable[dict[str, torch.Tensor]]) -> None:
        """Scalars of one optimizer step."""
        for each in statistics:
            values = torch.stack(list(each.values())).double()
            finite = values.isfinite()
            total = torch.stack([torch.where(finite, values, 0), finite.double()])
            names = tuple(each)
            self._totals[names] = self._totals[names] + total if names in self._totals else total

    def read(self) -> Scalars:
        """Every rank calls it, after at least one update. A name of which no value was finite is left out."""
        names = [name for each in self._totals for name in each]
        sums, counts = self.world.sum(torch.cat(list(self._totals.values()), 1)).tolist()
        self._totals = {}
        return {name: total / count for name, total, count in zip(names, sums, counts, strict=True) if count}


class Tracker:
    """A place to send things to. `progress` is {"step", "kimg"}."""

    def scalars(self, progress: dict, values: Scalars) -> None:
        """Means of an interval."""

    def evaluation(self, progress: dict, evaluation: Evaluation) -> None:
        """The measured values."""

    def samples(self, progress: dict, grid: Image.Image) -> None:
        """Generated images, one row a class."""

    def finish(self) -> None:
        """Nothing more comes."""


def open_trackers(config: Config, class_names: list[str], world: World, *, step: int) -> list[Tracker]:
    """All trackers on rank 0, none on the others. `step` is where the run begins or goes on."""
    if not world.is_main:
        return []
    trackers = [Console(config), RunFolder(config.run_dir, step)]
    if config.tracking.wandb != "off":
        trackers.append(WeightsAndBiases(config, class_names))
    return trackers


class Console(Tracker):
    """One line an interval."""

    def __init__(self, config: Config):
        self.total_kimg = config.train.kimg

    def scalars(self, progress: dict, values: Scalars) -> None:
        kimg = progress["kimg"]
        rate = values["throughput/images_per_second"]
        left = max(0, self.total_kimg - kimg) * 1000 / rate
        eta = time.strftime("%H:%M:%S", time.gmtime(left)) if left < 86400 else f"{left / 86400:.1f} days"
        print(
            f"kimg {kimg:7.1f}/{self.total_kimg:g} | {rate:6.0f} img/s | data wait {values['throughput/data_wait']:4.0%}"
            f" | {values['memory/peak_gib']:.2f} GiB | ETA {eta} | D {values.get('loss/discriminator', math.nan):.3f}"
            f" | G {values.get('loss/generator', math.nan):+.3f}"
            + (f" | class {values['loss/classification']:.3f}" if "loss/classification" in values else ""),
            flush=True,
        )

    def evaluation(self, progress: dict, evaluation: Evaluation) -> None:
        values = ", ".join(f"{record.metric} {record.value:.4f}" for record in evaluation.records)
        print(f"evaluation at kimg {progress['kimg']:.1f}: {values}", flush=True)


class RunFolder(Tracker):
    """metrics.jsonl, evaluations.jsonl and samples/*.png."""

    def __init__(self, run_dir: Path, step: int):
        self.run_dir = run_dir
        (run_dir / SAMPLES).mkdir(parents=True, exist_ok=True)
        for name in (METRICS, EVALUATIONS):
            _keep_until(run_dir / name, step)

    def scalars(self, progress: dict, values: Scalars) -> None:
        self._append(METRICS, progress | values)

    def evaluation(self, progress: dict, evaluation: Evaluation) -> None:
        for record in evaluation.records:
            self._append(EVALUATIONS, record.to_dict())
        for name, values in evaluation.per_class.items():
            self._append(EVALUATIONS, {"metric": f"{name}/per_class", **progress, "value": values})
        if report := evaluation.report:
            details = {"precision": report.precision, "recall": report.recall, "f1": report.f1}
            self._append(EVALUATIONS, {"metric": "classification/per_class", **progress, **details})
            self._append(EVALUATIONS, {"metric": "classification/confusion", **progress, "value": report.confusion})

    def samples(self, progress: dict, grid: Image.Image) -> None:
        grid.save(self.run_dir / SAMPLES / f"step-{progress['step']:08d}.png")

    def _append(self, name: str, row: dict[str, Any]) -> None:
        with (self.run_dir / name).open("a") as file:
            file.write(json.dumps(row) + "\n")


def _keep_until(path: Path, step: int) -> None:
    """Drops the rows of steps that a resumed run is about to repeat."""
    if not path.exists():
        return
    rows = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    partial = path.with_suffix(".tmp")
    partial.write_text("".join(row for row in rows if json.loads(row)["step"] <= step))
    partial.replace(path)


class WeightsAndBiases(Tracker):
    """A W&B run that goes on under one id after a resume, and is kept offline in the run folder without a key."""

    def __init__(self, config: Config, class_names: list[str]):
        import wandb

        self._class_names = class_names
        id_file = config.run_dir / "wandb_id"
        if not id_file.exists():
            id_file.write_text(secrets.token_hex(4))
        options = {
            "project": config.tracking.wandb_project,
            "name": config.run_dir.name,
            "id": id_file.read_text(),
            "resume": "allow",
            "dir": config.run_dir,
            "config": config.model_dump(mode="json"),
            "settings": wandb.Settings(silent=True, console="off", init_timeout=10, finish_timeout=10),
        }
        try:
            mode = config.tracking.wandb
            if mode == "auto":
                mode = os.environ.get("WANDB_MODE") or ("online" if wandb.login(prompt=False, verify=False) else "offline")
            self._run = wandb.init(mode=mode, **options)
        except wandb.Error as error:
            print(f"warning: W&B cannot be reached ({' '.join(str(error).split())}); it goes on offline", flush=True)
            wandb.teardown()  # the failed attempt still holds the run's id
            self._run = wandb.init(mode="offline", **options)
        self._image, self._table = wandb.Image, wandb.Table
        self._run.define_metric("kimg")
        self._run.define_metric("*", step_metric="kimg")

    def scalars(self, progress: dict, values: Scalars) -> None:
        self._run.log(progress | values)

    def evaluation(self, progress: dict, evaluation: Evaluation) -> None:
        row = progress | {record.metric: record.value for record in evaluation.records}
        row |= {f"{record.metric}_std": record.spread for record in evaluation.records if record.spread is not None}
        if columns := per_class_columns(evaluation):
            rows = [list(row) for row in zip(self._class_names, *columns.values(), strict=True)]
            row["classification/per_class"] = self._table(["class", *columns], rows)
        if report := evaluation.report:
            cells = [
                [label, prediction, count]
                for label, counts in zip(self._class_names, report.confusion, strict=True)
                for prediction, count in zip(self._class_names, counts, strict=True)
            ]
            row["classification/confusion"] = self._table(["label", "prediction", "count"], cells)
        self._run.log(row)

    def samples(self, progress: dict, grid: Image.Image) -> None:
        self._run.log(progress | {"samples": self._image(grid)})

    def finish(self) -> None:
        self._run.finish()


def per_class_columns(evaluation: Evaluation) -> dict[str, list[float]]:
    """What was measured of each class: of the class head on the held-out images, and of the generated ones."""
    report = evaluation.report
    head = {"precision": report.precision, "recall": report.recall, "f1": report.f1} if report else {}
    return head | {name.rpartition("/")[2].removesuffix("_per_class"): values for name, values in evaluation.per_class.items()}


def evaluation_table(evaluation: Evaluation, class_names: list[str]) -> str:
    """The values, and those of each class."""
    lines = [
        f"{record.metric:<38} {record.value:.4f}" + (f" ± {record.spread:.4f}" if record.spread is not None else "")
        for record in evaluation.records
    ]
    if columns := per_class_columns(evaluation):
        width = max(len(name) for name in (*class_names, "class"))
        lines.append(f"\n{'class':<{width}}" + "".join(f"  {name:>9}" for name in columns))
        rows = zip(class_names, *columns.values(), strict=True)
        lines += [f"{name:<{width}}" + "".join(f"  {value:>9.4f}" for value in values) for name, *values in rows]
    return "\n".join(lines)


def sample_grid(images: torch.Tensor, columns: int) -> Image.Image:
    """uint8 [N, C, H, W] → a picture with `columns` images a row; small images are enlarged."""
    enlarge = max(1, GRID_CELL // images.shape[-1])
    grid = make_grid(images.repeat_interleave(enlarge, 2).repeat_interleave(enlarge, 3), columns)
    return to_pil_image(grid.cpu())
