"""What a run tells: on the console, in its folder, to W&B, online, offline and with a server that is gone."""

import io
import json
import math
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import termios
import time
from contextlib import ExitStack, redirect_stdout, suppress
from pathlib import Path

import psutil
import pytest
import torch
from torch import nn

from gandist import preview
from gandist.config import Config, EmaConfig
from gandist.config_file import load_config
from gandist.data import open_dataset
from gandist.distributed import World, join_world
from gandist.ema import ExponentialMovingAverage
from gandist.flops import count_flops
from gandist.models import build_discriminator, build_generator
from gandist.tracking import Meter, Samples
from gandist.tracking.health import INTERVALS, Health
from gandist.tracking.tracker import sample_grid
from tests import wandb_records
from tests.ranks import ROOT, launch, run_command, run_ranks
from tests.wandb_server import KEY, Server

SHORT = {
    "train.kimg": "1.024",
    "train.batch_size": "64",
    "tracking.every_kimg": "0.128",
    "tracking.samples_every_kimg": "0.512",
    "evaluation.every_kimg": "0.512",
    "evaluation.num_images": "100",
    "checkpoint.every_kimg": "0.256",
}


def arguments(run_dir: Path, cache_dir: Path, *special: str, **changes: str) -> list[str]:
    settings = SHORT | {"run_dir": str(run_dir), "data.cache_dir": str(cache_dir)}
    return [*(f"{key}={value}" for key, value in settings.items()), *special]


def offline_parts(run_dir: Path) -> list[wandb_records.Kept]:
    """In the order of their making."""
    found = sorted(run_dir.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_ctime)
    return [wandb_records.read(path) for path in found]


@pytest.fixture(scope="module")
def run_twice(tmp_path_factory, cache_dir: Path) -> Path:
    """One that ended, and then went on for as long again."""
    run_dir = tmp_path_factory.mktemp("offline") / "run"
    options = ["tracking.wandb=offline", "tracking.wandb_tags=[a, b]", "tracking.wandb_group=g"]
    for length in ("train.kimg=0.512", "train.kimg=1.024"):
        result = launch(2, "gandist.train", *arguments(run_dir, cache_dir, *options, length))
        assert result.returncode == 0, result.stderr
    return run_dir


def test_wandb_has_all_there_is(run_twice: Path) -> None:
    first, second = parts = offline_parts(run_twice)
    assert first.id == second.id == (run_twice / "wandb_id").read_text()
    assert first.group == "g"
    assert first.tags == ["a", "b"]
    assert first.config["train"]["batch_size"] == 64
    assert first.axes == {"*": "kimg"}
    assert [part.exit_code for part in parts] == [0, 0]
    logged = {name for part in parts for row in part.rows for name in row}
    logged |= {name.rpartition("/")[0] for name in logged}  # of media, the parts are there
    rows = [json.loads(line) for line in (run_twice / "metrics.jsonl").read_text().splitlines()]
    records = [json.loads(line) for line in (run_twice / "evaluations.jsonl").read_text().splitlines()]
    assert logged >= {name for row in rows for name in row}
    assert logged >= {record["metric"] for record in records if "n_real" in record}
    assert logged >= {"samples/generated", "samples/real", "logits/real_histogram", "logits/fake_histogram", "health/diversity"}
    assert logged >= {"classification/per_class", "classification/confusion_table"}
    groups = {name.partition("/")[0] for name in logged if "/" in name}
    assert groups >= {"loss", "logits", "grad", "lr", "ema", "throughput", "memory", "eval", "classification", "samples"}
    pictures = {path for part in parts for path in part.files if path.endswith(".png")}
    assert sum("samples/generated" in path for path in pictures) == 2
    assert sum("samples/real" in path for path in pictures) == 1


def test_no_point_is_there_twice(run_twice: Path) -> None:
    parts = offline_parts(run_twice)
    steps = [row["step"] for part in parts for row in part.rows if "loss/generator" in row]
    assert steps == sorted(set(steps))
    assert steps[-1] == 16
    numbers = [row["_step"] for part in parts for row in part.rows]
    assert numbers == sorted(set(numbers)), "so that `wandb sync` keeps them"


