"""The commands as users type them: torchrun, real files, real errors."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
from PIL import Image

from gandist import checkpoint
from tests.ranks import ROOT, launch, run_command, torchrun
from tests.test_checkpoint import flip_a_byte
from tests.web import Web

SHORT = ["train.kimg=1", "checkpoint.every_kimg=0.5", "tracking.every_kimg=0.5", "tracking.wandb=off"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, cache_dir: Path) -> tuple[Path, subprocess.CompletedProcess]:
    """A short run on two ranks, with W&B kept offline."""
    run_dir = tmp_path_factory.mktemp("runs") / "short"
    arguments = [f"run_dir={run_dir}", f"data.cache_dir={cache_dir}", *SHORT[:-1]]
    return run_dir, torchrun(2, "gandist.train", *arguments)


def again(run: tuple[Path, subprocess.CompletedProcess], tmp_path: Path) -> Path:
    """A copy to go on with."""
    return Path(shutil.copytree(run[0], tmp_path / "copy"))


def arguments(run_dir: Path, cache_dir: Path, *overrides: str) -> list[str]:
    return [f"run_dir={run_dir}", f"data.cache_dir={cache_dir}", *SHORT, *overrides]


def test_eight_processes_run_to_the_end(tmp_path: Path, cache_dir: Path) -> None:
    result = launch(8, "gandist.train", *arguments(tmp_path / "r", cache_dir), timeout=280)
    assert result.returncode == 0, result.stderr
    assert f"finished: {tmp_path / 'r'}" in result.stdout


def test_a_run_folder_has_all_one_needs(finished) -> None:
    run_dir, result = finished
    assert result.returncode == 0, result.stderr
    assert "2 rank(s) on cpu, float32" in result.stdout
    assert re.search(r"kimg +1\.0/1 \| +\d+ img/s \| data wait +\d+% \| .* \| ETA", result.stdout)
    assert "Traceback" not in result.stdout + result.stderr
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [8, 16]
    assert {"kimg", "loss/discriminator", "loss/generator", "throughput/images_per_second"} <= rows[0].keys()
    records = [json.loads(line) for line in (run_dir / "evaluations.jsonl").read_text().splitlines()]
    assert {"eval/fd_classifier", "eval/gan_test", "classification/confusion"} <= {record["metric"] for record in records}
    assert sum(map(sum, records[-1]["value"])) == 360
    with Image.open(run_dir / "samples" / "step-00000016.png") as grid:
        assert grid.size == (10 * 66 + 2, 10 * 66 + 2)
    assert (run_dir / "config.yaml").exists()
    assert [path.name for path in sorted((run_dir / "checkpoints").iterdir())] == ["step-00000008", "step-00000016"]
    assert list(run_dir.glob("wandb/offline-run-*/*.wandb"))


def test_offline_wandb_has_the_metrics(finished) -> None:
    run_dir, _ = finished
    (folder,) = run_dir.glob("wandb/offline-run-*")
    result = run_command(str(Path(sys.executable).parent / "wandb"), "leet", "inspect", "--json", str(folder))
    assert result.returncode == 0, result.stderr
    assert (run_dir / "wandb_id").read_text() in result.stdout
    for name in ("loss/discriminator", "eval/fd_classifier", "classification/test_top1", "samples", '"kimg"'):
        assert name in result.stdout


@pytest.mark.parametrize("key", ["0123456789" * 4, "too-short"])
def test_wandb_that_cannot_be_reached_does_no_harm(tmp_path: Path, cache_dir: Path, monkeypatch, key: str) -> None:
    monkeypatch.setenv("WANDB_API_KEY", key)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    run_dir = tmp_path / "r"
    options = arguments(run_dir, cache_dir, "tracking.wandb=auto", "evaluation.metrics=[]")
    result = launch(1, "gandist.train", *options)
    assert result.returncode == 0, result.stderr
    assert "; the run is kept offline" in result.stdout
    assert list(run_dir.glob("wandb/offline-run-*/*.wandb"))


def test_a_finished_run_says_so_and_goes_on_when_asked(finished, tmp_path: Path, cache_dir: Path) -> None:
    run_dir = again(finished, tmp_path)
    result = launch(1, "gandist.train", *arguments(run_dir, cache_dir))
    assert result.returncode == 0, result.stderr
    assert f"{run_dir} is finished: 1.024 kimg; train.kimg=2 trains it further" in result.stdout
    result = launch(4, "gandist.train", *arguments(run_dir, cache_dir, "train.kimg=2"))
    assert result.returncode == 0, result.stderr
    assert "resumed from" in result.stdout
    assert "step-00000016" in result.stdout
    steps = [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert steps == [8, 16, 24, 32]


def test_evaluate(finished, cache_dir: Path) -> None:
    run_dir, trained = finished
    result = launch(1, "gandist.evaluate", str(run_dir), f"data.cache_dir={cache_dir}")
    assert result.returncode == 0, result.stderr
    (reported,) = re.findall(r"eval/fd_classifier (\d+\.\d+)", trained.stdout)
    assert re.search(rf"^eval/fd_classifier +{reported}$", result.stdout, re.MULTILINE), "the checkpoint is what was measured"
    assert len(re.findall(r"^\d( +[\d.]+){4}$", result.stdout, re.MULTILINE)) == 10
    result = launch(1, "gandist.evaluate", str(run_dir.parent))
    assert result.returncode == 1
    assert result.stderr.startswith("error: cannot read the configuration")


def test_fresh_moves_the_old_run_aside(finished, tmp_path: Path, cache_dir: Path) -> None:
    run_dir = again(finished, tmp_path)
    result = launch(1, "gandist.train", "--fresh", *arguments(run_dir, cache_dir, "seed=5"))
    assert result.returncode == 0, result.stderr
    (aside,) = tmp_path.glob("copy.before-*")
    assert (aside / "checkpoints" / "step-00000016").is_dir()
    assert (run_dir / "checkpoints" / "step-00000016").is_dir()


def test_print_config_and_help() -> None:
    result = launch(1, "gandist.train", "train.kimg=7", "--print-config")
    assert result.returncode == 0
    assert "  kimg: 7.0\n" in result.stdout
    result = launch(1, "gandist.train", "--help")
    assert "torchrun --nproc_per_node=8 -m gandist.train --config configs/digits.yaml train.kimg=200" in result.stdout


def assert_one_error(result: subprocess.CompletedProcess, *parts: str) -> None:
    """One readable message from the program (torchrun adds a table of its own), and no traceback of ours."""
    assert result.returncode != 0
    errors = [line for line in result.stderr.splitlines() if line.startswith("error")]
    assert len(errors) == 1, result.stderr
    assert 'gandist/train.py", line' not in result.stderr
    for part in parts:
        assert part in result.stderr


def test_errors_of_users(tmp_path: Path, cache_dir: Path) -> None:
    result = torchrun(2, "gandist.train", "train.batch_sise=32", "modle.family=dcgan")
    assert_one_error(result, "train.batch_sise: unknown key, did you mean 'train.batch_size'?", "did you mean 'model'?")
    shards = "data.train=" + str(cache_dir / "digits-16" / "digits-train-{00..06}.tar")
    own = [shards, "data.test=null", "evaluation.metrics=[]"]
    result = launch(2, "gandist.train", *arguments(tmp_path / "r", cache_dir, *own))
    assert_one_error(result, "digits-train-05.tar", "digits-train-06.tar")
    result = launch(3, "gandist.train", *arguments(tmp_path / "r", cache_dir))
    assert_one_error(result, "train.batch_size=64 cannot be split evenly over 3 rank(s)", "1, 2, 4, 8, 16, 32, 64 ranks")


def test_a_flipped_byte(finished, tmp_path: Path, cache_dir: Path) -> None:
    run_dir = again(finished, tmp_path)
    newest, older = (run_dir / "checkpoints" / f"step-000000{step}" / "rank-00001.safetensors" for step in ("16", "08"))
    flip_a_byte(newest)
    result = launch(2, "gandist.train", *arguments(run_dir, cache_dir))
    assert result.returncode == 0, result.stderr
    assert "does not match SHA256SUMS; set aside as step-00000016.damaged" in result.stdout
    assert "resumed from" in result.stdout
    flip_a_byte(older)
    flip_a_byte(newest)
    result = launch(2, "gandist.train", *arguments(run_dir, cache_dir))
    assert_one_error(result, "every checkpoint in", "is damaged", "--fresh")


def test_another_runs_checkpoint_is_refused(finished, tmp_path: Path, cache_dir: Path) -> None:
    run_dir = again(finished, tmp_path)
    changed = ["seed=1", "model.latent_dim=32", "train.kimg=2"]
    result = launch(2, "gandist.train", *arguments(run_dir, cache_dir, *changed))
    assert_one_error(result, "is of another run", "seed: 0 there, 1 now", "model.latent_dim: 64 there, 32 now")


@pytest.fixture(scope="module")
def imperfect(tmp_path_factory, cache_dir: Path) -> list[str]:
    """The digits with three images that are none in one shard, and 40 labels missing in another: arguments to train on it."""
    folder = tmp_path_factory.mktemp("imperfect")
    for shard, spoil in (("02", spoil_three_images), ("03", drop_forty_labels)):
        spoil(cache_dir / "digits-16" / f"digits-train-{shard}.tar", folder / f"{shard}.tar")
    shutil.copy(cache_dir / "digits-16" / "digits-train-00.tar", folder)
    return [f"data.train={folder}", "data.test=null", "evaluation.metrics=[]", "data.unlabelled=allow", "train.kimg=3"]


def spoil_three_images(source: Path, target: Path) -> None:
    parts = source.read_bytes().split(b"\x89PNG")
    target.write_bytes(b"\x89PNG".join([b"junk".join(parts[:4]), *parts[4:]]))


def drop_forty_labels(source: Path, target: Path) -> None:
    with tarfile.open(source) as tar, tarfile.open(target, "w") as partly:
        for number, member in enumerate(tar):
            if number >= 80 or not member.name.endswith("cls"):
                partly.addfile(member, tar.extractfile(member))


@pytest.mark.parametrize("in_memory", ["0", "1GB"])
def test_a_sample_that_breaks_ends_all_ranks(imperfect, tmp_path: Path, cache_dir: Path, in_memory: str) -> None:
    """In mid-run, or before it begins where the data is decoded at once."""
    options = arguments(tmp_path / "r", cache_dir, *imperfect, f"data.in_memory={in_memory}")
    result = (torchrun if in_memory == "0" else launch)(2, "gandist.train", *options, timeout=90)
    assert result.returncode != 0
    pattern = r"^error( \(rank \d\))?: .*02\.tar: sample 'train-\d+' \(byte \d+\): the image cannot be decoded"
    assert len(re.findall(pattern, result.stderr, re.MULTILINE)) >= 1
    assert (tmp_path / "r").exists() == (in_memory == "0")


def test_partly_labelled_data_trains_and_what_is_skipped_is_told(imperfect, tmp_path: Path, cache_dir: Path) -> None:
    run_dir, skipping = tmp_path / "r", ["data.on_error=skip", "data.max_skip=0.02"]
    result = launch(2, "gandist.train", *arguments(run_dir, cache_dir, *imperfect, *skipping))
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    skipped = int(rows[-1]["data/skipped"])
    assert 9 <= skipped <= 12, "three images, each once in every epoch: 3,008 images are 3.2 epochs"
    named = re.findall(r"^skipped: .*02\.tar: sample 'train-\d+' .*cannot be decoded", result.stdout, re.MULTILINE)
    assert len(named) == min(skipped, 10)
    assert f"{skipped} images could not be used; their neighbours stood in for them" in result.stdout
    assert 0.9 < rows[-1]["classification/labelled"] < 1
    strict = [*skipping, "data.max_skip=0", "train.kimg=30", "data.train=" + imperfect[0].split("=")[1] + "/02.tar"]
    result = launch(2, "gandist.train", *arguments(tmp_path / "s", cache_dir, *imperfect[1:], *strict))
    assert_one_error(result, "images could not be used, more than data.max_skip=0 allows; the last: ")


def test_images_without_labels_train_an_unconditional_gan(tmp_path: Path, cache_dir: Path) -> None:
    unconditional = ["data.train=digits:train", "data.num_classes=0", "model.conditioning=none"]
    options = arguments(tmp_path / "r", cache_dir, *unconditional, "evaluation.metrics=[fd_classifier]")
    result = launch(2, "gandist.train", *options)
    assert result.returncode == 0, result.stderr
    assert re.search(r"eval/fd_classifier \d+\.\d+", result.stdout)
    result = launch(1, "gandist.train", *arguments(tmp_path / "s", cache_dir, "data.num_classes=0"))
    assert_one_error(result, "data.num_classes=0 and model.conditioning=none go together")


def test_images_that_are_not_square(tmp_path: Path) -> None:
    """Packed, checked, trained as the command says, continued, evaluated; and by another size refused."""
    packed = launch(1, "gandist.data.pack", "digits", str(tmp_path / "wide"), "--resolution", "16x32")
    assert packed.returncode == 0, packed.stderr
    (told,) = [line for line in packed.stdout.splitlines() if "gandist.train" in line]
    checked = launch(1, "gandist.data.check", str(tmp_path / "wide"))
    assert told in checked.stdout
    options = [*shlex.split(told)[3:], "model.family=r3gan", "model.generator_width=8", "model.discriminator_width=8"]
    options = arguments(tmp_path / "r", tmp_path / "cache", *options, "augmentation.pipe=ada", "train.deterministic=true")
    for kimg in ("0.5", "1"):
        result = launch(2, "gandist.train", *options, f"train.kimg={kimg}")
        assert result.returncode == 0, result.stderr
    assert "resumed from" in result.stdout
    assert re.search(r"classification/test_top1 +0\.\d+", result.stdout)
    with Image.open(tmp_path / "r" / "samples" / "step-00000016.png") as grid:
        assert grid.size == (10 * 66 + 2, 10 * 34 + 2)
    report = launch(1, "gandist.evaluate", str(tmp_path / "r"), "metrics=[accuracy,fd_random]", "num_images=64")
    assert report.returncode == 0, report.stderr
    assert re.search(r"eval/fd_random +\d+\.\d+", report.stdout)
    result = launch(1, "gandist.train", *options, "data.resolution=[32,16]", "data.resize=stretch", "train.kimg=2")
    assert_one_error(result, "data.resolution: [16, 32] there, [32, 16] now")
    result = launch(1, "gandist.train", *options, f"run_dir={tmp_path / 's'}", "data.resolution=[12,18]", "data.resize=stretch")
    assert_one_error(result, "data.resolution=[12,18]: r3gan makes images of 8, 16, 32, 64, … pixels on one side")


def test_training_from_a_web_server_is_training_from_disk(tmp_path: Path, cache_dir: Path) -> None:
    """Blocks of two shards, read ahead through a cache that two ranks share; and a shard that is not there."""
    block = ["data.shuffle_block=2", "data.in_memory=0", "evaluation.metrics=[accuracy]", "train.kimg=3"]
    with Web(tmp_path / "web") as web:
        for file in (cache_dir / "digits-16").iterdir():
            web.put(f"digits/{file.name}", file.read_bytes())
        remote = [f"data.train={web.url}/digits", f"data.test={web.url}/digits"]
        losses = []
        for name, source in {"disk": [], "web": remote}.items():
            options = arguments(tmp_path / name, tmp_path / f"{name}-cache", *block, *source)
            result = launch(2, "gandist.train", *options)
            assert result.returncode == 0, result.stderr
            rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
            losses.append([(row["loss/discriminator"], row["loss/generator"]) for row in rows])
        assert losses[0] == losses[1]
        shards = [path.name for path in (cache_dir / "digits-16").glob("*.tar")]
        assert [web.asked(f"digits/{name}") for name in shards] == [1] * 7, "both ranks share one download"

        web.will("digits/digits-train-03.tar", then=404)
        fresh = [*block, *remote, "evaluation.metrics=[]", "data.test=null"]
        result = launch(2, "gandist.train", *arguments(tmp_path / "missing", tmp_path / "new-cache", *fresh), timeout=100)
        assert result.returncode != 0
        assert re.search(r"^error.*digits-train-03\.tar: HTTP 404 .*restore it", result.stderr, re.MULTILINE)
        web.will("digits/digits-train-03.tar", then=200)


def test_a_run_that_diverges_stops_and_saves_nothing_broken(tmp_path: Path, cache_dir: Path) -> None:
    extreme = ["optimizer.generator_lr=1e30", "optimizer.discriminator_lr=1e30", "checkpoint.every_kimg=0.064"]
    result = launch(2, "gandist.train", *arguments(tmp_path / "r", cache_dir, *extreme))
    assert_one_error(result, "not finite at step", "lower the learning rates")
    for saved in checkpoint.complete_steps(tmp_path / "r"):
        assert all(tensor.isfinite().all() for tensor in checkpoint.read(saved).values()), saved


def test_rare_updates_that_are_not_finite_can_be_left_out(tmp_path: Path, cache_dir: Path) -> None:
    """In float16 the first ones overflow, until the loss scale is found; the run learns and is saved all the same."""
    result = launch(2, "gandist.train", *arguments(tmp_path / "r", cache_dir, "train.precision=float16", "train.kimg=2"))
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["skipped/generator_updates"] > 0
    assert rows[-1]["skipped/generator_updates"] == 0
    assert rows[-1]["loss/classification"] < rows[0]["loss/classification"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_stops(tmp_path: Path, cache_dir: Path, number: signal.Signals) -> None:
    run_dir = tmp_path / "r"
    workers = ["data.in_memory=0", "data.num_workers=1"]
    options = arguments(run_dir, cache_dir, "train.kimg=1000", "checkpoint.every_kimg=1000", *workers)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "NPROC_PER_NODE": "2", "VIRTUAL_ENV": sys.prefix, "PATH": path}
    process = subprocess.Popen(
        ["bash", "launch/torchrun.sh", *options],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 60
    while not (run_dir / "metrics.jsonl").exists():
        assert time.monotonic() < deadline
        time.sleep(0.2)
    os.killpg(process.pid, number)  # as Ctrl-C and schedulers do: launcher, ranks and decoding workers alike
    output, _ = process.communicate(timeout=60)
    assert re.match("stopped by a signal at kimg .* and saved", output.splitlines()[-1]), output
    (saved,) = (run_dir / "checkpoints").iterdir()
    images = json.loads((saved / "meta.json").read_text())["images"]
    result = launch(2, "gandist.train", *arguments(run_dir, cache_dir, f"train.kimg={images / 1000 + 0.1}"))
    assert f"resumed from {saved}" in result.stdout
    assert result.returncode == 0
