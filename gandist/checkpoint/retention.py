"""Which checkpoints are kept, and why; the others are removed."""

import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gandist.checkpoint.folder import UNFINISHED, complete_steps, read_meta
from gandist.config import MEASURES, CheckpointConfig


def reasons_to_keep(checkpoints: Sequence[Path], config: CheckpointConfig) -> dict[Path, list[str]]:
    """Of each, oldest first: the reasons to keep it; without one it may go.

    All that is asked for stands in the `meta.json` of each, so that nothing has to be remembered between two runs.
    """
    metas = {path: _meta_or_nothing(path) for path in checkpoints}
    reasons: dict[Path, list[str]] = {path: [] for path in checkpoints}
    for path in checkpoints[-config.keep :]:
        reasons[path].append("newest")
    if path := _best(metas, config):
        reasons[path].append(f"best {config.best} {metas[path]['metrics'][config.best]:.4f}")
    if config.keep_every_kimg:
        interval = round(config.keep_every_kimg * 1000)
        reached = {0}
        for path, meta in metas.items():
            multiple = meta.get("images", 0) // interval
            if multiple not in reached:  # the first at or after it, which stays the first for as long as it is kept
                reasons[path].append(f"every {config.keep_every_kimg:g} kimg")
            reached.add(multiple)
    return reasons


def best(run_dir: Path, config: CheckpointConfig) -> Path | None:
    """The checkpoint with the best value of `checkpoint.best`, if any has one."""
    return _best({path: _meta_or_nothing(path) for path in complete_steps(run_dir)}, config)


def prune(run_dir: Path, config: CheckpointConfig) -> None:
    """Removes the checkpoints that there is no reason to keep. What cannot be removed is left, with a warning."""
    for path, reasons in reasons_to_keep(complete_steps(run_dir), config).items():
        if not reasons:
            remove(path)


def remove(path: Path) -> None:
    """Takes a folder away under another name first: half of a checkpoint never has a checkpoint's name."""
    try:
        if not path.name.startswith(UNFINISHED):
            path = path.rename(path.with_name(f"{UNFINISHED}removed-{path.name}"))
        shutil.rmtree(path)
    except OSError as error:
        print(f"warning: {error.filename or path} cannot be removed: {error.strerror}", flush=True)


def _best(metas: dict[Path, dict[str, Any]], config: CheckpointConfig) -> Path | None:
    if config.best is None:
        return None
    values = {path: meta.get("metrics", {}).get(config.best, math.nan) for path, meta in metas.items()}
    values = {path: value for path, value in values.items() if math.isfinite(value)}
    better = min if MEASURES[config.best].better == "lower" else max
    return better(values, key=values.__getitem__, default=None)


def _meta_or_nothing(path: Path) -> dict[str, Any]:
    """A damaged one is found when it is to be loaded."""
    try:
        meta = read_meta(path)
    except (OSError, ValueError):
        return {}
    return meta if isinstance(meta, dict) else {}
