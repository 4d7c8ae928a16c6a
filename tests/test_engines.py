"""DeepSpeed, at every stage of ZeRO, against DDP: the same steps, checkpoints, guard and console."""

import math
import os
import re
import shutil
import signal
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from gandist import checkpoint
from gandist.config import Config
from gandist.config_file import load_config
from gandist.distributed import World, join_world
from gandist.engine import build_player, choose_precision
from gandist.engine.ddp import DDPPlayer
from gandist.errors import ConfigError, TrainingError
from gandist.models import build_discriminator
from gandist.objective import DiscriminatorObjective
from gandist.train import train
from tests.games import discriminator_inputs
from tests.ranks import end_ranks, launch, run_command, run_module, run_ranks, start_ranks
from tests.test_player import HostWaits
from tests.test_promises import final_state, rows

BATCH_SIZE = 16
UPDATES = 2  # of the discriminator, a step
STEPS = 6
KIMG_PER_STEP = BATCH_SIZE * UPDATES / 1000
TINY = [
    f"train.batch_size={BATCH_SIZE}",
    f"train.discriminator_updates={UPDATES}",
    f"train.kimg={STEPS * KIMG_PER_STEP}",
    "train.accumulation=2",
    "seed=1",  # with others, such as 2, rounding switches a unit that is near 0, and Adam makes a whole step of it
    "train.precision=float32",
    "loss.r1_gamma=1.0",
    "optimizer.eps=1e-5",  # else Adam makes whole steps of gradients that are but rounding
    "optimizer.clip_norm=1.0",
    "model.generator_width=4",
    "model.discriminator_width=4",
    f"tracking.every_kimg={KIMG_PER_STEP}",
    f"checkpoint.every_kimg={STEPS // 2 * KIMG_PER_STEP}",
    "evaluation.metrics=[]",
    "tracking.wandb=off",
]
ENGINES = {"ddp": [], **{f"zero-{stage}": ["engine=deepspeed", f"zero_stage={stage}"] for stage in (0, 1, 2)}}
ZERO = [name for name in ENGINES if name != "ddp"]
WRONG = {
    "no R1": ["loss.r1_gamma=0"],
    "no clipping": ["optimizer.clip_norm=0"],
    "one update": ["train.discriminator_updates=1"],
}
TOLERANCE = 5e-6  # float32, summed in another order; the least of what is wrong above makes 1,000 times that


def train_each(runs: dict[Path, list[str]]) -> None:
    """Runs one after another in the same ranks."""
    with join_world() as world:
        for run_dir, overrides in runs.items():
            train(load_config(None, [f"run_dir={run_dir}", *TINY, *overrides]), world)


def train_each_alone(runs: dict[Path, list[str]]) -> None:
    """Without exchanging a gradient."""
    with patch.object(DDPPlayer, "exchanging", lambda player, last: player.parallel.no_sync()):
        train_each(runs)


def assert_same(a: Path, b: Path, tolerance: float) -> None:
    """Weights, averages, Adam's states, and losses of every step."""
    state_a, state_b = final_state(a), final_state(b)
    assert state_a.keys() == state_b.keys()
    for name in state_a:
        difference = (state_a[name] - state_b[name]).abs().max().item()
        assert difference <= tolerance, f"{name} differs by {difference}"
    for row_a, row_b in zip(rows(a, "metrics.jsonl"), rows(b, "metrics.jsonl"), strict=True):
        for name in row_a:
            if name.startswith(("loss/", "penalty/", "logits/", "grad/")):
                assert row_a[name] == pytest.approx(row_b[name], rel=tolerance, abs=tolerance), name


@pytest.fixture(scope="module")
def straight(tmp_path_factory, cache_dir: Path) -> Path:
    """The same run by each engine on two ranks, and some that differ, in folders of their names."""
    folder = tmp_path_factory.mktemp("engines")
    run_ranks(2, train_each, {folder / name: [f"data.cache_dir={cache_dir}", *ENGINES[name]] for name in ENGINES})
    run_ranks(2, train_each, {folder / name: [f"data.cache_dir={cache_dir}", *WRONG[name]] for name in WRONG})
    run_ranks(2, train_each_alone, {folder / "alone": [f"data.cache_dir={cache_dir}"]})
    return folder


@pytest.mark.parametrize("engine", ZERO)
def test_deepspeed_learns_what_ddp_does(straight: Path, engine: str) -> None:
    """R1, two micro-batches, clipping, two updates of the discriminator."""
    assert_same(straight / "ddp", straight / engine, TOLERANCE)


@pytest.mark.parametrize("wrong", [*WRONG, "alone"])
def test_the_comparison_can_fail(straight: Path, wrong: str) -> None:
    with pytest.raises(AssertionError, match="differs"):
        assert_same(straight / "ddp", straight / wrong, 1000 * TOLERANCE)


