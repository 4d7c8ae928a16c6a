"""Evaluates the newest checkpoint of a run: `python -m gandist.evaluate RUN [key=value …]`."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from gandist import checkpoint
from gandist.config import RUN_CONFIG, load_config
from gandist.data import open_dataset
from gandist.distributed import join_world, run
from gandist.errors import CheckpointError
from gandist.evaluation.evaluator import Evaluator
from gandist.models import build_discriminator, build_generator
from gandist.tracking import evaluation_table


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m gandist.evaluate",
        description="Measure the newest checkpoint of a run, alone or with torchrun on several ranks.",
        epilog="example: python -m gandist.evaluate runs/digits evaluation.num_images=5000",
    )
    parser.add_argument("run_dir", type=Path, metavar="RUN", help="the run's folder")
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)  # deepspeed's launcher appends it
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="keys of the run's configuration")
    options = parser.parse_intermixed_args(arguments)
    config = load_config(options.run_dir / RUN_CONFIG, options.overrides)
    with join_world() as world:
        path = checkpoint.newest(options.run_dir, world)
        if path is None:
            raise CheckpointError(f"{options.run_dir} has no checkpoint yet: train it first", on_every_rank=True)
        generator = build_generator(config.model, config.data)
        discriminator = build_discriminator(config.model, config.data)
        state = {"generator_ema": generator.state_dict(), "discriminator": {"network": discriminator.state_dict()}}
        checkpoint.load(path, state, world)

        train_set = open_dataset(config.data.train, config.data, world)
        evaluator = Evaluator(config, train_set, world)
        meta = checkpoint.read_meta(path)
        networks = generator.to(world.device), discriminator.to(world.device)
        evaluation = evaluator(*networks, step=meta["step"], kimg=meta["kimg"])
        if world.is_main:
            print(f"{path}\n{evaluation_table(evaluation, train_set.class_names)}")


if __name__ == "__main__":
    run(main)
