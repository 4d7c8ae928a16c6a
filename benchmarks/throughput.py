"""Images a second of the trainer's step on one GPU, in settings each of which adds to the one before:
`python -m benchmarks.throughput [CONFIG …] [-- key=value …]`."""

import argparse
import math
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import accumulate, repeat
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
from torch._inductor import config as inductor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import gandist
from benchmarks.report import header, table
from gandist.config import Config
from gandist.config_file import load_config
from gandist.data import DeviceBatch
from gandist.distributed import join_world
from gandist.flops import peak_flops
from gandist.trainer import Trainer

CONFIGS = ["configs/cifar10-r3gan.yaml", "configs/imagenet128-biggan-256.yaml", "configs/ffhq256-stylegan2.yaml"]
QUIET = [  # the data set is opened, but not read
    "data.train=digits:train",
    "data.test=null",
    "data.in_memory=0",
    "evaluation.metrics=[]",
    "checkpoint.best=null",
    "tracking.wandb=off",
]
COLUMNS = ["", "images/s", "× eager bfloat16", "ms a step", "TFLOP/s", "MFU", "GiB", "first step, s", "host sync"]
PROFILED = 3  # steps


@dataclass(frozen=True)
class Rung:
    name: str
    precision: str = "bfloat16"
    channels_last: bool = True
    compiled: bool = False
    graphs: bool = False


EAGER = Rung("bfloat16", channels_last=False)
LADDER = [
    Rung("float32, eager, NCHW", "float32", channels_last=False),
    Rung("tf32", "tf32", channels_last=False),
    EAGER,
    Rung("channels last"),
    Rung("compiled", compiled=True),
    Rung("CUDA graphs", compiled=True, graphs=True),
]


def measure(rung: Rung, path: str, overrides: list[str], options: argparse.Namespace) -> tuple[float, list[str], str]:
    """images/s; cells of `COLUMNS` from "ms a step" on, without the ratio; what --profile prints. For a process of its own."""
    if not rung.channels_last:
        torch.channels_last = torch.contiguous_format  # in which the trainer then places the networks
    inductor.triton.cudagraphs = rung.graphs  # as mode="reduce-overhead" has it
    with join_world() as world, TemporaryDirectory() as folder:
        manner = [f"train.precision={rung.precision}", f"train.compile={str(rung.compiled).lower()}", f"run_dir={folder}/run"]
        config = load_config(path, [*QUIET, *overrides, *manner])
        trainer = Trainer(config, world)
        batches = repeat(random_batch(config, config.train.batch_size, world.device))
        on_gpu = world.device.type == "cuda"

        def run(steps: int) -> float:
            """Seconds a step."""
            begin = time.perf_counter()
            for _ in range(steps):
                if rung.graphs:
                    torch.compiler.cudagraph_mark_step_begin()
                trainer.train_step(batches)
            if on_gpu:
                torch.cuda.synchronize()
            return (time.perf_counter() - begin) / steps

        first = run(1)
        period = math.lcm(config.loss.penalty_every, config.loss.path_length_every)  # of steps with and without penalties
        steps = math.ceil(options.steps / period) * period
        run(steps)
        syncs = find_syncs(lambda: run(1)) if on_gpu else "needs a GPU"
        seconds = median(run(steps) for _ in range(options.rounds))
        rate = trainer.images_per_step / seconds
        flops, peak = rate * trainer.flops["update"], peak_flops(world.device, "bfloat16")
        cells = [
            f"{1000 * seconds:,.1f}",
            f"{flops / 1e12:.3g}",
            f"{flops / peak:.1%}" if peak else "",
            f"{torch.cuda.max_memory_allocated() / 2**30:.1f}" if on_gpu else "",
            f"{first:.1f}",
            syncs,
        ]
        return rate, cells, profile_steps(lambda: run(PROFILED), on_gpu) if options.profile else ""