def test_a_killed_run_repeats_no_points(tmp_path: Path, cache_dir: Path) -> None:
    """It repeats the steps after its last checkpoint, not their rows."""
    run_dir = tmp_path / "run"
    rare = ["tracking.wandb=offline", "checkpoint.every_kimg=100", "train.kimg=1000", "tracking.every_kimg=0.064"]
    options = arguments(run_dir, cache_dir, *rare, "evaluation.metrics=[]", "tracking.samples_every_kimg=0.64")
    process = subprocess.Popen([sys.executable, "-m", "gandist.train", *options], cwd=ROOT, stdout=subprocess.DEVNULL)
    metrics = run_dir / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and len(metrics.read_text().splitlines()) > 40, process)
    process.kill()
    process.wait()
    last = int((run_dir / "wandb_step").read_text())
    ended = launch(1, "gandist.train", *options, f"train.kimg={(last + 10) * 0.064:.3f}")
    assert ended.returncode == 0, ended.stderr
    steps = [row["step"] for part in offline_parts(run_dir) for row in part.rows if "loss/generator" in row]
    assert len(steps) == len(set(steps))
    assert steps[-10:] == list(range(last + 1, last + 11))
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == list(range(1, last + 11))


def test_what_was_kept_offline_can_be_sent(run_twice: Path, monkeypatch) -> None:
    with Server() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        parts = sorted(map(str, run_twice.glob("wandb/offline-run-*")))
        result = run_command(sys.executable, "-m", "wandb", "sync", *parts)
        assert result.returncode == 0, result.stdout + result.stderr
    (sent,) = server.runs.values()
    rows = [sent.rows[number] for number in sorted(sent.rows)]
    assert [row["step"] for row in rows if "loss/generator" in row] == [2, 4, 6, 8, 10, 12, 14, 16]
    assert sent.exit_code == 0


