"""Stopping when asked: a signal sets a flag, and the ranks agree on the step after which they stop."""

import signal
from types import FrameType

import torch
import torch.distributed as dist

from gandist.distributed import World

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)


class StopRequest:
    """Any rank's signal stops all ranks at the same step boundary.

    The agreement about one step is exchanged while the next one computes, so it costs no waiting. A repeated signal
    changes nothing.
    """

    def __init__(self, world: World):
        self.world = world
        self._flag = torch.zeros((), dtype=torch.int32)
        self._exchange: tuple[dist.Work, torch.Tensor] | None = None
        for number in SIGNALS:
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._flag.fill_(1)

    def agreed(self) -> bool:
        """Whether all ranks stop here. Every rank calls it once a step."""
        stop = False
        if self._exchange is not None:
            work, flag = self._exchange
            work.wait()
            stop = bool(flag)
        flag = self._flag.clone()
        self._exchange = dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.world.control, async_op=True), flag
        return stop


def ignore_signals() -> None:
    """For decoding processes: a signal to the whole process group must not end them before their rank has saved."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
