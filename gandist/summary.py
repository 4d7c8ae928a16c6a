"""What a run is made of: data, networks, length."""

import math
from typing import Any

from torch import nn

from gandist.config import Config
from gandist.data import Dataset
from gandist.distributed import World


def summarize(
    train_set: Dataset, test_set: Dataset | None, networks: dict[str, nn.Module], flops: dict[str, int]
) -> dict[str, Any]:
    """For `starts.jsonl`; flops: as `count_run` gives them, or none."""
    described = {name: {"parameters": sum(p.numel() for p in network.parameters())} for name, network in networks.items()}
    for name in described.keys() & flops.keys():
        described[name]["flops"] = flops[name]
    counts = {"train": len(train_set), "test": len(test_set) if test_set else 0}
    return {
        "class_names": train_set.class_names,
        "data": counts | {"class_counts": train_set.class_counts.tolist()},
        "networks": described,
        "flops_per_image": flops.get("update"),
    }


def describe(config: Config, world: World, summary: dict[str, Any], manner: str, *, shards: int) -> str:
    """The same for the console; manner: how numbers are computed; shards: of the training set."""
    data, flops = summary["data"], summary["flops_per_image"]
    networks = (
        f"{name} {each['parameters']:,} parameters" + (f" and {each['flops'] / 1e6:,.1f} MFLOP an image" if flops else "")
        for name, each in summary["networks"].items()
    )
    steps = math.ceil(config.train.kimg * 1000 / config.train.batch_size / config.train.discriminator_updates)
    lines = [
        f"{config.run_dir}: {world.size} rank(s) on {world.device.type}, {manner}"
        + (f", DeepSpeed with ZeRO stage {config.stage}" if config.engine == "deepspeed" else ""),
        f"data: {data['train']:,} images of {config.data.num_classes or 'no'} classes in {shards} shards"
        + (f"; {data['test']:,} held out" if data["test"] else ""),
        f"networks: {config.model.family}, {', '.join(networks)}",
        f"plan: {config.train.kimg:g} kimg in {steps:,} steps of {config.train.batch_size} images"
        + (f", {flops * config.train.kimg / 1e9:,.3g} TFLOP" if flops else ""),
    ]
    return "\n".join(lines)
