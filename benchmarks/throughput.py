"""Images a second of the trainer's step on one GPU, in settings each of which adds to the one before:
`python -m benchmarks.throughput [CONFIG …] [-- key=value …]`."""

import argparse
import math
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate, repeat
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import gandist
from benchmarks.photos import PhotoSet
from benchmarks.report import header, record, table
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
COLUMNS = ["", "images/s", "× eager bfloat16", "ms a step", "TFLOP/s", "MFU", "GiB", "first step, s", "remarks"]
KERNELS = ["", "ms a step", "share"]
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


def measure(
    rung: Rung, path: str, overrides: list[str], options: argparse.Namespace
) -> Iterator[tuple[float, list[str]] | list[list[str]]]:
    """images/s and the cells of `COLUMNS` from "ms a step" on; then, with --profile, the rows of `KERNELS`."""
    if not rung.channels_last:
        torch.channels_last = torch.contiguous_format  # in which the trainer then places the networks
    if rung.graphs:
        from torch._inductor import config as inductor  # slow

        inductor.triton.cudagraphs = True  # as mode="reduce-overhead" has it
        torch._logging.set_logs(cudagraphs=True, perf_hints=True)  # says what it keeps out of a graph, and why
    with join_world() as world, TemporaryDirectory() as folder:
        manner = [f"train.precision={rung.precision}", f"train.compile={str(rung.compiled).lower()}", f"run_dir={folder}/run"]
        photos = PhotoSet(max(load_config(path, overrides).data.size), 64, 1, quality=90, grain=8)  # for scikit-learn's digits
        data = [f"data.train={photos.folder(Path(folder))}", f"data.cache_dir={folder}/cache"]
        config = load_config(path, [*QUIET, *data, *overrides, *manner])
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
        remarks = [find_syncs(lambda: run(1)) if on_gpu else "needs a GPU"]
        remarks += [count_graphs()] if rung.graphs else []
        seconds = median(run(steps) for _ in range(options.rounds))
        rate = trainer.images_per_step / seconds
        flops, peak = rate * trainer.flops["update"], peak_flops(world.device, "bfloat16")
        cells = [
            f"{1000 * seconds:,.1f}",
            f"{flops / 1e12:.3g}",
            f"{flops / peak:.1%}" if peak else "",
            f"{torch.cuda.max_memory_allocated() / 2**30:.1f}" if on_gpu else "",
            f"{first:.1f}",
            ", ".join(remarks),
        ]
        yield rate, cells
        if options.profile:
            yield profile_steps(lambda: run(PROFILED), on_gpu)


def measure_apart(*arguments: object) -> Iterator[tuple[float, list[str]] | list[list[str]]]:
    """As `measure`, in a process of its own: what came before it broke is there. Raises RuntimeError then."""
    context = get_context("forkserver")  # whose processes have imported what they need, and not touched the GPU
    context.set_forkserver_preload(["gandist.trainer"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, *arguments))
    process.start()
    sender.close()  # the other end alone is left, which its process closes when it ends
    error = None
    with suppress(EOFError):
        while not error:
            found = receiver.recv()
            if isinstance(found, RuntimeError):
                error = found
            else:
                yield found
    process.join()
    if error or process.exitcode:
        raise error or RuntimeError(f"its process ended with status {process.exitcode}")


def _send(sender: Connection, *arguments: object) -> None:
    try:
        for found in measure(*arguments):
            sender.send(found)
    except Exception as error:  # such as too little memory
        sender.send(RuntimeError(f"{type(error).__name__}: {str(error).partition(chr(10))[0][:80]}"))


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


def count_graphs() -> str:
    """CUDA graphs that torch has recorded, and how often it took something for unfit."""
    from torch._dynamo.utils import counters
    from torch._inductor.cudagraph_trees import get_manager

    manager = get_manager(torch.cuda.current_device(), create_if_none_exists=False)
    recorded = manager.new_graph_id().id if manager else 0
    return f"{recorded} CUDA graphs recorded, {counters['inductor']['cudagraph_skips']} skipped"


def profile_steps(steps: Callable[[], object], on_gpu: bool) -> list[list[str]]:
    """The ten kernels, or on a CPU operations, that take most time, and the share of the time in which the GPU runs none."""
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as profiled:
        steps()
    device, key = (DeviceType.CUDA, "self_device_time_total") if on_gpu else (DeviceType.CPU, "self_cpu_time_total")
    events = [event for event in profiled.events() if event.device_type == device and not event.is_user_annotation]
    totals = Counter()
    for event in events:
        totals[event.name] += getattr(event, key)
    rows = [[name[:90], f"{us / PROFILED / 1000:.2f}", f"{us / totals.total():.1%}"] for name, us in totals.most_common(10)]
    idle = idle_share([event.time_range for event in events]) if on_gpu and events else 0.0
    return [*rows, ["GPU idle", "", f"{idle:.1%}"]] if on_gpu else rows


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
    errors = []
    for path in [each for each in options.arguments if "=" not in each] or CONFIGS:
        title, rows, profiles, eager = " ".join([path, *overrides]), [], [], None
        for rung in [rung for rung in LADDER if not options.rungs or rung.name in options.rungs]:
            row = [rung.name, *[""] * (len(COLUMNS) - 1)]
            rows.append(row)
            try:
                found = measure_apart(rung, path, overrides, options)
                rate, cells = next(found)
                eager = rate if rung == EAGER else eager
                row[1:] = [f"{rate:,.1f}", f"{rate / eager:.2f}" if eager else "", *cells]
                for kernels in found:
                    profiles.append(f"\n{rung.name}\n{table(KERNELS, kernels)}")
                    for kernel in kernels:
                        record(f"{title}: {rung.name}", KERNELS, kernel)
            except RuntimeError as error:  # the others are measured all the same
                errors.append(f"{rung.name}: {error}")
                row[-1] = ", ".join(filter(None, [row[-1], str(error)]))
            record(title, COLUMNS, row)
            print("; ".join(f"{name} {cell}" for name, cell in zip(COLUMNS, row, strict=True) if cell).strip(), flush=True)
        print(f"\n{title}", table(COLUMNS, rows), *profiles, sep="\n", flush=True)
    if errors:
        sys.exit("; ".join(errors))


if __name__ == "__main__":
    main()
