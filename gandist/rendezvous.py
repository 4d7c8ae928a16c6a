"""The ranks find each other before they train: who has come, who is missing, who does not answer.

They meet in a store (a small server of keys and values) that the launcher or rank 0 serves. It may outlive its ranks:
torchrun starts failed ones anew against the same store. So they meet in rounds, and all that they exchange lies under
the number of the round; what dead ranks left behind lies under an earlier one.

Whoever reaches the store can write into it. So a rank marks what it says of itself with the secret of the job, and a round
is complete only if all marks are right.
"""

import hmac
import os
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import groupby

import torch.distributed as dist

from gandist.errors import ConfigError, GandistError
from gandist.launcher import Launch, read_address, report

TIMEOUT_VARIABLE = "GANDIST_JOIN_TIMEOUT"
SECRET_VARIABLE = "GANDIST_SECRET"  # a random text that all ranks of a job know, and nobody else
_COMPLETE = "complete"
_GRACE = 3.0  # s in which a living rank answers a roll call
_INTRUDER = f"another program may have connected; give all ranks one {SECRET_VARIABLE}, and nobody else (docs/security.md)"
_LOST = "the connection to the store of the ranks was lost: rank 0 or its launcher ended first, see its own message"


def join_timeout() -> float:
    """Seconds for all ranks to join, and again for their first exchange."""
    text = os.environ.get(TIMEOUT_VARIABLE, "120")
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0
    if not 0 < seconds < float("inf"):
        raise ConfigError(f"{TIMEOUT_VARIABLE}={text} is not a number of seconds", on_every_rank=False)
    return seconds


def meet(launch: Launch, seconds: float) -> dist.Store:
    """The store of this round, once every rank has joined it."""
    if launch.size == 1:
        return dist.HashStore()
    deadline = time.monotonic() + seconds
    host, port = read_address(launch)
    if launch.one_node and not launch.agent_store:
        host = _loopback()
    silence = f"{host}:{port} does not answer as the store of this run should: rank 0 hangs, or another program has the port"
    with _time_limit(seconds + 2 * _GRACE, silence):
        store = _open_store(launch, host, port, seconds)
        if launch.rank == 0 and not launch.one_node and not os.environ.get(SECRET_VARIABLE):
            print(
                f"warning: any program on the network can join this run at port {port}: set {SECRET_VARIABLE} to the same "
                "random text on every node (docs/security.md)",
                flush=True,
            )
        try:
            number = int(store.compare_set("round", "", "0"))
            while True:
                meeting = _Round(store, number, launch)
                if meeting.join() and meeting.wait(seconds, deadline):
                    return meeting.store
                number = int(store.compare_set("round", str(number), str(number + 1)))
        except dist.DistError as error:
            raise GandistError(_LOST) from error
        except (ValueError, IndexError) as error:
            raise GandistError(f"the store at {host}:{port} holds what no rank has written: {_INTRUDER}") from error


def _open_store(launch: Launch, host: str, port: int, seconds: float) -> dist.Store:
    here, deadline = socket.gethostname(), time.monotonic() + seconds
    serves = launch.rank == 0 and not launch.agent_store
    while True:  # torch would try again too, but prints a stack for each attempt
        try:
            if serves:
                socket.getaddrinfo(host, port)
            else:
                socket.create_connection((host, port), timeout=5).close()
            break
        except OSError as error:
            reason = error.strerror or error
            if serves:
                raise GandistError(f"MASTER_ADDR={host} is not known on {here}, which it should be: {reason}") from error
            if time.monotonic() > deadline:
                problem = f"rank 0 cannot be reached from {here} within {seconds:g} s at {host}:{port} ({reason})"
                advice = "see in its log whether it runs, and whether MASTER_ADDR is its address and no firewall is between"
                raise GandistError(f"{problem}: {advice}") from error
            time.sleep(0.1)
    try:
        if serves:
            return _serve(launch, port)
        return dist.TCPStore(host, port, launch.size, wait_for_workers=False)
    except (OSError, dist.DistError) as error:
        problem = f"port {port} of {here} is taken" if serves else f"what listens at {host}:{port} is not the store of a run"
        raise GandistError(f"{problem}, probably by another run: set MASTER_PORT to a free one") from error


def _serve(launch: Launch, port: int) -> dist.TCPStore:
    """On one node, only its own processes reach the store."""
    host, listening = _loopback(), None
    if launch.one_node:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listening = socket.create_server((host, port), family=family).detach()
    return dist.TCPStore(host, port, launch.size, True, wait_for_workers=False, master_listen_fd=listening)


def _loopback() -> str:
    """This node's address for itself. A node without IPv4 may still call 127.0.0.1 its localhost."""
    try:
        with socket.create_server(("127.0.0.1", 0)):
            return "127.0.0.1"
    except OSError:
        return "::1"


