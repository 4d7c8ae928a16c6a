"""Weights & Biases: a dashboard that goes on after a resume, and that never blocks, slows down or ends a run."""

import atexit
import os
import re
import secrets
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from PIL import Image

from gandist import checkpoint
from gandist.atomic import replace_text
from gandist.config import Config
from gandist.evaluation.evaluator import Evaluation
from gandist.launcher import read_job
from gandist.network import is_reachable
from gandist.redaction import redacted
from gandist.tracking.meter import Scalars
from gandist.tracking.tracker import Samples, Tracker, per_class_columns

FINISH_PATIENCE, UPLOAD_PATIENCE = 10, 600  # s for what is still to be sent; with checkpoints
START_PATIENCE, CALL_PATIENCE = 60, 20  # s
CONFUSION = "wandb/confusion_matrix/v1"  # W&B's own chart


class WeightsAndBiases(Tracker):
    """A run under one id, online with a key and a server that answers, else kept in the run folder.

    start: a row about this start; step: where the run begins or goes on
    """

    def __init__(self, config: Config, start: dict[str, Any], step: int):
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # which holds up the exit where the network swallows it
        import wandb

        self._wandb = wandb
        self._config = config
        self._class_names = start["class_names"]
        self._start = step
        self._progress_file = config.run_dir / "wandb_step"
        self._sent = _read_number(self._progress_file)  # the last step that an earlier process has sent
        self._patience = UPLOAD_PATIENCE if config.tracking.wandb_checkpoints else FINISH_PATIENCE
        self._usable = True
        self._guarded(lambda: self._open(start), START_PATIENCE)
        # Called before W&B's own exit handler, which waits for its process without a limit.
        atexit.register(_end_service_after, CALL_PATIENCE, threading.Event())

    def scalars(self, progress: dict, values: Scalars) -> None:
        self._log(progress, lambda: values)

    def evaluation(self, progress: dict, evaluation: Evaluation) -> None:
        def row() -> dict[str, Any]:
            values = {record.metric: record.value for record in evaluation.records}
            values |= {f"{record.metric}_std": record.spread for record in evaluation.records if record.spread is not None}
            where = evaluation.report_group
            if columns := per_class_columns(evaluation):
                rows = [list(row) for row in zip(self._class_names, *columns.values(), strict=True)]
                values[f"{where}/per_class"] = self._wandb.Table(["class", *columns], rows)
            if report := evaluation.report:
                values[f"{where}/confusion"] = self._confusion(report.confusion)
            return values

        self._log(progress, row)

    def real(self, grid: Image.Image) -> None:
        if self._start == 0:
            self._log({"step": 0, "kimg": 0.0}, lambda: {"samples/real": self._wandb.Image(grid)})

    def samples(self, progress: dict, samples: Samples) -> None:
        def row() -> dict[str, Any]:
            histograms = {f"logits/{kind}_histogram": self._wandb.Histogram(each) for kind, each in samples.logits.items()}
            return {"samples/generated": self._wandb.Image(samples.grid)} | histograms

        self._log(progress, row)

    def finish(self) -> None:
        if self._config.tracking.wandb_checkpoints and (saved := checkpoint.complete_steps(self._config.run_dir)):
            best = checkpoint.best(self._config.run_dir, self._config.checkpoint)
            for path, alias in {saved[-1]: "newest", **({best: "best"} if best else {})}.items():
                self._guarded(lambda path=path, alias=alias: self._send_checkpoint(path, alias))
        self._guarded(lambda: self._run.finish(), self._patience + CALL_PATIENCE)

    def _log(self, progress: dict, row: Callable[[], dict[str, Any]]) -> None:
        """A run that was killed repeats the steps after its last checkpoint: their rows were sent, and are not sent twice. At
        the very step where it goes on, there is only what a stop had left undone."""
        step = progress["step"]
        if step <= self._sent and step != self._start:
            return
        self._guarded(lambda: self._run.log(progress | row(), step=max(step, self._sent + 1)))
        with suppress(OSError):
            replace_text(self._progress_file, str(step))

    def _confusion(self, confusion: list[list[int]]) -> Any:
        names = [str(name) for name in self._class_names]
        cells = [
            [label, prediction, count]
            for label, counts in zip(names, confusion, strict=True)
            for prediction, count in zip(names, counts, strict=True)
        ]
        columns = ["Actual", "Predicted", "nPredictions"]
        table = self._wandb.Table(columns, cells)
        return self._wandb.plot_table(CONFUSION, table, {name: name for name in columns}, {"title": "confusion matrix"})

    def _send_checkpoint(self, path: Path, alias: str) -> None:
        artifact = self._wandb.Artifact(f"{self._config.run_dir.name}-{self._run.id}", type="checkpoint")
        artifact.add_dir(str(path))
        self._run.log_artifact(artifact, aliases=[alias, path.name])

    def _mode(self) -> str:
        """Whether to go online is found out without W&B, whose own attempts take long where nothing answers."""
        mode = self._config.tracking.wandb
        if mode == "auto":
            mode = os.environ.get("WANDB_MODE", "auto")
        if mode not in ("auto", "online"):
            return mode
        url = self._wandb.setup().settings.base_url
        if not is_reachable(url):
            print(f"W&B: {url} cannot be reached; the run is kept offline", flush=True)
            return "offline"
        return "online" if mode == "online" or self._wandb.login(prompt=False, verify=False) else "offline"

    def _open(self, start: dict[str, Any]) -> None:
        run_dir, tracking, job = self._config.run_dir, self._config.tracking, read_job()
        options = {
            "project": tracking.wandb_project,
            "name": run_dir.name,
            "group": tracking.wandb_group or (job and job.array and f"array-{job.array}") or None,
            "tags": [*tracking.wandb_tags, *([f"slurm-{job.id}"] if job else [])] or None,
            "id": _run_id(run_dir / "wandb_id"),
            "resume": "allow",
            "dir": run_dir,
            "config": self._config.saved() | {"start": start},
            "settings": self._wandb.Settings(silent=True, console="off", init_timeout=10, finish_timeout=self._patience),
        }
        command, sys.argv = sys.argv, redacted(sys.argv)  # which W&B sends, too
        try:
            self._run = self._wandb.init(mode=self._mode(), **options)
        except self._wandb.Error as error:
            print(f"warning: W&B cannot be used online ({_one_line(error)}); the run is kept offline", flush=True)
            self._let_go()  # the failed attempt still holds the run's id
            self._run = self._wandb.init(mode="offline", **options)
        finally:
            sys.argv = command
        if not self._run.offline:
            self._sent = self._run.starting_step - 1
        elif tracking.wandb != "offline":
            print(f"W&B: offline; `wandb sync {run_dir}/wandb/offline-run-*` sends the run later", flush=True)
        self._run.define_metric("kimg")
        self._run.define_metric("*", step_metric="kimg")

    def _guarded(self, action: Callable[[], Any], patience: float = CALL_PATIENCE) -> None:
        """No failure of W&B may end a run or hold it up: it is told of once, and W&B is left alone from there."""
        if not self._usable:
            return
        try:
            with _time_limit(patience):
                action()
        except Exception as error:
            print(f"warning: W&B failed ({_one_line(error)}); the run goes on without it", flush=True)
            self._usable = False
            self._let_go()

    def _let_go(self) -> None:
        """Ends W&B's process, and what W&B would do at exit."""
        with suppress(Exception, SystemExit), _time_limit(CALL_PATIENCE):
            self._wandb.teardown()


def _run_id(path: Path) -> str:
    """The id in this file, or a new one, which is written there."""
    with suppress(OSError, ValueError):
        if re.fullmatch(r"[^\s/\\#?%:]+", known := path.read_text()):
            return known
    replace_text(path, new := secrets.token_hex(4))
    return new


def _read_number(path: Path) -> int:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return -1


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """A block of calls that fail if they take longer: they wait for W&B's own process, which then is killed."""
    over, deadline = threading.Event(), time.monotonic() + seconds
    _end_service_after(seconds, over)
    try:
        yield
    except Exception as error:
        if time.monotonic() > deadline:
            raise TimeoutError(f"no answer within {seconds:g} s") from error
        raise
    finally:
        over.set()


def _end_service_after(seconds: float, over: threading.Event) -> None:
    """Kills W&B's process after so long, and any that comes after it, until `over` is set."""

    def end() -> None:
        pause = seconds
        while not over.wait(pause):
            _end_service()
            pause = 1.0

    threading.Thread(target=end, daemon=True).start()


def _end_service() -> None:
    for status in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            process, _, rest = status.read_text().partition(" (wandb-core) ")
            if rest and int(rest.split()[1]) == os.getpid():
                os.kill(int(process), signal.SIGKILL)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
