"""Stopping when asked: a signal sets a flag, and the ranks agree on the step after which they stop."""

import ctypes
import signal
from types import FrameType

import torch
import torch.distributed as dist

from gandist.distributed import World
from gandist.launcher import read_launch

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2, signal.SIGHUP)

_PR_SET_PDEATHSIG = 1  # of prctl(2)


class Stopped(Exception):
    """The ranks have agreed to leave off what they are doing; raised on all of them at the same point."""


class StopRequest:
    """Any rank's signal stops all ranks at the same step boundary. So does the end of the launcher.

    The agreement about one step is exchanged while the next one computes, so it costs no waiting. A repeated signal
    changes nothing.
    """

    def __init__(self, world: World):
        self.world = world
        self._flag = torch.zeros((), dtype=torch.int32)
        self._exchange: tuple[dist.Work, torch.Tensor] | None = None
        for number in SIGNALS:
            if (number, signal.getsignal(number)) != (signal.SIGHUP, signal.SIG_IGN):  # which is what nohup is for
                signal.signal(number, self._receive)
        if read_launch().supervised:  # torchrun dies of a SIGUSR2 that is sent to it, and would leave its ranks behind
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._flag.fill_(1)

    def agreed(self) -> bool:
        """Whether all ranks stop here. Every rank calls it equally often, once a step or so."""
        stop = False
        if self._exchange is not None:
            work, flag = self._exchange
            work.wait()
            stop = bool(flag)
        flag = self._flag.clone()
        self._exchange = dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.world.control, async_op=True), flag
        return stop

    def leave(self) -> None:
        """Raises Stopped if all ranks stop here. To be called as `agreed` is."""
        if self.agreed():
            raise Stopped


def ignore_signals() -> None:
    """For decoding processes: a signal to the whole process group must not end them before their rank has saved."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
