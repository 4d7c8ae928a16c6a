"""Numbers and pictures in the run's folder."""

import json
from pathlib import Path
from typing import Any

from PIL import Image

from gandist.evaluation.evaluator import Evaluation
from gandist.tracking.meter import Scalars
from gandist.tracking.tracker import Samples, Tracker

METRICS = "metrics.jsonl"
EVALUATIONS = "evaluations.jsonl"
STARTS = "starts.jsonl"
SAMPLES = "samples"
REAL = "real.png"


class RunFolder(Tracker):
    """metrics.jsonl, evaluations.jsonl, starts.jsonl and samples/*.png.

    step: where the run begins or goes on; start: a row about this start
    """

    def __init__(self, run_dir: Path, step: int, start: dict[str, Any]):
        self.run_dir = run_dir
        (run_dir / SAMPLES).mkdir(parents=True, exist_ok=True)
        for name in (METRICS, EVALUATIONS, STARTS):
            _keep_until(run_dir / name, step)
        self._append(STARTS, start)

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

    def real(self, grid: Image.Image) -> None:
        grid.save(self.run_dir / SAMPLES / REAL)

    def samples(self, progress: dict, samples: Samples) -> None:
        samples.grid.save(self.run_dir / SAMPLES / f"step-{progress['step']:08d}.png")

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
