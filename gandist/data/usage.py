"""The command that trains on a data set, for those who have packed or checked it."""

import json
import shlex
from collections.abc import Sequence

from gandist.resolution import Resolution, as_yaml, find_pyramid


def train_command(
    train: Sequence[str],
    test: Sequence[str] = (),
    *,
    resolution: Resolution | None,
    square: int,
    channels: int,
    num_classes: int,
    unlabelled: bool = False,
    label: str = "cls",
) -> str:
    """`python -m gandist.train …` as one types it in a shell.

    train, test: shards as data.train and data.test name them
    resolution:  of all images; None where they differ
    square:      pixels of the squares to make of them where they differ, or are of a size that no convolutional network makes
    unlabelled:  whether some samples have no label
    """
    usable = isinstance(resolution, int) or (resolution is not None and find_pyramid(resolution) is not None)
    arguments = [
        f"data.train={_as_yaml(train)}",
        f"data.test={_as_yaml(test) if test else 'null'}",
        f"data.resolution={as_yaml(resolution) if usable else square}",
        f"data.channels={channels}",
        f"data.num_classes={num_classes}",
        f"evaluation.metrics={'[accuracy]' if test and num_classes else '[]'}",
    ]
    if not usable:
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