def find_syncs(step: Callable[[], object]) -> str:
    """The lines of gandist that make the host wait for the GPU."""
    found = []
    package = str(Path(gandist.__file__).parent)

    def note(message: Warning, *rest: object, **more: object) -> None:
        frames = [frame for frame in traceback.extract_stack() if frame.filename.startswith(package)]
        if "synchronizing" in str(message) and frames:  # none: the wait for the end of the step
            found.append(f"{Path(frames[-1].filename).name}:{frames[-1].lineno}")

    torch.cuda.set_sync_debug_mode("warn")  # "error" would name the first alone, and leave the step half done
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        step()
    torch.cuda.set_sync_debug_mode("default")
    return ", ".join(dict.fromkeys(found)) or "no host sync"


def profile_steps(steps: Callable[[], object], on_gpu: bool) -> str:
    """The ten kernels, or on a CPU operations, that take most time, and the share of the time in which the GPU runs none."""
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as profiled:
        steps()
    device, key = (DeviceType.CUDA, "self_device_time_total") if on_gpu else (DeviceType.CPU, "self_cpu_time_total")
    events = [event for event in profiled.events() if event.device_type == device and not event.is_user_annotation]
    totals = Counter()
    for event in events:
        totals[event.name] += getattr(event, key)
    rows = [[name[:90], f"{us / PROFILED / 1000:.2f}", f"{us / totals.total():.1%}"] for name, us in totals.most_common(10)]
    lines = table(["kernel" if on_gpu else "operation", "ms a step", "share"], rows)
    return f"{lines}\nGPU idle {idle_share([event.time_range for event in events]):.1%}" if on_gpu else lines


def idle_share(ranges: list) -> float:
    """Of the time from the first start to the last end, that in none of the ranges."""
    ranges = sorted(ranges, key=lambda each: each.start)
    ends = accumulate((each.end for each in ranges), max)
    idle = sum(max(0.0, after.start - end) for after, end in zip(ranges[1:], ends, strict=False))
    return idle / (max(each.end for each in ranges) - ranges[0].start)


def random_batch(config: Config, count: int, device: torch.device) -> DeviceBatch:
    """Noise, of all classes."""
    classes = config.data.num_classes
    images = torch.randint(256, (count, config.data.channels, *config.data.size), dtype=torch.uint8, device=device)
    labels = torch.randint(classes, (count,), device=device) if classes else torch.full((count,), -1, device=device)
    return DeviceBatch(images.contiguous(memory_format=torch.channels_last), labels, {})


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.throughput", description=__doc__)
    parser.add_argument("--rungs", nargs="+", choices=[rung.name for rung in LADDER], help="only these")
    parser.add_argument("--batch-size", type=int, help="default: the configuration's")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4, help="a round; more where lazy penalties come more seldom")
    parser.add_argument(
        "--profile", action="store_true", help="the ten longest kernels of each setting, and the GPU's idle time"
    )
    parser.add_argument("arguments", nargs="*", metavar="CONFIG or key=value", help=f"default: {' '.join(CONFIGS)}")
    options = parser.parse_intermixed_args(arguments)
    overrides = [each for each in options.arguments if "=" in each]
    overrides += [f"train.batch_size={options.batch_size}"] if options.batch_size else []
    print(header(), torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU", sep="\n", flush=True)
    context = get_context("forkserver")  # whose processes have imported what they need, and not touched the GPU
    context.set_forkserver_preload(["gandist.trainer"])
    for path in [each for each in options.arguments if "=" not in each] or CONFIGS:
        rows, profiles, eager = [], [], None
        for rung in [rung for rung in LADDER if not options.rungs or rung.name in options.rungs]:
            try:
                with ProcessPoolExecutor(1, context) as pool:
                    rate, cells, kernels = pool.submit(measure, rung, path, overrides, options).result()
            except Exception as error:  # such as too little memory: the others are measured all the same
                rows.append([rung.name, *[""] * 7, f"{type(error).__name__}: {str(error).partition(chr(10))[0][:80]}"])
                continue
            eager = rate if rung == EAGER else eager
            rows.append([rung.name, f"{rate:,.1f}", f"{rate / eager:.2f}" if eager else "", *cells])
            profiles += [f"\n{rung.name}\n{kernels}"] if kernels else []
        print(f"\n{path} {' '.join(overrides)}", table(COLUMNS, rows), *profiles, sep="\n", flush=True)


if __name__ == "__main__":
    main()
