"""What each family of networks, and each conditioning, learns of the built-in digits in a short run:
`python -m benchmarks.methods [NAME …]` trains them one after the other and prints a table.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

COMMON = ["train.kimg=60", "evaluation.every_kimg=60", "checkpoint.every_kimg=60", "tracking.wandb=off"]
SLOWER = ["optimizer.generator_lr=1e-3", "optimizer.discriminator_lr=3e-4"]
AT_32 = ["data.resolution=32"]
METHODS = {  # name → what it has other than the default, dcgan with projection and the hinge loss
    "mlp, projection": [
        "model.family=mlp",
        "model.generator_width=256",
        "model.discriminator_width=256",
        "loss.adversarial=non_saturating",
        *SLOWER,
    ],
    "dcgan, projection": [],
    "dcgan, auxiliary": ["model.conditioning=auxiliary"],
    "dcgan, twin_auxiliary": ["model.conditioning=twin_auxiliary"],
    "dcgan, adc": ["model.conditioning=adc"],
    "dcgan, contrastive": ["model.conditioning=contrastive"],
    "dcgan, d2d_ce": ["model.conditioning=d2d_ce"],
    "dcgan, multi_hinge": ["model.conditioning=multi_hinge"],
    "resnet, projection": [*AT_32, "model.family=resnet", "model.generator_width=24", "model.discriminator_width=24"],
    "biggan, projection": [*AT_32, *SLOWER, "model.family=biggan", "model.generator_width=6", "model.discriminator_width=6"],
    "biggan_deep, projection": [
        *AT_32,
        *SLOWER,
        "model.family=biggan_deep",
        "model.generator_width=16",
        "model.discriminator_width=16",
    ],
    "stylegan2, projection": [
        "model.family=stylegan2",
        "model.generator_width=16",
        "model.discriminator_width=16",
        "model.max_width=64",
        "model.mapping_layers=2",
        "loss.adversarial=non_saturating",
        "loss.r1_gamma=0.1",
        "loss.penalty_every=16",
        "optimizer.generator_lr=2.5e-3",
        "optimizer.discriminator_lr=2.5e-3",
        "optimizer.betas=[0.0, 0.99]",
    ],
    "r3gan, projection": [
        "model.family=r3gan",
        "model.widths=[64, 64, 32]",
        "loss.adversarial=relativistic",
        "loss.r1_gamma=0.1",
        "loss.r2_gamma=0.1",
        "optimizer.generator_lr=5e-4",
        "optimizer.discriminator_lr=5e-4",
        "optimizer.betas=[0.0, 0.99]",
    ],
}
COLUMNS = {
    "class head": "classification/test_top1",
    "GAN-test": "eval/gan_test",
    "`fd_classifier`": "eval/fd_classifier",
    "diversity": "health/diversity",
}


def train(overrides: Sequence[str], run_dir: Path, ranks: int) -> tuple[dict[str, float], float]:
    """The last values that the run logged and measured, and the CPU seconds of all its processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    command = [sys.executable, *launcher, "-m", "gandist.train"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([*command, *COMMON, *overrides, f"run_dir={run_dir}"], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    logged, measured = (
        [json.loads(line) for line in (run_dir / file).read_text().splitlines()]
        for file in ("metrics.jsonl", "evaluations.jsonl")
    )
    return logged[-1] | {record["metric"]: record["value"] for record in measured if "value" in record}, seconds


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.methods", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default: all of {'; '.join(METHODS)}")
    parser.add_argument("--ranks", type=int, default=2, help="processes of a run (default: %(default)s)")
    parser.add_argument("--runs", type=Path, help="where to keep the runs; default: nowhere")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for all of them")
    options = parser.parse_intermixed_args(arguments)
    overrides = [name for name in options.names if "=" in name]
    names = [name for name in options.names if "=" not in name] or list(METHODS)
    if unknown := [name for name in names if name not in METHODS]:
        parser.error(f"there is no {unknown[0]!r}: {'; '.join(METHODS)}")
    print("| | " + " | ".join(COLUMNS) + " | CPU-seconds |\n|" + " --- |" * (len(COLUMNS) + 2), flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        for name in names:
            run_dir = (options.runs or Path(temporary)) / name.replace(", ", "-")
            values, seconds = train([*METHODS[name], *overrides], run_dir, options.ranks)
            cells = [f"{values[metric]:.4g}" for metric in COLUMNS.values()]
            print(f"| {name} | " + " | ".join(cells) + f" | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
