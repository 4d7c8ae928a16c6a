"""Process groups, the device of this rank, agreement between ranks, and the wrapper of every entry point."""

import gc
import os
import re
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.elastic.multiprocessing.errors import record

from gandist import errors
from gandist.errors import ConfigError, GandistError
from gandist.launcher import Launch, read_launch, report
from gandist.messages import decode, encode
from gandist.rendezvous import join_timeout, meet, roll_call
from gandist.watchdog import Watchdog

_set_timeout = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout  # its name in older versions

# When an exchange takes too long, NCCL's thread aborts the process, without a word of ours: gloo and the watchdog come first.
NCCL_LATER = timedelta(seconds=60)
AFTER_EXCHANGES = 5.0  # seconds by which the watchdog waits longer than an exchange, whose error says more

_KINDS = {name: kind for name, kind in vars(errors).items() if isinstance(kind, type)}  # of errors, as ranks name them

# What gloo, NCCL and the store say, in this order.
_LOST_PEER = (
    *("Connection closed by peer", "Connection reset by peer", "Broken pipe"),
    *("ncclRemoteError", "remote process exited or there was a network error", "NCCL communicator was aborted"),
    *("Connection was likely closed", "Connection closed by remote peer", "Remote peer closed the connection"),
)
_SILENT_PEER = (
    *("Timed out waiting", "Application timeout caused pair closure"),
    *("Watchdog caught collective operation timeout", "NCCL operation timed out", "NCCL timeout", "Connection timed out"),
    *("wait timeout after", "Socket Timeout"),
)
_NCCL_ON_THIS_NODE = re.compile(r"unhandled system error.*?Last [Ee]rror:\s*(?P<reason>[^\n]+)", re.DOTALL)