class _Round:
    """One attempt of all ranks to meet. It ends once, with an outcome: complete, or an error that all of them report."""

    def __init__(self, root: dist.Store, number: int, launch: Launch):
        self.store = dist.PrefixStore(f"round {number}", root)
        self._number = number
        self._complete = f"{_COMPLETE} {_mark(number)}"
        self._is_newest = lambda: int(root.get("round")) == number
        self._launch = launch

    def join(self) -> bool:
        """False where the round is over, or this rank's place is that of a process which this one replaces."""
        if self.store.check(["outcome"]):
            return False
        rank, size, attempt = self._launch.rank, self._launch.size, self._launch.attempt
        me = self._marked(rank, f"{attempt} {socket.gethostname()} {os.getpid()}")
        other = self.store.compare_set(_seat(rank), "", me).decode(errors="replace")  # it may be a stranger's
        if other != me:
            if not self._is_marked(rank, other):
                raise _conclude(self.store, self._launch, self._intruded([rank]))
            if int(other.split()[0]) < attempt:
                return False
            twice = f"rank {rank} was started twice, on {_whereabouts(other)} and on {_whereabouts(me)}"
            raise _conclude(self.store, self._launch, f"{twice}: each node needs a number of its own (NODE_RANK)")
        first, of = map(int, self.store.compare_set("size", "", f"{rank} {size}").split())
        if of != size:
            sizes = f"rank {first} was started as one of {of} ranks, but rank {rank} as one of {size}"
            advice = "start every node with the same numbers of nodes and processes"
            raise _conclude(self.store, self._launch, f"{sizes}: {advice}")
        self.store.append("joined", f"{rank} ")
        if self.store.add("seats taken", 1) == size:
            self.store.set("full", "")
        return True

    def wait(self, seconds: float, deadline: float) -> bool:
        """Until all have joined. False where the ranks have gone on to another round.

        When all places are taken, all confirm: one may have died meanwhile, and been started anew into another round.
        """
        rank, size, confirmed = self._launch.rank, self._launch.size, False
        while not self.store.check(["outcome"]):
            if not self._is_newest():
                return False
            if not confirmed and self.store.check(["full"]):
                confirmed = True
                self.store.set(f"confirmed {rank}", "")
                if self.store.add("confirmations", 1) == size:
                    self._complete_if_all_are_marked()
            if time.monotonic() > deadline:
                raise _conclude(self.store, self._launch, self._missing(seconds))
            time.sleep(min(0.5, 0.02 + size / 1000))  # all ranks ask one server
        outcome = self.store.get("outcome").decode()
        if outcome.startswith(_COMPLETE) and outcome != self._complete:
            raise GandistError(f"the ranks were told to begin by a process that is none of them: {_INTRUDER}")
        if outcome != self._complete:
            raise GandistError(outcome.partition(" ")[2], on_every_rank=True)
        return True

    def _complete_if_all_are_marked(self) -> None:
        seats = [_seat(rank) for rank in range(self._launch.size)]
        if self.store.check(seats):  # one question each, however many ranks there are
            found = (seat.decode(errors="replace") for seat in self.store.multi_get(seats))
            marked = [self._is_marked(rank, seat) for rank, seat in enumerate(found)]
        else:
            marked = [self.store.check([seat]) for seat in seats]
        if all(marked):
            self.store.compare_set("outcome", "", self._complete)
        else:
            problem = self._intruded([rank for rank, is_marked in enumerate(marked) if not is_marked])
            raise _conclude(self.store, self._launch, problem)

    def _marked(self, rank: int, text: str) -> str:
        return f"{text} {_mark(self._number, rank, text)}"

    def _is_marked(self, rank: int, seat: str) -> bool:
        return hmac.compare_digest(self._marked(rank, seat.rpartition(" ")[0]).encode(), seat.encode())

    def _intruded(self, ranks: list[int]) -> str:
        where = by_host(self.store, [rank for rank in ranks if self.store.check([_seat(rank)])])
        return (
            f"the place of {_ranks(ranks)} been taken by a process that does not know {SECRET_VARIABLE} ({where}): {_INTRUDER}"
        )

    def _missing(self, seconds: float) -> str:
        joined = sorted(map(int, self.store.get("joined").split()))  # one question, however many ranks there are
        missing = sorted(set(range(self._launch.size)) - set(joined))
        if not missing:
            silent = [rank for rank in joined if not self.store.check([f"confirmed {rank}"])]
            return f"rank {by_host(self.store, silent)} joined, but does not answer: look at its log and at its node"
        problem = f"{_ranks(missing)} not joined within {seconds:g} s (joined: {by_host(self.store, joined)})"
        return f"{problem}: look at the log of the missing; {TIMEOUT_VARIABLE}=600 waits longer"


