"""Whole runs on GPUs: train, log, draw, evaluate, save, stop, resume; and what was trained there is used elsewhere."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch

import gandist
from gandist import checkpoint
from tests.gpu import needs_two
from tests.ranks import ROOT, end_ranks, launch, run_module, start_ranks
from tests.test_promises import rows

STEP = 0.064  # kimg
NO_GPU = {"NULL_GPU_COUNT": "0", "CUDA_VISIBLE_DEVICES": ""}


def options(run_dir: Path, cache_dir: Path, steps: int, *overrides: str) -> list[str]:
    return [
        f"run_dir={run_dir}",
        f"data.cache_dir={cache_dir}",
        f"train.kimg={steps * STEP}",
        f"tracking.every_kimg={STEP}",
        f"tracking.samples_every_kimg={4 * STEP}",
        f"evaluation.every_kimg={4 * STEP}",
        f"checkpoint.every_kimg={2 * STEP}",
        "evaluation.num_images=300",
        "tracking.wandb=off",
        *overrides,
    ]


def train(ranks: int, *arguments: str) -> str:
    result = launch(ranks, "gandist.train", *arguments, timeout=280)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


RUNS = {
    "eager": (1, ["train.compile=false"]),
    "in the background": (1, ["train.compile=false", "checkpoint.asynchronous=true"]),
    "two ranks": (2, ["train.compile=false", "train.accumulation=2"]),
    "two ranks, compiled": (2, ["train.compile=true", "model.family=mlp", "loss.r1_gamma=1", "loss.penalty_every=2"]),
    **{f"ZeRO-{stage}": (2, ["train.compile=false", "engine=deepspeed", f"zero_stage={stage}"]) for stage in (0, 1, 2)},
    "translation": (
        1,
        [f"--config={ROOT / 'configs/digits-translate.yaml'}", "train.compile=false", "train.batch_size=64"],
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_trains_and_resumes(tmp_path: Path, cache_dir: Path, name: str) -> None:
    ranks, overrides = RUNS[name]
    if torch.cuda.device_count() < ranks:
        pytest.skip("there are fewer GPUs")
    said = train(ranks, *options(tmp_path, cache_dir, 4, *overrides))
    compiled = "train.compile=true" in overrides
    assert f"{ranks} rank(s) on cuda, bfloat16{', compiled' if compiled else ''}" in said
    assert said.count("\ncompiling ") == (3 if compiled else 0), "D with and without its penalty, and G"
    said = train(ranks, *options(tmp_path, cache_dir, 8, *overrides))
    assert "resumed from" in said
    assert [row["step"] for row in rows(tmp_path, "metrics.jsonl")] == list(range(1, 9))
    assert {row["step"] for row in rows(tmp_path, "evaluations.jsonl")} == {4, 8}
    assert len(list((tmp_path / "samples").glob("step-*.png"))) == 2
    assert [path.name for path in checkpoint.complete_steps(tmp_path)] == ["step-00000006", "step-00000008"]


@needs_two
def test_a_signal_saves(tmp_path: Path, cache_dir: Path) -> None:
    arguments = options(tmp_path / "run", cache_dir, 10_000, "train.compile=false", "evaluation.metrics=[]")
    out, err = tmp_path / "out", tmp_path / "err"
    ranks = start_ranks(2, lambda rank: (run_module, out, err, "gandist.train", arguments))
    metrics, deadline = tmp_path / "run/metrics.jsonl", time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") >= 3) and time.monotonic() < deadline:
        time.sleep(0.1)
    for rank in ranks:
        os.kill(rank.pid, signal.SIGTERM)
    for rank in ranks:
        rank.join(60)
    assert not end_ranks(ranks)
    assert [rank.exitcode for rank in ranks] == [0, 0], err.read_text()
    assert "stopped by a signal" in out.read_text()
    stopped_at = rows(tmp_path / "run", "metrics.jsonl")[-1]["step"]
    assert checkpoint.complete_steps(tmp_path / "run")[-1].name == f"step-{stopped_at:08d}"


def test_what_a_gpu_trained_is_used_on_a_cpu_and_the_other_way_round(
    tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir, translator = tmp_path / "run", tmp_path / "translator"
    few = ["train.compile=false", "evaluation.metrics=[]", "model.discriminator_norm=none"]  # σ would be 0 on a null GPU
    train(1, *options(run_dir, cache_dir, 2, *few))
    train(1, *options(translator, cache_dir, 2, *few[:-1], f"--config={ROOT / 'configs/digits-translate.yaml'}"))
    saved = checkpoint.nest(checkpoint.read(checkpoint.complete_steps(run_dir)[-1]))
    loaded = gandist.load(run_dir, device="cuda")
    for name, tensor in loaded.generator.state_dict().items():
        assert tensor.is_cuda
        assert torch.equal(tensor.cpu(), saved["generator_ema"][name]), name
    for place in ("cpu", "cuda"):
        if place == "cpu":
            for variable in NO_GPU:
                monkeypatch.setenv(variable, NO_GPU[variable])
        else:
            monkeypatch.undo()
        made = tmp_path / place
        commands = [
            ("gandist.generate", run_dir, made / "images", "--images", "20"),
            ("gandist.classify", run_dir, made / "images", "--output", made / "classes.csv"),
            ("gandist.translate", translator, made / "images", "--to", "3", "--output", made / "translated"),
            ("gandist.export", run_dir, made / "exported"),
        ]
        for module, *arguments in commands:
            result = launch(1, module, *map(str, arguments))
            assert result.returncode == 0, result.stderr
        assert len((made / "classes.csv").read_text().splitlines()) == 21
        # What a GPU has trained goes on here, and that goes on there.
        said = train(1, *options(run_dir, cache_dir, 4 if place == "cpu" else 6, *few))
        assert f"1 rank(s) on {place}" in said
        assert "resumed from" in said
