"""Looks after the checkpoints of a run: `python -m gandist.checkpoint ls|verify|prune|consolidate RUN`."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from gandist.arguments import positive
from gandist.checkpoint.folder import (
    DAMAGED,
    FOLDER,
    SUMS,
    UNFINISHED,
    all_steps,
    checkpoint_path,
    complete_steps,
    find_damage,
    read_meta,
    read_sums,
    sha256,
)
from gandist.checkpoint.loading import AVERAGED, read
from gandist.checkpoint.retention import reasons_to_keep, remove
from gandist.checkpoint.tensors import nest
from gandist.config import CheckpointConfig
from gandist.config_file import load_run_config
from gandist.distributed import run
from gandist.errors import CheckpointError
from gandist.redaction import redacted


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    options.do(options)


def ls(options: argparse.Namespace) -> None:
    steps = _steps(options.run_dir)
    reasons = reasons_to_keep(complete_steps(options.run_dir), _config(options))
    rows = [("checkpoint", "kimg", "ranks", "engine", "size", "kept as", "state")]
    for path in steps:
        damage = read_sums(path)[1]
        kept = ", ".join(reasons.get(path, ())) or "-"
        rows.append((path.name, *_made(path), _megabytes(path), kept, damage or "complete"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    for name in _leftovers(options.run_dir):
        print(name)


def verify(options: argparse.Namespace) -> None:
    damaged = 0
    for path in _steps(options.run_dir):
        damage = find_damage(path)
        damaged += damage is not None
        print(f"{path.name}: {f'DAMAGED: {damage}' if damage else f'whole, {_megabytes(path)}'}", flush=True)
    if damaged:
        print(f"{damaged} damaged: a run that is resumed sets them aside and takes the newest that is whole", file=sys.stderr)
        sys.exit(1)


def prune(options: argparse.Namespace) -> None:
    config = _config(options)
    if options.keep is not None:
        config = config.model_copy(update={"keep": options.keep})
    reasons = reasons_to_keep(complete_steps(options.run_dir), config)
    going = [path for path, kept_as in reasons.items() if not kept_as]
    if not going:
        print("nothing to remove")
        return
    if damage := find_damage(newest := list(reasons)[-1]):
        raise CheckpointError(f"nothing is removed, as the newest checkpoint is damaged: {damage}")
    for path in going:
        print(f"{'would remove' if options.dry_run else 'removing'} {path.name}, {_megabytes(path)}", flush=True)
        if not options.dry_run:
            remove(path)
    kept = ", ".join(f"{path.name} ({', '.join(kept_as)})" for path, kept_as in reasons.items() if kept_as)
    print(f"kept: {kept}; {newest.name} is verified")


def consolidate(options: argparse.Namespace) -> None:
    path = _chosen(options)
    if damage := find_damage(path):
        raise CheckpointError(f"{damage}: choose another one with --step")
    state = nest(read(path)) if options.all else nest(read(path, AVERAGED))[AVERAGED]
    kind = "state" if options.all else "generator"
    output = options.output or options.run_dir / f"{kind}-{path.name}.pt"
    partial = output.with_name(output.name + ".tmp")
    torch.save(state, partial)
    meta = read_meta(path)
    described = {
        "checkpoint": path.name,
        "holds": "all" if options.all else AVERAGED,
        "sha256": sha256(partial),
        **redacted(meta),
    }
    output.with_suffix(".json").write_text(json.dumps(described, indent=2) + "\n")
    os.replace(partial, output)
    print(f"{output}\n{output.with_suffix('.json')}")


def _chosen(options: argparse.Namespace) -> Path:
    if options.step is None:
        complete = complete_steps(options.run_dir)
        if not complete:
            raise CheckpointError(f"{options.run_dir} has no complete checkpoint: train it first")
        return complete[-1]
    path = checkpoint_path(options.run_dir, options.step)
    if path not in (steps := _steps(options.run_dir)):
        raise CheckpointError(f"there is no {path}; there are {', '.join(step.name for step in steps)}")
    return path


def _steps(run_dir: Path) -> list[Path]:
    steps = all_steps(run_dir)
    if not steps:
        raise CheckpointError(f"there are no checkpoints in {run_dir / FOLDER}: name the folder of a run")
    return steps


def _made(path: Path) -> tuple[str, str, str]:
    """kimg, world size and engine."""
    try:
        meta = read_meta(path)
        return f"{meta['kimg']:g}", str(meta["world_size"]), meta["config"]["engine"]
    except (ValueError, LookupError, TypeError):
        return "?", "?", "?"


def _megabytes(path: Path) -> str:
    return f"{sum(file.stat().st_size for file in path.iterdir()) / 1e6:,.1f} MB"


def _leftovers(run_dir: Path) -> list[str]:
    """What is no checkpoint, and what may be done with it."""
    kinds = {
        "*" + DAMAGED: "was damaged and set aside: remove it when you have looked at it",
        UNFINISHED + "*": "is being written or removed, or was left so: the next checkpoint clears it away",
    }
    return [f"{path.name}: {what}" for kind, what in kinds.items() for path in sorted((run_dir / FOLDER).glob(kind))]


def _config(options: argparse.Namespace) -> CheckpointConfig:
    return load_run_config(options.run_dir).checkpoint


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m gandist.checkpoint",
        description="Look after the checkpoints of a run.",
        epilog="Each command has its own help: python -m gandist.checkpoint prune --help",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(do: Callable[[argparse.Namespace], None], summary: str, description: str, example: str) -> argparse.ArgumentParser:
        command = commands.add_parser(
            do.__name__,
            help=summary,
            description=description,
            epilog=f"example: python -m gandist.checkpoint {do.__name__} {example}",
        )
        command.add_argument("run_dir", type=Path, metavar="RUN", help="the run's folder")
        command.set_defaults(do=do)
        return command

    add(ls, "what there is", "List the checkpoints of a run, how they were made, and why they are kept.", "runs/digits")
    add(
        verify,
        "read all, and find what is damaged",
        f"Read every file of every checkpoint and compare it with {SUMS}. The exit status is 1 if any is damaged.",
        "runs/digits",
    )
    pruned = add(
        prune,
        "remove what need not be kept",
        "Remove checkpoints by the rules of the run's own configuration: the newest, the best and every so many kimg are kept. "
        "Nothing is removed unless the newest is whole.",
        "runs/digits --keep 1 --dry-run",
    )
    pruned.add_argument("--keep", type=positive, metavar="N", help="the newest so many, instead of checkpoint.keep")
    pruned.add_argument("--dry-run", action="store_true", help="only say what would be removed")
    consolidated = add(
        consolidate,
        "one file, to share",
        "Write the averaged generator of a checkpoint as one file of weights, which torch.load(…, weights_only=True) reads, "
        "and beside it a .json with the configuration and how it was made.",
        "runs/digits --output digits.pt",
    )
    consolidated.add_argument("--step", type=positive, metavar="N", help="of this checkpoint (default: the newest)")
    consolidated.add_argument("--all", action="store_true", help="both networks and their optimizers as well")
    consolidated.add_argument("--output", type=Path, metavar="FILE", help="default: generator-step-….pt in RUN")
    return parser


if __name__ == "__main__":
    run(main)
