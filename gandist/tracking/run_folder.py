"""Numbers and pictures in the run's folder."""

import json
from pathlib import Path
from typing import Any

from PIL import Image

from gandist.atomic import naming, replace_text
from gandist.evaluation.evaluator import Evaluation
from gandist.json_lines import append_rows, read_rows
from gandist.tracking.meter import Scalars
from gandist.tracking.tracker import Samples, Tracker

METRICS = "metrics.jsonl"
EVALUATIONS = "evaluations.jsonl"
STARTS = "starts.jsonl"
SAMPLES = "samples"
REAL = "real.png"


class RunFolder(Tracker):
    """metrics.jsonl, evaluations.jsonl, starts.jsonl and samples/*.png.

    step: where the run begins or goes on; start: a row about this start; evaluated: whether step's evaluation is over
    """

    def __init__(self, run_dir: Path, step: int, start: dict[str, Any], *, evaluated: bool):
        self.run_dir = run_dir
        (run_dir / SAMPLES).mkdir(parents=True, exist_ok=True)
        _keep_until(run_dir / METRICS, step)
        _keep_until(run_dir / EVALUATIONS, step if evaluated else step - 1)
        _keep_until(run_dir / STARTS, step)
        append_rows(run_dir / STARTS, [start])

    def scalars(self, progress: dict, values: Scalars) -> None:
        append_rows(self.run_dir / METRICS, [progress | values])

    def evaluation(self, progress: dict, evaluation: Evaluation) -> None:
        rows = [record.to_dict() for record in evaluation.records]
        rows += [{"metric": f"{name}/per_class", **progress, "value": values} for name, values in evaluation.per_class.items()]
        if report := evaluation.report:
            details = {"precision": report.precision, "recall": report.recall, "f1": report.f1}
            rows.append({"metric": f"{evaluation.report_group}/per_class", **progress, **details})
            rows.append({"metric": f"{evaluation.report_group}/confusion", **progress, "value": report.confusion})
        append_rows(self.run_dir / EVALUATIONS, rows)

    def real(self, grid: Image.Image) -> None:
        self._save_picture(grid, REAL)

    def samples(self, progress: dict, samples: Samples) -> None:
        self._save_picture(samples.grid, f"step-{progress['step']:08d}.png")

    def _save_picture(self, grid: Image.Image, name: str) -> None:
        path = self.run_dir / SAMPLES / name
        with naming(path):
            grid.save(path)


def _keep_until(path: Path, step: int) -> None:
    """Drops the rows of steps that a resumed run is about to repeat, and what is damaged."""
    if path.exists():
        rows = [row for row in read_rows(path, "step") if row["step"] <= step]
        replace_text(path, "".join(json.dumps(row) + "\n" for row in rows))