def wait_for(condition, process: subprocess.Popen, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_wandb_online_and_again(tmp_path: Path, cache_dir: Path, monkeypatch) -> None:
    """One dashboard over a resume."""
    run_dir = tmp_path / "run"
    with Server() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        for length in ("train.kimg=0.512", "train.kimg=1.024"):
            online = ["tracking.wandb=online", "tracking.wandb_checkpoints=true", "evaluation.metrics=[]"]
            result = launch(1, "gandist.train", *arguments(run_dir, cache_dir, *online, length))
            assert result.returncode == 0, result.stderr
            assert "warning" not in result.stdout
    (sent,) = server.runs.values()
    assert server.runs.keys() == {(run_dir / "wandb_id").read_text()}
    rows = [sent.rows[number] for number in sorted(sent.rows)]
    assert [row["step"] for row in rows if "loss/generator" in row] == [2, 4, 6, 8, 10, 12, 14, 16]
    assert [row["_step"] for row in rows] == sorted({row["_step"] for row in rows})
    assert any("samples/generated" in name for name in server.uploads)
    sent_checkpoints = [each for each in server.artifacts if each["artifactTypeName"] == "checkpoint"]
    aliases = [{alias["alias"] for alias in each["aliases"]} for each in sent_checkpoints]
    assert aliases == [{"latest", "newest", "step-00000008"}, {"latest", "newest", "step-00000016"}]


def test_a_server_that_goes_away(tmp_path: Path, cache_dir: Path, monkeypatch) -> None:
    """Training goes on, and ends in time; what could not be sent is in the run's folder."""
    run_dir = tmp_path / "run"
    with Server() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        options = arguments(run_dir, cache_dir, "tracking.wandb=online", "evaluation.metrics=[]", "train.kimg=1000")
        process = subprocess.Popen([sys.executable, "-m", "gandist.train", *options], cwd=ROOT)
        metrics = run_dir / "metrics.jsonl"
        wait_for(lambda: metrics.exists() and len(metrics.read_text().splitlines()) > 5, process)
    lines = len(metrics.read_text().splitlines())
    wait_for(lambda: len(metrics.read_text().splitlines()) > lines + 10, process)
    process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    assert process.wait(60) == 0
    assert time.monotonic() - began < 25
    (kept,) = [wandb_records.read(path) for path in run_dir.glob("wandb/run-*/*.wandb")]
    steps = [row["step"] for row in kept.rows if "loss/generator" in row]
    assert steps[-1] >= json.loads(metrics.read_text().splitlines()[-1])["step"] - 2


def test_a_network_that_swallows_everything_delays_nothing(tmp_path: Path, cache_dir: Path, monkeypatch) -> None:
    with socket.socket() as silent, ExitStack() as waiting:
        silent.bind(("127.0.0.1", 0))
        silent.listen(0)
        for _ in range(3):  # until there is no room for more, and nobody is told
            client = waiting.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(silent.getsockname())
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:{1}".format(*silent.getsockname()))
        monkeypatch.setenv("WANDB_MODE", "online")
        seconds = []
        for mode in ("off", "auto"):
            options = arguments(tmp_path / mode, cache_dir, f"tracking.wandb={mode}", "evaluation.metrics=[]")
            began = time.monotonic()
            result = run_command(sys.executable, "-m", "gandist.train", *options)
            seconds.append(time.monotonic() - began)
            assert result.returncode == 0, result.stderr
    assert "cannot be reached; the run is kept offline" in result.stdout
    assert seconds[1] - seconds[0] < 10
    assert offline_parts(tmp_path / "auto")[0].exit_code == 0


def test_wandb_that_breaks_does_not_end_the_run(tmp_path: Path, cache_dir: Path) -> None:
    run_ranks(1, _train_with_a_broken_wandb, tmp_path / "run", cache_dir)
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 8


def _train_with_a_broken_wandb(run_dir: Path, cache_dir: Path) -> None:
    import wandb

    from gandist.train import main

    def broken(self: object, *given: object, **options: object) -> None:
        raise BrokenPipeError("the service is gone")

    wandb.Run.log = broken
    main(arguments(run_dir, cache_dir, "tracking.wandb=offline", "evaluation.metrics=[]"))


def test_wandb_that_cannot_start_is_a_warning(tmp_path: Path, cache_dir: Path) -> None:
    run_ranks(1, _train_with_unusable_wandb, tmp_path, cache_dir)


def _train_with_unusable_wandb(folder: Path, cache_dir: Path) -> None:
    from gandist.train import main

    def train(name: str, mode: str) -> str:
        with redirect_stdout(io.StringIO()) as said:
            main(arguments(folder / name, cache_dir, f"tracking.wandb={mode}", "evaluation.metrics=[]"))
        assert len((folder / name / "metrics.jsonl").read_text().splitlines()) == 8
        return said.getvalue()

    (folder / "file").mkdir()
    (folder / "file" / "wandb").touch()
    assert train("file", "offline").count("warning: W&B failed") == 1
    os.environ["WANDB_BASE_URL"] = "http://[::"
    assert train("url", "auto").count("warning: W&B failed") == 1
    del os.environ["WANDB_BASE_URL"]
    (folder / "id").mkdir()
    (folder / "id" / "wandb_id").touch()
    said = train("id", "offline")
    assert "warning: W&B" not in said, said
    assert offline_parts(folder / "id")[0].id == (folder / "id" / "wandb_id").read_text() != ""


def test_wandb_that_hangs_does_not_hold_up_the_run(tmp_path: Path, cache_dir: Path) -> None:
    """Its process is stopped; neither the end of the run nor that of Python waits for it."""
    options = arguments(tmp_path / "run", cache_dir, "tracking.wandb=offline", "evaluation.metrics=[]", "train.kimg=1000")
    code = f"""
from gandist.tracking import weights_and_biases
from gandist.train import main
weights_and_biases.CALL_PATIENCE = weights_and_biases.FINISH_PATIENCE = 1
main({options})
"""
    command = [sys.executable, "-c", code]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "run" / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.read_text(), process)
    (service,) = [child for child in psutil.Process(process.pid).children() if child.name() == "wandb-core"]
    service.suspend()
    process.send_signal(signal.SIGTERM)
    try:
        out, err = process.communicate(timeout=20)
    finally:
        process.kill()
        with suppress(psutil.NoSuchProcess):
            service.kill()
    assert process.returncode == 0, err
    assert out.count("warning: W&B failed (no answer within 2 s); the run goes on without it") == 1
    assert "stopped by a signal at kimg" in out
    assert "Traceback" not in err