@dataclass(frozen=True)
class World:
    """The ranks of this run, as one of them sees it.

    `control` is a gloo group for what is slow or small (files, agreement, evaluation), so that no collective of the
    training's own group ever waits for a disk.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int  # ranks on this node
    device: torch.device
    control: dist.ProcessGroup
    timeout: timedelta  # of the exchanges in any group
    groups: list[dist.ProcessGroup]  # whose exchanges training waits for
    watchdog: Watchdog  # told of progress; watches where `watching` is entered

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, of a type that `gandist.messages` knows, on every rank."""
        message = _as_tensor(value) if self.is_main else None
        length = torch.tensor([len(message) if self.is_main else 0])
        dist.broadcast(length, src=0, group=self.control)
        message = message if self.is_main else _room_for(int(length))
        dist.broadcast(message, src=0, group=self.control)
        return _as_value(message)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, of a type that `gandist.messages` knows, in the order of ranks, on every rank."""
        message = _as_tensor(value)
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor([len(message)]), group=self.control)
        longest = int(max(lengths))
        messages = [_room_for(longest) for _ in range(self.size)]
        dist.all_gather(messages, nn.functional.pad(message, (0, longest - len(message))), group=self.control)
        return [_as_value(each[:length]) for each, length in zip(messages, lengths, strict=True)]

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over ranks, on the CPU."""
        total = tensor.detach().cpu().clone()
        dist.all_reduce(total, group=self.control)
        return total

    @contextmanager
    def patient(self, times: float) -> Iterator[None]:
        """A block of every rank in which an exchange may take `times` as long as usual; at its end the ranks meet."""
        self._allow(self.timeout * times)
        yield
        self.gather(None)  # else a rank that is quick would give the others too little time in the next exchange
        self._allow(self.timeout)

    def add_group(self, group: dist.ProcessGroup) -> None:
        """Takes in a group of all ranks, made by a library, so that its exchanges have the run's timeout too."""
        self.groups.append(group)
        self._set_timeout(self.timeout, group)

    def _allow(self, timeout: timedelta) -> None:
        for group in self.groups:
            self._set_timeout(timeout, group)

    def _set_timeout(self, timeout: timedelta, group: dist.ProcessGroup) -> None:
        by_nccl = self.device.type == "cuda" and group is not self.control
        _set_timeout(timeout + NCCL_LATER if by_nccl else timeout, group)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Runs a block without collectives; a GandistError or OSError of any rank is raised on all of them."""
        failure = None
        try:
            yield
        except (GandistError, OSError) as error:
            failure = error if isinstance(error, GandistError) else GandistError(_explain(error))
        failures = [each for each in self.gather(failure and (_kind(failure), str(failure))) if each]
        if failures:
            message = "\n".join(dict.fromkeys(text for _, text in failures))
            raise _KINDS[failures[0][0]](message, on_every_rank=True) from failure


@contextmanager
def join_world(timeout_minutes: float = 10) -> Iterator[World]:
    """Joins the process group that the launcher describes in the environment, or makes one of this process alone.

    timeout_minutes: after which an exchange that a rank does not take part in becomes an error
    """
    launch = read_launch()
    device = choose_device(launch)
    store = meet(launch, join_timeout())
    with connect(launch, device, store, timeout_minutes) as world:
        yield world


@contextmanager
def connect(launch: Launch, device: torch.device, store: dist.Store, timeout_minutes: float) -> Iterator[World]:
    """The process group of the ranks that have met in `store`, each with its device."""
    timeout = timedelta(minutes=timeout_minutes)
    backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
    longest = timeout + NCCL_LATER if device.type == "cuda" else timeout
    rank, size = launch.rank, launch.size
    with roll_call(store, launch, join_timeout()):
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=longest)
        control = dist.new_group(backend="gloo", timeout=timeout)
        present = torch.ones((), device=device)
        dist.all_reduce(present)  # connects NCCL, which otherwise waits for the first gradients
        present.item()
    try:
        groups = [dist.group.WORLD, control]
        watchdog = Watchdog(timeout.total_seconds() + AFTER_EXCHANGES)
        yield World(rank, size, launch.local_rank, launch.local_size, device, control, timeout, groups, watchdog)
    except BaseException:
        if size == 1:  # else a rank that fails must leave at once: the others may be inside a collective
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()


@contextmanager
def join_alone(what: str) -> Iterator[World]:
    """As `join_world`, for what one process does. Raises ConfigError where there are more."""
    with join_world() as world:
        if world.size > 1:
            raise ConfigError(f"{what} by one process: start it with python, not with torchrun")
        yield world


def choose_device(launch: Launch) -> torch.device:
    """The device of this rank. Raises ConfigError where there are more ranks than GPUs on this node."""
    local_rank = launch.local_rank
    if not torch.cuda.is_available():
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // launch.local_size))
        return torch.device("cpu")
    gpus = torch.cuda.device_count()
    if launch.slurm and gpus == 1:
        local_rank = 0  # srun --gpus-per-task=1
    if local_rank >= gpus:
        problem = f"process {local_rank} of {socket.gethostname()} finds {gpus} GPU(s)"
        raise ConfigError(f"{problem}: start one process a GPU", on_every_rank=False)
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        # Steps with and without penalties take turns, and their sizes would fragment fixed segments. Read when CUDA starts.
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def run(main: Callable[[], None]) -> None:
    """Runs an entry point: an error a user can act on becomes one message and exit status 1.

    Other errors keep their traceback, which torchrun shows for the rank that failed first. A Ctrl-C has none.
    """
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # since `import gandist`
        signal.signal(signal.SIGINT, signal.default_int_handler)

    @record
    def guarded() -> None:
        if problem := _find_problem(main):
            gc.collect()  # a process group that outlives the interpreter can abort the process, and frames of the error hold it
            _fail(*problem)

    guarded()


def _find_problem(main: Callable[[], None]) -> tuple[str, bool] | None:
    """What a user can do something about, if it ends in an error, and whether all ranks have the same one."""
    try:
        main()
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        sys.exit(130)
    except GandistError as error:
        return str(error), error.on_every_rank
    except OSError as error:
        return _explain(error), False
    except RuntimeError as error:
        if problem := _of_other_ranks(str(error)):
            return problem, False
        raise
    return None


def _of_other_ranks(said: str) -> str | None:
    """What gloo, NCCL or the store mean."""
    if any(sign in said for sign in _LOST_PEER):
        return "the connection to another rank was lost: it failed first, see its own message"
    if any(sign in said for sign in _SILENT_PEER):
        return "another rank does not answer: it hangs, or its node or the network between is gone; see its log"
    if found := _NCCL_ON_THIS_NODE.search(said):
        return (
            f"NCCL failed on {socket.gethostname()}: {found['reason']}: often /dev/shm is full or too small (docker run "
            "--shm-size=8g), or NCCL_SOCKET_IFNAME is wrong; NCCL_DEBUG=INFO tells more"
        )
    return None


def _as_tensor(value: Any) -> torch.Tensor:
    return torch.frombuffer(bytearray(encode(value)), dtype=torch.uint8)


def _as_value(message: torch.Tensor) -> Any:
    return decode(message.numpy().tobytes())


def _room_for(length: int) -> torch.Tensor:
    try:
        return torch.empty(length, dtype=torch.uint8)
    except RuntimeError as error:
        raise GandistError(f"another rank announces a message of {length:,} bytes, for which there is no memory") from error


def _kind(error: GandistError) -> str:
    """The name in _KINDS of its class, or of the nearest one above."""
    return next(kind.__name__ for kind in type(error).__mro__ if kind.__name__ in _KINDS)


def _fail(message: str, on_every_rank: bool) -> NoReturn:
    report(message, on_every_rank=on_every_rank)
    sys.exit(1)


def _explain(error: OSError) -> str:
    return f"{error.filename or 'a file'}: {error.strerror or error}"
