"""Whether a checkpoint is of the run that would go on from it."""

from collections.abc import Sequence
from pathlib import Path

from gandist.config import Config, DataConfig, ModelConfig
from gandist.distributed import World
from gandist.errors import CheckpointError, ConfigError

DATA_KEYS = (
    "resolution",
    "resize",
    "channels",
    "num_classes",
    "label",
    "unlabelled",
    "labelled",
    "labelled_seed",
    "on_error",
    "shuffle_block",
    "lanes",
)


def refuse_other_run(
    path: Path,
    meta: dict,
    config: Config,
    fingerprint: dict[str, str | None],
    world: World,
    accepted: Sequence[str] = (),
) -> None:
    """Raises CheckpointError, with what differs, where networks, data or seed are others than those of the checkpoint.

    fingerprint: of the training set
    accepted: what of these may differ, by the names in that error or by what these begin with, such as `data`
    """
    saved, now = meta["config"], config.model_dump(mode="json")
    # They may be older than some keys.
    saved_model = ModelConfig().model_dump(mode="json") | saved["model"]
    saved_data = DataConfig().model_dump(mode="json") | saved["data"]
    known = {key: (meta["data_fingerprint"][key], value) for key, value in fingerprint.items()}
    compared = {f"data_fingerprint.{key}": pair for key, pair in known.items() if None not in pair}
    compared |= {"seed": (saved["seed"], now["seed"])}
    compared |= {f"model.{key}": (saved_model[key], value) for key, value in now["model"].items()}
    compared |= {f"data.{key}": (saved_data[key], now["data"][key]) for key in DATA_KEYS}
    groups = {key: key.partition(".")[0] for key in compared}
    if unknown := {*accepted} - groups.keys() - {*groups.values()}:
        names = ", ".join(dict.fromkeys(groups.values()))
        raise ConfigError(f"--accept: there is no {min(unknown)!r} to accept; there are {names}, and the keys in these")
    changed = {key: f"{key}: {old} there, {new} now" for key, (old, new) in compared.items() if old != new}
    refused = [key for key in changed if not {key, groups[key]} & {*accepted}]
    if refused:
        raise CheckpointError(
            f"{path} is of another run:\n" + "".join(f"  {changed[key]}\n" for key in refused) + "go back to its settings, "
            f"choose another run_dir, start over with --fresh, or go on all the same with --accept {','.join(changed)}",
            on_every_rank=True,
        )
    if changed and world.is_main:
        print("\n".join(f"accepted: {change}" for change in changed.values()), flush=True)
