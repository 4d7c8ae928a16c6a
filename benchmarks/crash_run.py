"""The runs that `benchmarks.crash` kills."""

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gandist import checkpoint
from gandist.checkpoint.folder import find_damage
from gandist.data.pack import pack_digits
from gandist.evaluation.evaluator import BEST
from tests.ranks import run_module, start_ranks
from tests.test_promises import SETTINGS

IMAGES = 16  # of a rank in a step
SAVED, EVALUATED = 4, 10  # steps
LONGEST = 300.0  # s of a start
BROKEN = 3  # images of each shard in `broken`
KINDS = {
    "plain": [],
    "styles": [
        *SETTINGS["styles"],
        "loss.r1_gamma={start: 1, end: 0.5, kimg: 1}",
        "checkpoint.asynchronous=true",
        "data.on_error=skip",
        "data.max_skip=0.1",
        "evaluation.metrics=[accuracy,fd_random]",
        "checkpoint.best=eval/fd_random",
    ],
    "zero-2": ["engine=deepspeed", "zero_stage=2", "loss.r1_gamma=1"],
    "compiled": ["model.family=mlp", "train.compile=true"],
}
Poll = Callable[[], int | None]  # of a process, as of subprocess


@dataclass(frozen=True)
class Run:
    """A run of one of KINDS, which begins or goes on at each start. Its data and its cache are beside its folder."""

    folder: Path
    kind: str
    ranks: int
    steps: int
    more: tuple[str, ...] = ()  # settings
    suffix: str = ".log"

    @property
    def settings(self) -> list[str]:
        step = self.ranks * IMAGES / 1000  # kimg
        broken = self.folder.parent / "broken"
        data = [f"data.train={broken}/digits-train-*.tar", f"data.test={broken}/digits-test-*.tar"]
        return [
            f"run_dir={self.folder}",
            f"data.cache_dir={self.folder.parent / 'cache'}",
            "data.in_memory=0",
            "data.num_workers=1",
            "model.generator_width=2",
            "model.discriminator_width=2",
            f"train.batch_size={self.ranks * IMAGES}",
            f"train.kimg={self.steps * step}",
            f"checkpoint.every_kimg={SAVED * step}",
            "checkpoint.best=eval/fd_classifier",
            f"tracking.every_kimg={step}",
            f"tracking.samples_every_kimg={EVALUATED * step}",
            "tracking.wandb=off",
            f"evaluation.every_kimg={EVALUATED * step}",
            "evaluation.metrics=[accuracy,fd_classifier]",
            "evaluation.num_images=500",
            "evaluation.batch_size=64",
            *(data if "data.on_error=skip" in KINDS[self.kind] else []),
            *KINDS[self.kind],
            *self.more,
        ]

    @property
    def log(self) -> Path:
        return self.folder.with_suffix(self.suffix)

    def rows(self, file: str) -> list[dict]:
        """The lines that are whole."""
        path = self.folder / file
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def last_step(self) -> int:
        return max((row["step"] for row in self.rows("metrics.jsonl")), default=0)

    def steps_lost(self) -> int:
        saved = checkpoint.complete_steps(self.folder)
        newest = int(saved[-1].name.removeprefix("step-")) if saved else 0
        return max(0, self.last_step() - newest)

    def start(self, work: Callable[..., None] | None = None, *arguments: Any) -> list[Any]:
        """Its ranks; work: what they do around the training, and with which arguments"""
        return start_ranks(self.ranks, lambda rank: (work or train, self, *arguments))

    def to_the_end(self) -> None:
        ranks = self.start()
        for rank in ranks:
            rank.join(LONGEST)
        assert [rank.exitcode for rank in ranks] == [0] * self.ranks, self.complaint("could not be recovered")

    def check(self, expected: checkpoint.Tensors) -> None:
        """Whether it ended as it would have if nothing had happened."""
        assert equal(weights(self.folder), expected), self.complaint("ended with other weights")
        self.check_files()
        assert [row["step"] for row in self.rows("metrics.jsonl")][-1] == self.steps
        measured = [
            (row["metric"], row["step"]) for row in self.rows("evaluations.jsonl") if isinstance(row.get("value"), float)
        ]
        assert len(measured) == len({*measured}), self.complaint("has a value twice")
        assert any(metric.startswith(f"{BEST}/") for metric, _ in measured), self.complaint("did not measure its best again")

    def check_files(self) -> None:
        steps = [row["step"] for row in self.rows("metrics.jsonl")]
        assert steps == [*range(1, steps[-1] + 1)], self.complaint(f"has these steps in metrics.jsonl: {steps}")
        damage = [find_damage(path) for path in checkpoint.all_steps(self.folder)]
        assert damage == [None] * len(damage), self.complaint(f"has damaged checkpoints: {damage}")

    def complaint(self, what: str) -> str:
        return "\n".join([f"{self.folder.name} {what}; it said:", *self.log.read_text().splitlines()[-30:]])


def train(run: Run) -> None:
    run_module(run.log, run.log, "gandist.train", tuple(run.settings))


def until(run: Run, step: int, poll: Poll) -> None:
    while run.last_step() < step and poll() is None:
        time.sleep(0.02)


def weights(run_dir: Path) -> checkpoint.Tensors:
    return checkpoint.read(checkpoint.complete_steps(run_dir)[-1])


def equal(a: checkpoint.Tensors, b: checkpoint.Tensors) -> bool:
    return a.keys() == b.keys() and all(torch.equal(tensor, b[path]) for path, tensor in a.items())


def prepare_data(folder: Path) -> None:
    """The digits, and the same with broken images to train with."""
    digits = folder / "cache" / "digits-16"
    pack_digits(digits)
    shutil.copytree(digits, folder / "broken", ignore=shutil.ignore_patterns("*.json"))
    for shard in (folder / "broken").glob("*-train-*.tar"):
        shard.write_bytes(shard.read_bytes().replace(b"\x89PNG", b"\0PNG", BROKEN))
