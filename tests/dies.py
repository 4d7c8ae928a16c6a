"""A command for tests: `STEP [key=value …]` trains, but rank 1 is killed after that step, unless it was started anew."""

import os
import signal
import sys

from gandist.distributed import run
from gandist.launcher import read_launch
from gandist.train import main
from gandist.trainer import Trainer

if __name__ == "__main__":
    step, *arguments = sys.argv[1:]
    launch, train_step = read_launch(), Trainer.train_step

    def die_after(trainer: Trainer, *given: object) -> None:
        train_step(trainer, *given)
        if (launch.rank, launch.attempt, trainer.step) == (1, 0, int(step)):
            os.kill(os.getpid(), signal.SIGKILL)

    Trainer.train_step = die_after
    run(lambda: main(arguments))
