"""What the ranks exchange: their findings when they have met, then sums, whose speed is measured."""

import json
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist

from gandist.distributed import World
from gandist.doctor.finding import ERROR, OK, WARNING, Finding, Findings
from gandist.errors import GandistError
from gandist.launcher import Launch
from gandist.rendezvous import by_host

SIZES = 2**13, 2**20, 2**23, 2**26  # bytes
MEASURED, LONGEST = 0.5, 3.0  # s for each size, and for one sum
SLOW = 1.0  # GB/s
NETWORK = "NCCL_SOCKET_IFNAME, NCCL_IB_HCA and GLOO_SOCKET_IFNAME choose the network, NCCL_DEBUG=INFO tells what was chosen"


class Seen(NamedTuple):
    """What a rank tells of itself. gpu: tells it from others of its host; empty for a CPU"""

    host: str
    gpu: str
    findings: Findings


def share(store: dist.Store, launch: Launch, mine: Seen, seconds: float) -> dict[int, Seen]:
    """What all ranks tell, on rank 0 alone; by the store, as the network of the GPUs has not been tried yet."""
    store.set(f"seen {launch.rank}", json.dumps(mine))
    everyone = {}
    for rank in range(launch.size) if launch.rank == 0 else ():
        try:
            store.wait([f"seen {rank}"], timedelta(seconds=seconds))
        except dist.DistError as error:
            problem = f"rank {by_host(store, [rank])} joined, but does not answer"
            raise GandistError(f"{problem}: look at its log and at its node") from error
        host, gpu, findings = json.loads(store.get(f"seen {rank}"))
        everyone[rank] = Seen(host, gpu, {name: Finding(*fields) for name, fields in findings.items()})
    return everyone


def sharing_gpus(everyone: Mapping[int, Seen]) -> list[list[int]]:
    """Ranks that have the same GPU."""
    ranks: dict[tuple[str, str], list[int]] = {}
    for rank, seen in everyone.items():
        if seen.gpu:
            ranks.setdefault((seen.host, seen.gpu), []).append(rank)
    return [each for each in ranks.values() if len(each) > 1]


def check_all_reduce(world: World) -> Finding:
    """Sums over all ranks of ever more numbers, as far as time allows, with the speed of the last."""
    if not _sums_are_right(world):
        return Finding(ERROR, "the sum over the ranks is wrong", "try NCCL_P2P_DISABLE=1, then another driver")
    for size in SIZES:
        numbers = torch.zeros(size // 4, device=world.device)
        _time(world, numbers, 1)  # connects
        once = _time(world, numbers, 1)
        seconds = _time(world, numbers, max(1, min(20, int(MEASURED / once))))
        if size == SIZES[0]:
            latency = seconds
        if seconds * 8 > LONGEST:
            break
    algorithm = size / 1e9 / seconds
    bus = algorithm * 2 * (world.size - 1) / world.size  # as NCCL-tests define it
    backend = "gloo" if world.device.type == "cpu" else "NCCL"
    text = f"{backend} sums {size / 2**20:.0f} MiB in {seconds * 1e3:.1f} ms"
    bandwidth = f"algorithm bandwidth {algorithm:.2f} GB/s, bus bandwidth {bus:.2f} GB/s"
    figures = f"{bandwidth}; {SIZES[0] // 1024} KiB in {latency * 1e6:.0f} µs"
    if bus < SLOW and world.device.type == "cuda":
        return Finding(WARNING, text, f"slow for GPUs: {NETWORK}", figures)
    return Finding(OK, text, figures=figures)


def _sums_are_right(world: World) -> bool:
    numbers = torch.full((SIZES[0] // 4,), world.rank + 1.0, device=world.device)
    dist.all_reduce(numbers)
    expected = world.size * (world.size + 1) / 2
    return all(world.gather(bool((numbers.cpu() == expected).all())))


def _time(world: World, numbers: torch.Tensor, count: int) -> float:
    """Seconds of one sum, the same on all ranks: that of the slowest."""
    world.gather(None)  # all begin together
    start = time.perf_counter()
    for _ in range(count):
        dist.all_reduce(numbers)
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)
    return max(world.gather(time.perf_counter() - start)) / count
