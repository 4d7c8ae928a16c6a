"""What a step of each published configuration asks of a GPU and of its host, on a GPU that is not there: `python -m
benchmarks.gpu_budget [--configs CONFIG …] [--compiled]`.

Launches, time of the host, waits for the device, collectives and memory are counted while the step runs on `tests.null_gpu`,
where kernels do nothing: on two ranks, or on one where the configuration is for one; the host's time always on one. The
roofline sums bytes and FLOPs of the step's ATen operations: what an ideal GPU would need, without any fusion.
"""

import argparse
import math
import re
import signal
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.device import Part, Result, run_part
from benchmarks.photos import PhotoSet
from benchmarks.report import header, markdown, record
from benchmarks.step import NO_KERNEL
from benchmarks.throughput import QUIET, random_batch
from gandist.config_file import load_config
from gandist.distributed import World, join_world
from gandist.flops import flops_of
from gandist.trainer import Trainer
from tests import null_gpu

CONFIGS = sorted(str(path) for path in Path("configs").glob("*.yaml") if not path.stem.startswith("digits"))
TITLE = "a step on one GPU"
COUNTS = [
    "",
    "GPUs",
    "images a GPU",
    "steps are",
    "launches",
    "host, ms",
    "waits",
    "collectives",
    "given, MB",
    "peak, GiB",
    "moved, GB",
    "TFLOP",
    "ideal, ms",
]
ROOFLINE = ["", "operations", "GB", "TFLOP", "ms", "limited by"]
BANDWIDTH, FLOPS = 4.0e12, 700e12  # a second, that an H200 achieves
FIRST = 11  # steps: in as many DistributedDataParallel waits, to see how long it takes
ROUNDS = 5  # of the host's time; the least counts, as other processes may run
MEMORY_GIB = 1000  # so that what does not fit is measured, too


@dataclass
class Cost:
    """Of all operations of one kind."""

    operations: int = 0
    bytes: int = 0
    flops: int = 0
    seconds: float = 0.0  # each at the bandwidth, or at the FLOP/s, whichever takes longer
    computing: float = 0.0  # of them at the FLOP/s


class Roofline(TorchDispatchMode):
    """Adds up what operations read, write and compute, by their kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.costs: dict[str, Cost] = defaultdict(Cost)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        if function.is_view or function in NO_KERNEL or function.namespace == "c10d":
            return result
        size, flops = moved(function, args, kwargs, result), flops_of(function, args, kwargs, result)
        cost = self.costs[kind_of(function, args)]
        cost.operations += 1
        cost.bytes += size
        cost.flops += flops
        cost.seconds += max(size / BANDWIDTH, flops / FLOPS)
        cost.computing += flops / FLOPS if flops / FLOPS > size / BANDWIDTH else 0.0
        return result


def moved(function: torch._ops.OpOverload, args: tuple, kwargs: dict, result: object) -> int:
    """Bytes of what it is given, of what it returns, and once more of what it writes to in its place."""
    named = dict(zip((each.name for each in function._schema.arguments), args, strict=False)) | kwargs
    written = [named.get(each.name) for each in function._schema.arguments if each.alias_info and each.alias_info.is_write]
    returned = [] if written else [result]
    return sum(map(size_of, pytree.tree_leaves([named, written, returned])))


def size_of(value: object) -> int:
    """Bytes; a dimension along which it is expanded counts once."""
    if not isinstance(value, torch.Tensor):
        return 0
    return value.element_size() * math.prod(
        n for n, stride in zip(value.shape, value.stride(), strict=True) if stride or n == 0
    )


def kind_of(function: torch._ops.OpOverload, args: tuple) -> str:
    name = function.overloadpacket.__name__
    if name in ("convolution", "convolution_backward"):
        weight, groups = (args[1], args[8]) if name == "convolution" else (args[2], args[9])
        if groups == 1:
            return "convolutions 1×1" if weight.shape[2:].numel() == 1 else "convolutions, dense"
        return "convolutions, depthwise" if weight.size(1) == 1 else "convolutions, grouped"
    if name in ("mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot"):
        return "matrix products"
    if "norm" in name and not name.startswith(("_foreach", "linalg")):
        return "normalization"
    if "adam" in name or name.startswith("_foreach"):
        return "optimizer and average"
    if name in ("_to_copy", "copy_", "clone", "cat", "zeros", "zero_", "zeros_like", "fill_", "constant_pad_nd"):
        return "copies and casts"
    if name in ("sum", "mean", "amax", "var_mean", "_softmax", "_log_softmax", "max", "argmax", "all", "any"):
        return "reductions"
    return "pointwise and others"


def measure(path: str, images: int, compiled: bool, roofline: bool, world: World, folder: Path) -> None:
    """Records the row of this configuration, as rank 0 sees it, and its roofline."""
    photos = PhotoSet(max(load_config(path, []).data.size), 64, 1, quality=90, grain=8)  # opened, but not read
    if world.is_main:
        photos.folder(folder)
    world.gather(None)
    settings = [
        f"data.train={photos.folder(folder)}",
        f"data.cache_dir={folder}/cache",
        f"run_dir={folder}/run",
        f"train.batch_size={images * world.size}",
        "train.accumulation=1",
        "train.precision=bfloat16",
        f"train.compile={str(compiled).lower()}",
    ]
    config = load_config(path, [*QUIET, *settings])
    trainer = Trainer(config, world)
    batches = repeat(random_batch(config, images, world.device))
    period = math.lcm(config.loss.penalty_every, config.loss.path_length_every)  # of steps with and without penalties

    def run(steps: int) -> float:
        """Processor seconds a step, of all threads."""
        begin = time.process_time()
        for _ in range(steps):
            trainer.train_step(batches)
        return (time.process_time() - begin) / steps

    run(max(FIRST, period))
    torch.cuda.synchronize()
    null_gpu.reset()
    run(period)
    counts = null_gpu.counts()
    host = min(run(period * math.ceil(4 / period)) for _ in range(ROUNDS)) if world.size == 1 else math.nan
    row = [
        Path(path).stem,
        gpus_of(path),
        images,
        "compiled" if compiled else "eager",
        f"{counts.launches / period:,.0f}",
        f"{1e3 * host:.0f}",
        f"{counts.syncs / period:.3g}",
        f"{counts.collectives / period:.0f}",
        f"{counts.collective_bytes / period / 1e6:,.1f}",
        f"{torch.cuda.max_memory_allocated() / 2**30:.1f}",
    ]
    kinds = []
    if roofline:
        with Roofline() as found:
            run(period)
        kinds = roofline_rows(found.costs, period)
    if world.is_main:
        record(TITLE, COUNTS, row + (kinds[-1][2:5] if kinds else [""] * 3))
        for line in kinds:
            record(f"roofline of {Path(path).stem}, {images} images", ROOFLINE, line)


def roofline_rows(costs: dict[str, Cost], steps: int) -> list[list[str]]:
    """The longest kinds first, then their sum."""
    total = Cost(*(sum(getattr(each, name) for each in costs.values()) for name in vars(Cost())))
    ordered = sorted(costs.items(), key=lambda each: -each[1].seconds)
    rows = []
    for name, cost in [*ordered, ("all", total)]:
        share = cost.computing / cost.seconds if cost.seconds else 0.0
        rows.append(
            [
                name,
                f"{cost.operations / steps:,.0f}",
                f"{cost.bytes / steps / 1e9:.2f}",
                f"{cost.flops / steps / 1e12:.2f}",
                f"{1e3 * cost.seconds / steps:.2f}",
                "computing" if share > 0.8 else "memory" if share < 0.2 else f"computing {share:.0%}, memory {1 - share:.0%}",
            ]
        )
    return rows


def gpus_of(path: str) -> int:
    """Of the command at the configuration's top."""
    command = next(line for line in Path(path).read_text().splitlines() if line.startswith("# Command:"))
    numbers = {name: int(number) for name, number in re.findall(r"--(nproc_per_node|nodes|gpus-per-node)=(\d+)", command)}
    return math.prod(numbers.values())