def test_a_terminal_shows_a_table_and_a_bar(tmp_path: Path, cache_dir: Path) -> None:
    main_end, run_end = pty.openpty()
    options = arguments(tmp_path / "r", cache_dir, "tracking.wandb=off", "evaluation.metrics=[]")
    termios.tcsetwinsize(run_end, (40, 120))
    process = subprocess.Popen([sys.executable, "-m", "gandist.train", *options], cwd=ROOT, stdout=run_end, stderr=run_end)
    os.close(run_end)
    shown = b""
    while chunk := _read(main_end):
        shown += chunk
    assert process.wait(30) == 0, shown
    lines = re.split(r"[\r\n]+", shown.decode())
    (head,) = (number for number, line in enumerate(lines) if line.split()[:2] == ["kimg", "img/s"])
    rows = [line for line in lines[head + 1 :] if re.match(r" +\d+\.\d/1\.024 ", line)]
    assert len(rows) == 8
    assert any(re.match(r" *\d+%\W.*<", line) for line in lines), shown
    assert "finished" in shown.decode()


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 1 << 16)
    except OSError:  # its other end was closed
        return b""


def test_the_start_is_told(run_twice: Path) -> None:
    first, second = (json.loads(line) for line in (run_twice / "starts.jsonl").read_text().splitlines())
    assert (first["step"], second["step"], first["world_size"]) == (0, 8, 2)
    assert first["data"]["train"] == sum(first["data"]["class_counts"]) == 1437
    assert first["versions"]["torch"] == torch.__version__
    assert first["networks"]["generator"]["parameters"] == 108_881
    assert first["command"].startswith("torchrun --nproc_per_node=2 -m gandist.train")
    assert (run_twice / "samples" / "real.png").exists()


def test_a_profile(tmp_path: Path, cache_dir: Path) -> None:
    options = arguments(tmp_path, cache_dir, "tracking.wandb=off", "evaluation.metrics=[]", "train.profile=3", "train.kimg=2")
    result = launch(2, "gandist.train", *options)
    assert result.returncode == 0, result.stderr
    summary = (tmp_path / "profile" / "summary.txt").read_text()
    parts = dict(re.findall(r"^(waiting for data|discriminator update|generator update) +([\d.]+)$", summary, re.MULTILINE))
    assert float(parts["discriminator update"]) > 1
    assert float(parts["generator update"]) > 1
    assert "convolution" in summary
    assert (tmp_path / "profile" / "trace.json.gz").stat().st_size > 10_000


def _read_meter(logits: list[torch.Tensor]) -> dict[str, float]:
    with join_world() as world:
        meter = Meter(world)
        for batch in logits:
            mine = batch[world.rank :: world.size]
            meter.update([{"logits/real": mine.mean(), "logits/real_square": mine.square().mean()}])
        return meter.read()


def test_spreads_do_not_depend_on_the_ranks() -> None:
    logits = list(torch.randn(5, 12, generator=torch.Generator().manual_seed(0)).double() + 3)
    for world_size in (1, 2, 3):
        for values in run_ranks(world_size, _read_meter, logits):
            assert values["logits/real"] == pytest.approx(torch.cat(logits).mean().item(), rel=1e-12)
            assert values["logits/real_std"] == pytest.approx(torch.cat(logits).std(correction=0).item(), rel=1e-10)


def test_flops_of_a_known_network() -> None:
    layer = nn.Conv2d(3, 8, 3, padding=1)
    forward = 2 * 8 * 3 * 9 * 16 * 16
    images = torch.zeros(1, 3, 16, 16, requires_grad=True)
    assert count_flops(layer, images) == forward
    network = nn.Sequential(layer, nn.Flatten(), nn.Linear(8 * 256, 1))
    linear = 2 * 8 * 256
    assert count_flops(network, images, backward=True) == 3 * (forward + linear)
    assert layer.weight.grad is None


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_flops_of_groups(kind: type[nn.Module]) -> None:
    """Each output channel sees a quarter of the input's."""
    forward = 2 * 12 * 8 // 4 * 9 * 16 * 16
    network = nn.Sequential(kind(8, 12, 3, padding=1, groups=4, bias=False), nn.Flatten(), nn.Linear(12 * 256, 1))
    images = torch.zeros(1, 8, 16, 16, requires_grad=True)
    assert count_flops(network, images, backward=True) == 3 * (forward + 2 * 12 * 256)


def test_the_distance_of_the_average() -> None:
    source = nn.Linear(3, 2)
    average = ExponentialMovingAverage(source, EmaConfig())
    assert average.distance() == 0
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.mul_(2)
    assert average.distance().item() == pytest.approx(0.5)


