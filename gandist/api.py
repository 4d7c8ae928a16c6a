"""Runs, from Python: what `python -m gandist.train` and `python -m gandist.evaluate` do on the command line."""

from collections.abc import Iterable
from pathlib import Path

from gandist.config import Config
from gandist.distributed import join_world
from gandist.evaluate import evaluate_run as evaluate_on
from gandist.evaluation.evaluator import Evaluation
from gandist.train import train


def train_run(config: Config, *, fresh: bool = False) -> Path:
    """Trains a run to its end, or resumes it, and returns its folder; under torchrun on all its processes.

    fresh: starts over; what is in `config.run_dir` is moved aside
    Raises GandistError.
    """
    with join_world(config.train.timeout_minutes) as world:
        train(config, world, fresh=fresh)
    return config.run_dir


def evaluate_run(path: Path | str, overrides: Iterable[str] = (), *, step: int | None = None, best: bool = False) -> Evaluation:
    """Measures the newest checkpoint of a run, that of `step`, the best one, or the checkpoint in this folder.

    overrides: of the run's configuration, such as "evaluation.metrics=[accuracy]"
    Raises GandistError.
    """
    with join_world() as world:
        evaluation, _, _ = evaluate_on(Path(path), list(overrides), world, step=step, best=best)
    return evaluation
