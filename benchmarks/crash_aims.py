"""Where `benchmarks.crash` lets ranks die."""

import os
import random
import shutil
import signal
import threading
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

from benchmarks.crash_run import LONGEST, Run, train
from gandist import checkpoint
from gandist.checkpoint import saving
from gandist.engine import Compilations
from gandist.evaluation.evaluator import Evaluator


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def before(really: Callable, *arguments: Any, **options: Any) -> None:
    die()


def after(really: Callable, *arguments: Any, **options: Any) -> None:
    really(*arguments, **options)
    die()


def soon(really: Callable, *arguments: Any, **options: Any) -> Any:
    threading.Timer(random.uniform(0, 2), die).start()
    return really(*arguments, **options)


def half_written(really: Callable, tensors: dict, file: Path) -> None:
    really(tensors, file)
    os.truncate(file, random.randrange(file.stat().st_size))
    die()


def half_removed(really: Callable, folder: Path, **options: Any) -> None:
    next(Path(folder).iterdir()).unlink()
    die()


def stop_in_evaluation(run: Run) -> bool:
    """So that the next start saves the same step again. Whether it came to that."""
    for rank in run.start(train_and_stop_in_evaluation):
        rank.join(LONGEST)
    saved = checkpoint.complete_steps(run.folder)
    return bool(saved) and checkpoint.read_meta(saved[-1])["evaluation_pending"]


def train_and_stop_in_evaluation(run: Run) -> None:
    def stop(*arguments: Any, really: Callable = Evaluator.__call__, **options: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return really(*arguments, **options)

    with patch.object(Evaluator, "__call__", stop):
        train(run)


def damage_newest(run: Run) -> bool:
    saved = checkpoint.complete_steps(run.folder)
    if len(saved) < 2:
        return False
    file = random.choice([*saved[-1].iterdir()])
    os.truncate(file, random.randrange(file.stat().st_size))
    return True


class Aim(NamedTuple):
    """A function, at a call of which a process dies.

    calls:   at the first, or one of so many
    anyone:  whether it can be any rank; else rank 0, which alone calls it
    prepare: what happens to the run before; returns whether it could
    """

    owner: Any
    function: str
    ways: Sequence[Callable]
    calls: int = 1
    anyone: bool = False
    prepare: Callable[[Run], bool] = lambda run: True


AIMS = {
    "tensors": Aim(saving, "save_file", [before, half_written, after], calls=4, anyone=True),
    "rename": Aim(Path, "rename", [before, after], calls=8),
    "re-save": Aim(Path, "rename", [before, after], calls=3, prepare=stop_in_evaluation),
    "prune": Aim(shutil, "rmtree", [before, half_removed, after], calls=3),
    "quarantine": Aim(Path, "rename", [before, after], prepare=damage_newest),
    "confirm-best": Aim(Evaluator, "measure_checkpoint", [before, soon, after], anyone=True),
    "compile": Aim(Compilations, "of", [before, soon], calls=2, anyone=True),
}


def train_and_die(run: Run, name: str, way: Callable, number: int, victim: int) -> None:
    aim, calls = AIMS[name], count(1)
    really = getattr(aim.owner, aim.function)

    def call(*arguments: Any, **options: Any) -> Any:
        if next(calls) == number:
            return way(really, *arguments, **options)
        return really(*arguments, **options)

    if int(os.environ["RANK"]) == victim:
        with patch.object(aim.owner, aim.function, call):
            train(run)
    else:
        train(run)
