"""Where numbers and pictures of a run go: the console, files in the run folder, Weights & Biases."""

from typing import Any

from gandist.config import Config
from gandist.distributed import World
from gandist.tracking.console import Console
from gandist.tracking.health import Health
from gandist.tracking.meter import Meter, Scalars
from gandist.tracking.run_folder import EVALUATIONS, METRICS, SAMPLES, RunFolder
from gandist.tracking.tracker import Samples, StepReport, Tracker, Trackers, evaluation_table
from gandist.tracking.weights_and_biases import WeightsAndBiases

__all__ = [
    "EVALUATIONS",
    "METRICS",
    "SAMPLES",
    "Meter",
    "Samples",
    "Scalars",
    "StepReport",
    "Tracker",
    "Trackers",
    "evaluation_table",
    "open_trackers",
]


def open_trackers(config: Config, start: dict[str, Any], world: World, *, step: int, evaluated: bool) -> Trackers:
    """All trackers on rank 0, none on the others.

    start: what `environment.describe_start` and `summary.summarize` know of it; step: where the run begins or goes on;
    evaluated: whether the evaluation of this step is over, if there is one
    """
    if not world.is_main:
        return Trackers()
    files = [RunFolder(config.run_dir, step, start, evaluated=evaluated)]
    others = [Console(config, step), Health(config)]
    if config.tracking.wandb != "off":
        others.append(WeightsAndBiases(config, start, step))
    return Trackers(files, others)
