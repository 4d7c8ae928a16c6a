"""The command that trains on a data set, for those who have packed or checked it."""

import json
import shlex
from collections.abc import Sequence


def train_command(
    train: Sequence[str],
    test: Sequence[str] = (),
    *,
    resolution: int,
    resized: bool,
    channels: int,
    num_classes: int,
    unlabelled: bool = False,
    label: str = "cls",
) -> str:
    """`python -m gandist.train …` as one types it in a shell.

    train, test: shards as data.train and data.test name them; resized: whether images are to be made squares of that
    resolution; unlabelled: whether some samples have no label
    """
    arguments = [
        f"data.train={_as_yaml(train)}",
        f"data.test={_as_yaml(test) if test else 'null'}",
        f"data.resolution={resolution}",
        f"data.channels={channels}",
        f"data.num_classes={num_classes}",
        f"evaluation.metrics={'[accuracy]' if test and num_classes else '[]'}",
    ]
    if resized:
        arguments.append("data.resize=center-crop")
    if not num_classes:
        arguments.append("model.conditioning=none")
    elif unlabelled:
        arguments.append("data.unlabelled=allow")
    if num_classes and label != "cls":
        arguments.append(f"data.label={label}")
    return shlex.join(["python", "-m", "gandist.train", *arguments])


def _as_yaml(specs: Sequence[str]) -> str:
    plain = len(specs) == 1 and (specs[0][0].isalnum() or specs[0][0] in "/.~$")
    return specs[0] if plain else json.dumps(specs[0] if len(specs) == 1 else list(specs))
