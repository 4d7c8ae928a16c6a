"""Trains: `torchrun --nproc_per_node=N -m gandist.train [--config FILE] [key=value …]`."""

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path

from gandist import checkpoint
from gandist.arguments import add_config
from gandist.atomic import replace_text
from gandist.config import RUN_CONFIG, Config
from gandist.config_file import load_config
from gandist.distributed import World, join_world, run
from gandist.ownership import Claim, owning
from gandist.preemption import ignore_signals
from gandist.streams import lasting_streams
from gandist.tracking import EVALUATIONS, METRICS, SAMPLES
from gandist.trained import load_on_all_ranks
from gandist.trainer import Trainer

OUTCOME = "GANDIST_OUTCOME"  # names a file that is told how training ended, for batch scripts
EXAMPLES = """\
examples:
  torchrun --nproc_per_node=2 -m gandist.train
      trains the built-in digits with two processes into runs/digits
  torchrun --nproc_per_node=8 -m gandist.train --config configs/digits.yaml train.kimg=200 run_dir=runs/long
      a configuration file, with keys of it overridden
  python -m gandist.train train.kimg=200 --print-config
      shows every key and its value, and trains nothing

To resume, run the same command again. To train longer, run it with a larger train.kimg.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="torchrun --nproc_per_node=N -m gandist.train",
        description="Train a class-conditional GAN whose discriminator also classifies.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_config(parser)
    parser.add_argument("--print-config", action="store_true", help="show the resolved configuration and exit")
    parser.add_argument("--fresh", action="store_true", help="start over; what is in run_dir is moved aside, not removed")
    parser.add_argument(
        "--accept",
        type=lambda names: names.split(","),
        default=[],
        metavar="NAME,…",
        help="resume although these are not the checkpoint's: seed, data_fingerprint, model, data, or one key of them",
    )
    options = parser.parse_intermixed_args(arguments)
    config = load_config(options.config, options.overrides)
    if options.print_config:
        print(config.to_yaml(), end="")
        return
    with lasting_streams(), join_world(config.train.timeout_minutes) as world, world.watchdog.watching():
        finished, step = train(config, world, fresh=options.fresh, accepted=options.accept)
        ignore_signals()  # a late one must not end a process that has saved: Python gives up its handlers before it exits
        if world.is_main and OUTCOME in os.environ:
            replace_text(Path(os.environ[OUTCOME]), f"{'finished' if finished else 'stopped'} {step}\n")


def train(config: Config, world: World, *, fresh: bool = False, accepted: Sequence[str] = ()) -> tuple[bool, int]:
    """Starts or resumes the run of `config`, to its end or until a signal stops it. Returns whether it ended, and its step.

    accepted: what may differ from the checkpoint's run, as for `Trainer.resume`
    Raises RunFolderError where another run owns the run folder.
    """
    with owning(config.run_dir, world) as claim:
        trainer = Trainer(config, world, claim)
        _run(trainer, claim, fresh=fresh, accepted=accepted)
        return trainer.finished, trainer.step


def _run(trainer: Trainer, claim: Claim | None, *, fresh: bool, accepted: Sequence[str]) -> None:
    config, world = trainer.config, trainer.world
    run_dir = config.run_dir
    begins = world.broadcast(fresh or not checkpoint.all_steps(run_dir))
    source = load_on_all_ranks(config.train.init_from, world) if begins and config.train.init_from else None
    if fresh:
        with world.together():
            if claim:
                claim.start_over(f"{run_dir}.before-{time.strftime('%Y%m%d-%H%M%S')}")
    resumed = trainer.resume(accepted)
    say = print if world.is_main else lambda text: None
    if source:
        say(trainer.start_from(source))
    if trainer.finished and not trainer.unconfirmed_best():
        say(f"{run_dir} is finished: {trainer.images / 1000:g} kimg; train.kimg={config.train.kimg * 2:g} trains it further")
        return
    with world.together():
        if world.is_main:
            replace_text(run_dir / RUN_CONFIG, config.to_yaml())
    say(trainer.describe() + (f"\nresumed from {resumed}" if resumed else ""))
    trainer.train()
    if not trainer.finished:
        say(f"stopped by a signal at kimg {trainer.images / 1000:g} and saved; the same command goes on from there")
        return
    if trainer.total_skipped:
        say(f"{trainer.total_skipped:,} images could not be used; their neighbours stood in for them (data.on_error=skip)")
    say(
        f"finished: {run_dir}\n"
        f"  pictures     {run_dir / SAMPLES}/step-{trainer.step:08d}.png\n"
        f"  numbers      {run_dir / EVALUATIONS} and {METRICS}\n"
        f"  checkpoints  {run_dir / checkpoint.FOLDER}"
    )


if __name__ == "__main__":
    run(main)