def scalars(real: float = 0.7, fake: float = 0.7, top1: float = 0.9, wait: float = 0.0) -> dict[str, float]:
    right = {"logits/real_accuracy": real, "logits/fake_accuracy": fake}
    return right | {"classification/train_top1": top1, "throughput/data_wait": wait}


@pytest.mark.parametrize(
    ("values", "sign"),
    [
        (scalars(real=0.999, fake=0.995), "saturated"),
        (scalars(top1=0.12), "class-head-at-chance"),
        (scalars(wait=0.6), "waiting-for-data"),
    ],
)
def test_what_is_unhealthy_is_warned_of(capsys, values: dict[str, float], sign: str) -> None:
    health = Health(Config())
    late = {"step": 1000, "kimg": 50.0}
    for _ in range(INTERVALS - 1):
        health.scalars(late, values)
    health.scalars(late, scalars())
    assert not capsys.readouterr().out, "not in a row"
    for _ in range(2 * INTERVALS):
        health.scalars(late, values)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("warning: ")
    assert line.endswith(f"docs/health.md#{sign}")
    anchors = re.findall(r"^## (.+)$", (ROOT / "docs" / "health.md").read_text(), re.MULTILINE)
    assert sign in [anchor.lower().replace(" ", "-") for anchor in anchors]


def test_a_collapse_is_warned_of_but_not_at_the_start(capsys) -> None:
    health = Health(Config())
    for kimg in (1.0, 2.0, 3.0):
        health.samples({"step": 1, "kimg": kimg}, Samples(None, diversity=0.1))
    assert not capsys.readouterr().out
    for kimg in (50.0, 60.0, 70.0):
        health.samples({"step": 1, "kimg": kimg}, Samples(None, diversity=0.1))
    (line,) = capsys.readouterr().out.splitlines()
    assert "differ from each other by 10% of what real ones do" in line
    assert line.endswith("docs/health.md#collapse")


def test_the_diversity_of_pictures(cache_dir: Path, world: World) -> None:
    """Of real images it is 1, of one image again and again 0."""
    config = load_config(None, [f"data.cache_dir={cache_dir}"])
    train_set = open_dataset(config.data.train, config.data, world)
    pictures = preview.Preview(config, train_set, train_set, world, torch.float32)
    assert pictures.real.shape == (100, 1, 16, 16)
    discriminator = build_discriminator(config.model, config.data)
    drawn = pictures.draw(lambda latents, labels: pictures.real / 127.5 - 1, discriminator)
    assert drawn.diversity == pytest.approx(1)
    assert drawn.logits["real"] == pytest.approx(drawn.logits["fake"])
    assert discriminator.training
    same = pictures.draw(lambda latents, labels: torch.zeros(len(labels), 1, 16, 16), discriminator)
    assert same.diversity == 0
    generated = pictures.draw(build_generator(config.model, config.data).eval(), discriminator)
    assert math.isfinite(generated.diversity)
    judged = train_set.some(500)
    assert judged[0].shape == (500, 1, 16, 16)
    assert set(judged[1].tolist()) == set(range(10))


def test_pictures_of_translations(cache_dir: Path, world: World) -> None:
    """A row is an image that is not trained on, and then the same as each class; diversity is within a class."""
    given = ["model.family=stargan", "model.conditioning=auxiliary", "model.discriminator_width=4"]
    config = load_config(None, [f"data.cache_dir={cache_dir}", *given])
    train_set = open_dataset(config.data.train, config.data, world)
    test_set = open_dataset(config.data.test, config.data, world, split="test")
    pictures = preview.Preview(config, train_set, test_set, world, torch.float32)
    held_out, labels = test_set.some(len(test_set))
    firsts = torch.stack([held_out[labels == label][0] for label in range(10)])
    assert torch.equal(pictures.sources, firsts)

    def shift(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return torch.stack([image.roll(int(label), 2) for image, label in zip(images, labels, strict=True)])

    drawn = pictures.draw(shift, build_discriminator(config.model, config.data))
    columns = [firsts, *(firsts.roll(label, 3) for label in range(10))]
    assert drawn.grid.tobytes() == sample_grid(torch.stack(columns, 1).flatten(0, 1), 11).tobytes()
    assert drawn.grid.size[0] > drawn.grid.size[1]
    assert len(drawn.logits["fake"]) == 100
    same = pictures.draw(lambda images, labels: torch.zeros_like(images), build_discriminator(config.model, config.data))
    assert same.diversity == 0 < drawn.diversity
