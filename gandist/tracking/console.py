"""What a person sees who looks at the run: a line an interval, and on a terminal a bar."""

import math
import sys
import time

from tqdm import tqdm

from gandist.config import Config
from gandist.evaluation.evaluator import Evaluation
from gandist.tracking.meter import Scalars
from gandist.tracking.tracker import Tracker

HEADER_EVERY = 20  # rows
UNITS = ("img/s", "GiB")


class Console(Tracker):
    """One line an interval; on a terminal it is the row of a table above a bar of the progress."""

    def __init__(self, config: Config, step: int):
        self.total_kimg = config.train.kimg
        self.rows = 0
        images = config.train.batch_size * config.train.discriminator_updates
        shown = {"unit": "kimg", "unit_scale": images / 1000, "leave": False, "file": sys.stdout, "dynamic_ncols": True}
        self.bar = None
        if sys.stdout.isatty():
            total = math.ceil(self.total_kimg * 1000 / images)
            self.bar = tqdm(total=total, initial=step, bar_format="{percentage:3.0f}% {bar} {elapsed}<{remaining}", **shown)

    def step(self, progress: dict) -> None:
        if self.bar is not None:
            self.bar.update(progress["step"] - self.bar.n)

    def scalars(self, progress: dict, values: Scalars) -> None:
        cells = self._cells(progress["kimg"], values)
        if self.bar is None:
            print(
                " | ".join(f"{text} {name}" if name in UNITS else f"{name} {text}" for name, text in cells.items()), flush=True
            )
            return
        if self.rows % HEADER_EVERY == 0:
            self.bar.write("  ".join(f"{name:>{len(text)}}" for name, text in cells.items()))
        self.rows += 1
        self.bar.write("  ".join(f"{text:>{len(name)}}" for name, text in cells.items()))

    def evaluation(self, progress: dict, evaluation: Evaluation) -> None:
        values = ", ".join(f"{record.metric} {record.value:.4f}" for record in evaluation.records)
        (self.bar.write if self.bar is not None else print)(f"evaluation at kimg {progress['kimg']:.1f}: {values}")
        sys.stdout.flush()

    def finish(self) -> None:
        if self.bar is not None:
            self.bar.close()

    def _cells(self, kimg: float, values: Scalars) -> dict[str, str]:
        rate = values["throughput/images_per_second"]
        left = max(0, self.total_kimg - kimg) * 1000 / rate
        eta = time.strftime("%H:%M:%S", time.gmtime(left)) if left < 86400 else f"{left / 86400:.1f} days"
        cells = {
            "kimg": f"{kimg:7.1f}/{self.total_kimg:g}",
            "img/s": f"{rate:6.0f}",
            "data wait": f"{values['throughput/data_wait']:4.0%}",
            "GiB": f"{values['memory/peak_gib']:.2f}",
            "ETA": eta,
            "D": f"{values.get('loss/discriminator', math.nan):.3f}",
            "G": f"{values.get('loss/generator', math.nan):+.3f}",
        }
        right = [f"{values[name]:4.0%}" for name in ("logits/real_accuracy", "logits/fake_accuracy") if name in values]
        cells["D right"] = "/".join(right)
        if "loss/classification" in values:
            cells["class"] = f"{values['loss/classification']:.3f}"
        return cells
