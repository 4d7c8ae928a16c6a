"""`python -m tests.null_gpu [--gpus N] [--memory-gib N] COMMAND …` runs a command on GPUs that are not there."""

import argparse
import os

from tests.null_gpu import Unavailable, environment


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.null_gpu", description=__doc__)
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--memory-gib", type=float, default=80)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    if not options.command:
        parser.error("which command?")
    try:
        variables = environment(gpus=options.gpus, memory_gib=options.memory_gib)
    except Unavailable as error:
        parser.error(str(error))
    os.execvpe(options.command[0], options.command, os.environ | variables)


if __name__ == "__main__":
    main()
