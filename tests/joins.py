"""A command for tests: `SIGNAL RANK PLACE [NAME=VALUE …]` joins the world, but that rank stops at a function of torch."""

import os
import signal
import sys
from collections.abc import Sequence

import torch.distributed as dist

from gandist.distributed import join_world, run
from gandist.launcher import read_launch


def main(arguments: Sequence[str]) -> None:
    name, rank, place, *environment = arguments
    os.environ |= {"GANDIST_JOIN_TIMEOUT": "2"} | dict(each.split("=") for each in environment)
    launch = read_launch()
    if str(launch.rank) == rank and not launch.attempt:
        setattr(dist, place, lambda *_, **__: os.kill(os.getpid(), signal.Signals[name]))
    with join_world() as world:
        print(f"rank {world.rank} of {sum(world.gather(1))} joined")


if __name__ == "__main__":
    run(lambda: main(sys.argv[1:]))