def test_gradients_of_every_penalty(tmp_path: Path, cache_dir: Path) -> None:
    """With betas[0]=0 Adam's average is the gradient itself."""
    first_step = [f"data.cache_dir={cache_dir}", "train.kimg=0.001", "train.discriminator_updates=1", "optimizer.clip_norm=0"]
    first_step += ["train.accumulation=1", "loss.r1_gamma=0"]
    penalties = {"none": [], "r1": ["loss.r1_gamma=2"], "r2": ["loss.r2_gamma=2"], "wgan-gp": ["loss.wgan_gp_lambda=10"]}
    runs = {
        tmp_path / f"{penalty}-{engine}": [*first_step, *weight, *ENGINES[engine]]
        for penalty, weight in penalties.items()
        for engine in ENGINES
        if penalty != "none" or engine == "ddp"
    }
    run_ranks(2, train_each, runs)

    def gradients(name: str) -> torch.Tensor:
        state = final_state(tmp_path / name)
        names = [name for name in sorted(state) if name.startswith("discriminator") and name.endswith("exp_avg")]
        return torch.cat([state[name].flatten() for name in names])

    for penalty in ("r1", "r2", "wgan-gp"):
        expected = gradients(f"{penalty}-ddp")
        scale = expected.abs().max()
        assert (expected - gradients("none-ddp")).abs().max() > 1e-3 * scale, "the penalty can be seen"
        for engine in ZERO:
            assert (expected - gradients(f"{penalty}-{engine}")).abs().max() < 1e-6 * scale, (penalty, engine)


RESUMED = [  # saved by, on two ranks; resumed by, on so many
    *((engine, engine, 2) for engine in ENGINES),
    ("ddp", "zero-1", 2),
    ("zero-2", "zero-0", 2),
    ("zero-0", "zero-2", 2),
    ("zero-2", "ddp", 1),
    ("zero-1", "zero-2", 1),
    ("zero-1", "zero-2", 4),
    ("ddp", "zero-1", 4),
]


@pytest.fixture(scope="module")
def resumed(straight: Path, tmp_path_factory, cache_dir: Path) -> dict[tuple[str, str, int], Path]:
    """The straight runs, taken up halfway."""
    folders = {case: tmp_path_factory.mktemp("resumed") / "run" for case in RESUMED}
    for (saved_by, _, _), folder in folders.items():
        shutil.copytree(straight / saved_by, folder)
        shutil.rmtree(checkpoint.complete_steps(folder)[-1])
    for world_size in (1, 2, 4):
        cases = {folder: ENGINES[engine] for (_, engine, size), folder in folders.items() if size == world_size}
        run_ranks(world_size, train_each, {folder: [f"data.cache_dir={cache_dir}", *cases[folder]] for folder in cases})
    return folders


@pytest.mark.parametrize("case", RESUMED, ids=lambda case: "{}, then {} on {}".format(*case))
def test_one_checkpoint_serves_all(resumed, straight: Path, case: tuple[str, str, int]) -> None:
    """Bit for bit where nothing has changed."""
    saved_by, engine, world_size = case
    same = engine == saved_by and world_size == 2
    assert_same(straight / saved_by, resumed[case], 0 if same else TOLERANCE)


def _guarded() -> dict[str, list[tuple[dict[str, torch.Tensor], float, int | str]]]:
    """By engine, after each of five updates: weights and Adam's state, the gradient's norm, the guard's report."""
    with join_world() as world:
        return {name: _guarded_updates(load_config(None, [*TINY, *ENGINES[name]]), world) for name in ENGINES}


def _guarded_updates(config: Config, world: World) -> list[tuple[dict[str, torch.Tensor], float, int | str]]:
    precision = choose_precision("float32", world.device)
    torch.manual_seed(0)
    network = build_discriminator(config.model, config.data)
    objective = DiscriminatorObjective(network, config, precision.autocast)
    player = build_player("discriminator", objective, config, world, precision, lr=1e-2)
    (first, *_) = network.parameters()
    torch.manual_seed(world.rank)
    images, labels = torch.rand(2, 4, 1, 16, 16) * 2 - 1, torch.arange(4)
    collected = []
    for step, kind in enumerate(("good", "bad loss", "bad gradient", "good", "stop"), start=1):
        if broken := world.rank == 1 and kind == "bad gradient":
            hook = first.register_hook(lambda gradient: gradient * torch.nan)
        real = images[0] * (torch.nan if world.rank == 1 and kind in ("bad loss", "stop") else 1)
        player.guard.stops = kind == "stop"
        micro_batches = [discriminator_inputs(objective, each, labels, images[1], labels) for each in (real, images[0])]
        with HostWaits() as waits:
            statistics = player.update(micro_batches, len(micro_batches), step, seen=0)
        assert not waits.found
        if broken:
            hook.remove()
        try:
            report = player.guard.report()
        except TrainingError as error:
            report = str(error)
        state = {"network": dict(network.named_parameters()), "optimizer": player.state_dict()["optimizer"]}
        tensors = {path: tensor.detach().clone() for path, tensor in checkpoint.flatten(state).items()}
        collected.append((tensors, statistics[-1]["grad/discriminator_norm"].item(), report))
    return collected