def measure_apart(path: str, ranks: int, images: int, options: argparse.Namespace, *more: str) -> Result:
    """As `measure`, on so many null GPUs."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    command = [*launcher, "-m", "benchmarks.gpu_budget", "--in-rank", "--configs", path, f"--images={images}", *more]
    with tempfile.TemporaryDirectory() as folder:
        environment = null_gpu.environment(gpus=ranks, memory_gib=MEMORY_GIB)
        return run_part(Part(path, 1, command), 60 * options.minutes, environment, Path(folder, "log"))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_budget", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--configs", nargs="+", default=CONFIGS, metavar="CONFIG", help="default: all that are published")
    parser.add_argument("--compiled", action="store_true", help="compiled steps; on few cores minutes each")
    parser.add_argument("--images", type=int, help="a GPU (default: the batch by the GPUs of the configuration's command)")
    parser.add_argument("--minutes", type=float, default=10, help="for a process at most (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="file of the tables, in markdown (default: none)")
    for name in ("--in-rank", "--roofline"):  # as this starts itself
        parser.add_argument(name, action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.in_rank:
        (path,) = options.configs
        with join_world() as world, tempfile.TemporaryDirectory() as folder:
            folder = Path(world.broadcast(folder))
            measure(path, options.images, options.compiled, options.roofline, world, folder)
        return
    print(header(), flush=True)
    tables: dict[str, list[dict[str, str]]] = {}
    failed = False
    manner = ["--compiled"] if options.compiled else []
    for path in options.configs:
        gpus = gpus_of(path)
        images = options.images or load_config(path, []).train.batch_size // gpus
        result = measure_apart(path, min(gpus, 2), images, options, *manner, *([] if manner else ["--roofline"]))
        if gpus > 1 and result.outcome == "ok":  # the null GPU's exchanges take the host's time
            alone = measure_apart(path, 1, images, options, *manner)
            result.rows[TITLE][0]["host, ms"] = alone.rows[TITLE][0]["host, ms"] if alone.outcome == "ok" else ""
        if result.outcome != "ok":
            failed = True
            result.rows.setdefault(
                TITLE, [dict(zip(COUNTS, [Path(path).stem, gpus, images, result.outcome, *[""] * 9], strict=True))]
            )
        for title, rows in result.rows.items():
            tables.setdefault(title, []).extend(rows)
        print(*(f"{name} {cell}".strip() for name, cell in tables[TITLE][-1].items()), sep="; ", flush=True)
        if options.output:
            options.output.write_text(page(tables))
    print(f"\n{page(tables)}", flush=True)
    if failed:
        sys.exit(1)


def page(tables: dict[str, list[dict[str, str]]]) -> str:
    """Markdown."""
    return "\n".join(
        f"{title}:\n\n{markdown(list(rows[0]), [list(row.values()) for row in rows])}\n" for title, rows in tables.items()
    )


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # by way of the process that measures, which is ended too
    main()