@contextmanager
def roll_call(store: dist.Store, launch: Launch, seconds: float) -> Iterator[None]:
    """Guards what the ranks do together first: if it fails or takes longer than `seconds`, those who are silent are named.

    A rank can be stuck outside of Python, where no exception reaches it. So a thread of its own answers to the call, and
    ends the process.
    """
    if launch.size == 1:
        yield
        return
    silence = "rank 0, or the launcher on its node, does not answer: look at its log and at its node"
    with _time_limit(seconds + 2 * _GRACE, silence) as limit:
        line = store.clone()  # of its own: a collective may wait on the other
        call = dist.PrefixStore("roll call", line)
        over = threading.Event()
        failure: list[RuntimeError] = []
        verdict: list[GandistError] = []

        def answer() -> None:
            deadline, called = time.monotonic() + seconds, False
            try:
                while not (failure or line.check(["call"]) or time.monotonic() > deadline):
                    if over.wait(0.1):
                        return
                line.set("call", "")
                line.set(f"here {launch.rank}", "")
                called = True
                time.sleep(_GRACE)
                verdict.append(_conclude(call, launch, _who_is_silent(line, launch, seconds, failure)))
            except dist.DistError:  # in a roll call, rank 0 has said what there is to say
                verdict.append(GandistError(_LOST, on_every_rank=called))
            limit.cancel()
            if not (failure or over.is_set()):
                _end_process(verdict[0])

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        try:
            yield
        except RuntimeError as error:
            failure.append(error)
            thread.join()
            raise verdict[0] from error
        line.set(f"through {launch.rank}", "")
        over.set()


def _who_is_silent(store: dist.Store, launch: Launch, seconds: float, failure: list[RuntimeError]) -> str:
    here = [rank for rank in range(launch.size) if store.check([f"here {rank}"]) or store.check([f"through {rank}"])]
    silent = [rank for rank in range(launch.size) if rank not in here]
    reason = str(failure[0]).partition("\n")[0] if failure else f"not done after {seconds:g} s"
    if silent:
        which = f"rank {by_host(store, silent)}"
        return f"{which} joined, but does not answer in the first exchange ({reason}): look at its log and at its node"
    advice = "NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME choose the network, NCCL_DEBUG=INFO tells more"
    return f"all ranks answer, but their first exchange failed ({reason}): {advice}"


def _conclude(store: dist.Store, launch: Launch, problem: str) -> GandistError:
    """The error of all ranks: that of the first one to come to a conclusion, which it alone says aloud."""
    mine = f"{launch.rank} {problem}"
    first = store.compare_set("outcome", "", mine).decode()
    if first.startswith(_COMPLETE):
        return GandistError(problem)
    if first == mine:
        time.sleep(1)  # so that the others can read it: the store may end with this process
    return GandistError(first.partition(" ")[2], on_every_rank=first != mine)


@contextmanager
def _time_limit(seconds: float, problem: str) -> Iterator[threading.Timer]:
    """Ends this process with an error if the block takes longer, even if it is stuck outside of Python."""
    timer = threading.Timer(seconds, lambda: _end_process(GandistError(problem)))
    timer.daemon = True
    timer.start()
    try:
        yield timer
    finally:
        timer.cancel()


def _end_process(error: GandistError) -> None:
    """As gandist.distributed.run does, but from a thread, while the main one may be out of reach."""
    report(str(error), on_every_rank=error.on_every_rank)
    os._exit(1)


def _mark(*said: object) -> str:
    return hmac.digest(os.environ.get(SECRET_VARIABLE, "").encode(), repr(said).encode(), "sha256").hex()


def _seat(rank: int) -> str:
    return f"seat {rank}"


def _whereabouts(seat: str) -> str:
    _, host, process, _ = seat.split()
    return f"{host} (process {process})"


def _ranks(ranks: list[int]) -> str:
    """'rank 3 has', 'ranks 2-3, 5 have'"""
    return f"rank {_ranges(ranks)} has" if len(ranks) == 1 else f"ranks {_ranges(ranks)} have"


def _ranges(ranks: Iterable[int]) -> str:
    runs = [[rank for _, rank in run] for _, run in groupby(enumerate(ranks), lambda pair: pair[1] - pair[0])]
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def by_host(store: dist.Store, ranks: list[int]) -> str:
    """'0-3 on node-a, 4 on node-b'"""
    hosts: dict[str, list[int]] = {}
    for rank in ranks:
        _, host, *_ = [*store.get(_seat(rank)).decode(errors="replace").split(), "?", "?"]  # as above
        hosts.setdefault(host, []).append(rank)
    return ", ".join(f"{_ranges(each)} on {host}" for host, each in hosts.items())