def test_an_update_that_is_not_finite_is_left_out_on_all_ranks() -> None:
    """The loss of one rank, then one gradient of one rank, which ZeRO gives to a single rank's part."""
    ranks = run_ranks(2, _guarded)
    for engine in ENGINES:
        for rank in ranks:
            states, norms, reports = zip(*rank[engine], strict=True)
            assert reports[:4] == (0, 1, 1, 0)
            assert "the gradient of the discriminator was not finite at step 5" in reports[4]
            assert [math.isfinite(norm) for norm in norms] == [True, False, False, True, False]
            for before, after, skipped in ((0, 1, True), (1, 2, True), (2, 3, False), (3, 4, True)):
                same = [torch.equal(states[before][name], states[after][name]) for name in states[before]]
                assert all(same) if skipped else not any(same), (engine, after)
            for step, state in enumerate(states):
                for name, tensor in state.items():
                    assert torch.equal(tensor, ranks[0][engine][step][0][name]), "all ranks have the same"
                    torch.testing.assert_close(tensor, ranks[0]["ddp"][step][0][name], rtol=1e-5, atol=TOLERANCE)
            assert norms[::3] == pytest.approx([norm for _, norm, _ in ranks[0]["ddp"]][::3], rel=1e-5)


def test_refusals() -> None:
    for overrides, message in [
        (["engine=deepspeed", "zero_stage=3"], r"zero_stage=3 shards the weights, .* need them whole: use zero_stage=2, or 1"),
        (["engine=deepspeed", "zero_stage=-1"], r"zero_stage=-1: there are the stages 0, 1 and 2"),
        (["engine=deepspeed", "zero_stage=true"], r"zero_stage: a number is wanted"),
        (["zero_stage=1"], r"zero_stage=1 is an option of DeepSpeed: say engine=deepspeed too, or leave it out"),
        (
            ["engine=deepspeed", "train.precision=float16"],
            r"float16 needs a loss scale, .*: use bfloat16, or engine=ddp",
        ),
        (
            ["engine=deepspeed", "train.precision=float64"],
            r"in float32, whatever train\.precision says: use float32, or engine=ddp",
        ),
        (["engine=deepsped"], r"engine: 'deepsped' is not one of ddp, deepspeed; did you mean 'deepspeed'\?"),
    ]:
        with pytest.raises(ConfigError, match=message):
            load_config(None, overrides)
    assert load_config(None, ["engine=deepspeed"]).stage == 1
    assert load_config(None, ["engine=deepspeed", "zero_stage=0"]).stage == 0


def test_deepspeed_says_nothing(tmp_path: Path, cache_dir: Path) -> None:
    consoles = []
    for engine in ([], ["engine=deepspeed"]):
        run_dir = tmp_path / "-".join(["r", *engine])
        result = launch(2, "gandist.train", f"run_dir={run_dir}", f"data.cache_dir={cache_dir}", *TINY, *engine)
        assert result.returncode == 0, result.stderr
        consoles.append(re.sub(r" *\d+(\.\d+)?", "N", (result.stdout + result.stderr).replace(str(run_dir), "RUN")))
    assert consoles[1].replace(", DeepSpeed with ZeRO stageN", "") == consoles[0]


def _loaded() -> bool:
    return "deepspeed" in sys.modules


def test_ddp_does_not_load_deepspeed() -> None:
    assert run_ranks(1, _loaded) == [False]


def test_training_loads_only_what_it_takes(tmp_path: Path, cache_dir: Path) -> None:
    """Libraries of evaluation and of packing wait until something is evaluated or packed."""
    arguments = [f"run_dir={tmp_path}", f"data.cache_dir={cache_dir}", *TINY, "train.kimg=0.03"]
    code = f"import sys, gandist.train; gandist.train.main({arguments}); print('loaded:', *sys.modules)"
    result = run_command(sys.executable, "-c", code)
    loaded = set(result.stdout.partition("loaded:")[2].split())
    assert "webdataset" in loaded, result.stderr
    assert not loaded & {"torch_fidelity", "torchmetrics", "sklearn", "scipy", "timm", "deepspeed", "wandb", "plotly"}


def _start(out: Path, err: Path, arguments: list[str]) -> None:
    """The run of a rank; rank 1 dies as it begins to build its engines."""
    from gandist.engine import zero

    if os.environ["RANK"] == "1":
        zero._import_deepspeed = lambda world: os.kill(os.getpid(), signal.SIGKILL)
    run_module(out, err, "gandist.train", arguments)


def test_a_rank_that_dies_while_engines_are_built_is_not_waited_for(tmp_path: Path, cache_dir: Path) -> None:
    small = ["model.generator_width=2", "model.discriminator_width=2", "evaluation.metrics=[]", "tracking.wandb=off"]
    options = [f"run_dir={tmp_path / 'run'}", f"data.cache_dir={cache_dir}", *small, "engine=deepspeed"]
    out, err = tmp_path / "out", tmp_path / "err"
    ranks = start_ranks(2, lambda rank: (_start, out, err, [*options, "train.timeout_minutes=0.1"]))
    ranks[0].join(40)
    assert end_ranks(ranks) == []
    assert [rank.exitcode for rank in ranks] == [1, -signal.SIGKILL]
    assert re.search("^error \\(rank 0\\): another rank does not answer", err.read_text(), re.MULTILINE)
