"""The null GPU does what its docstring says: the other tests can fail."""

import os

import pytest
import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from gandist.distributed import join_world
from tests.null_gpu import Kind, counts, recording, reset
from tests.ranks import run_ranks

pytestmark = pytest.mark.skipif("NULL_GPU_COUNT" not in os.environ, reason="a real GPU has no counters")


def test_what_is_copied_to_the_device_can_be_copied_back() -> None:
    numbers = torch.arange(3_000_000)
    assert torch.equal(numbers.cuda().cpu(), numbers)
    assert torch.equal(numbers.pin_memory().cuda(non_blocking=True).cpu(), numbers)


def test_memory_is_zero_when_the_allocator_hands_it_out_again() -> None:
    for size in (10, 5000, 3_000_000):
        torch.full((size,), 7).cuda()  # freed at once
        assert not torch.empty(size, dtype=torch.int64, device="cuda").cpu().any()


def test_memory_ends() -> None:
    torch.empty(70 << 30, dtype=torch.uint8, device="cuda")
    torch.cuda.empty_cache()
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(90 << 30, dtype=torch.uint8, device="cuda")


def test_events_are_counted_in_their_order() -> None:
    x, y = torch.ones(4), torch.ones(4).pin_memory()
    torch.cuda.synchronize()
    with recording() as events:
        on_device = y.to("cuda", non_blocking=True)
        (on_device + 1).relu()
        x.to("cuda", non_blocking=True)
        torch.cuda.synchronize()
    assert [event.kind for event in events] == [Kind.COPY, Kind.LAUNCH, Kind.LAUNCH, Kind.PAGEABLE_COPY, Kind.SYNC]
    assert "add" in events[1].name
    assert events[0].bytes == events[3].bytes == 16
    found = counts()
    assert (found.launches, found.syncs, found.copies, found.pageable_copies) == (2, 1, 2, 1)
    reset()
    assert counts().launches == 0


def test_torch_can_be_profiled_and_asked_for_versions() -> None:
    assert torch.backends.cudnn.version() > 90000
    x = torch.ones(3, device="cuda")
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        (x + 1).relu()
    assert {"aten::add", "aten::relu"} <= {event.key for event in profiled.key_averages()}


TYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8]


def exchange() -> tuple[list[torch.Tensor], list[str]]:
    """Results of collectives on this rank, and their names in order."""
    with join_world() as world:
        rank, size = world.rank, world.size
        results = []
        with recording() as events:
            for dtype in TYPES:
                for op in (dist.ReduceOp.SUM, dist.ReduceOp.MAX, dist.ReduceOp.MIN):
                    values = torch.tensor([rank + 1, 3 - rank, 5]).to(dtype).cuda()
                    dist.all_reduce(values, op)
                    results.append(values.cpu())
            long = torch.full((1_000_001,), 0.5 + rank).cuda()  # several parts
            dist.all_reduce(long, dist.ReduceOp.AVG)
            results.append(long.cpu()[::250_000])
            parts = torch.empty(size, 2).cuda()
            dist.all_gather_into_tensor(parts, torch.tensor([rank, 10.0]).cuda())
            results.append(parts.cpu())
            sent = torch.full((5,), float(rank)).cuda()
            dist.broadcast(sent, src=size - 1)
            results.append(sent.cpu())
            share = torch.empty(2).cuda()
            dist.reduce_scatter_tensor(share, torch.arange(2.0 * size).cuda())
            results.append(share.cpu())
        return results, [event.name for event in events if event.kind == Kind.COLLECTIVE]


def test_collectives_exchange() -> None:
    for rank, (results, names) in enumerate(run_ranks(2, exchange)):
        expected = [torch.tensor(values).to(dtype) for dtype in TYPES for values in ([3, 5, 10], [2, 3, 5], [1, 2, 5])]
        expected += [torch.full((5,), 1.0), torch.tensor([[0.0, 10.0], [1.0, 10.0]]), torch.ones(5)]
        expected += [torch.arange(4.0).view(2, 2)[rank] * 2]
        assert names == ["all_reduce"] * 22 + ["all_gather", "broadcast", "reduce_scatter"]
        for result, value in zip(results, expected, strict=True):
            torch.testing.assert_close(result, value, rtol=0, atol=0)


def disagree() -> str:
    with join_world() as world:
        values = torch.ones(4 + world.rank).cuda()
        with pytest.raises(RuntimeError) as error:
            dist.all_reduce(values)
        return str(error.value)


def test_ranks_that_disagree_are_told() -> None:
    for message in run_ranks(2, disagree):
        assert "NCCL" in message
