"""A run folder has one owner: the one process that may write to it.

The owner's claim is a file, `.owner/00000007.json`: whoever creates the one with the next number is the owner. It works on
network file systems, where a file is created by one process alone too. The owner renews its claim, removes those before it,
and ends when its own is gone.
"""

import errno
import json
import os
import secrets
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gandist.atomic import replace_text
from gandist.checkpoint.folder import FOLDER as CHECKPOINTS
from gandist.config import RUN_CONFIG
from gandist.distributed import World
from gandist.errors import ConfigError, RunFolderError
from gandist.launcher import read_job, report

FOLDER = ".owner"  # of a run folder
RENEWAL = 5.0  # seconds between two renewals
LEASE = 60.0  # seconds without a renewal after which an owner on another host counts as dead
WRITING = 1.0  # seconds that a claim may take to be written


class Claim:
    """The claim of this process on a run folder.

    untouched: the names in a folder that nobody had claimed before; None where somebody had
    """

    def __init__(self, path: Path, untouched: set[str] | None):
        self.path = path
        self._untouched = untouched
        self._moving = threading.Lock()

    @property
    def run_dir(self) -> Path:
        return self.path.parent.parent

    def confirm(self) -> None:
        """Renews the claim. Raises RunFolderError where another process has taken over the folder."""
        try:
            with self._moving:
                os.utime(self.path)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ESTALE):
                raise
            newest = _newest(self.path.parent)
            who = _describe(_read(newest)) if newest else "its claim was removed"
            raise RunFolderError(f"{self.run_dir} is no longer this run's: {who}; this process ends without writing") from error

    def start_over(self, aside: str) -> None:
        """Moves the run folder to `aside`, and claims a new one in its place. Raises ConfigError where it is not of a run."""
        run_dir = self.run_dir
        others = _names(run_dir)
        if others and not {RUN_CONFIG, CHECKPOINTS} & others:
            raise ConfigError(
                f"--fresh moves a run aside, and {run_dir} is not one (it has {min(others)}): choose another run_dir"
            )
        with self._moving:
            if others:
                shutil.move(run_dir, aside)
                _release(Path(aside) / FOLDER / self.path.name)
                self.path = take(run_dir).path

    def release(self) -> None:
        """Lets the next start have the folder at once. Leaves no trace where the run has written nothing."""
        with suppress(OSError, RunFolderError):
            left = _names(self.run_dir)
            if left != self._untouched:
                _release(self.path)
                return
            self.confirm()
            shutil.rmtree(self.path.parent.rename(self.run_dir / f"{FOLDER}-{secrets.token_hex(4)}"))
            if not left:
                self.run_dir.rmdir()


@contextmanager
def owning(run_dir: Path, world: World) -> Iterator[Claim | None]:
    """Makes this run the owner of the folder. Yields the claim on rank 0, which writes, and None on the other ranks.

    Raises RunFolderError on every rank where another process owns it.
    """
    claim = None
    with world.patient(1 + LEASE / world.timeout.total_seconds()), world.together():
        if world.is_main:
            claim = take(run_dir)
    if claim is None:
        yield None
        return
    over = threading.Event()
    thread = threading.Thread(target=_renew, args=(claim, over), name="owner", daemon=True)
    thread.start()
    try:
        yield claim
    finally:
        over.set()
        thread.join()
        claim.release()


def take(run_dir: Path) -> Claim:
    """Claims the folder. Waits for a sign of life, LEASE seconds at most, where the last owner was on another host.

    A requeued Slurm job takes the folder from its earlier attempt, whose node may only have lost its connection to Slurm.
    Raises RunFolderError where the owner is alive.
    """
    untouched = None if (run_dir / FOLDER).exists() else _names(run_dir)
    while True:
        with suppress(FileNotFoundError):  # a run that wrote nothing has removed the folder of claims meanwhile
            if path := _try_to_take(run_dir / FOLDER):
                return Claim(path, untouched)


def _try_to_take(folder: Path) -> Path | None:
    """The new claim; None where another start was quicker. Raises RunFolderError."""
    folder.mkdir(parents=True, exist_ok=True)
    last = _newest(folder)
    owner = _read(last) if last else {}
    requeued = _is_earlier_attempt(owner)
    if last and not requeued:
        owner = _refuse_if_alive(last)
    path = folder / f"{_number(last) + 1:08d}.json"
    try:
        with path.open("x") as file:
            file.write(json.dumps(_this_process()))
    except FileExistsError:
        return None
    if _newest(folder) != path or (last and _read(last) != owner):  # what was read before is out of date
        path.unlink(missing_ok=True)
        return None
    for older in folder.iterdir():
        if older != path:
            older.unlink(missing_ok=True)
    if requeued and _is_here(owner):
        _wait_for_end(owner)
    elif requeued:
        time.sleep(2 * RENEWAL)  # by then it has tried to renew its claim
    return path


def _is_earlier_attempt(owner: dict[str, Any]) -> bool:
    job = read_job()
    return job is not None and not owner.get("released") and owner.get("job") == job.id and owner["restarts"] < job.restarts


def _refuse_if_alive(claim: Path) -> dict[str, Any]:
    """Who owned the folder and does no longer: it has released its claim, or is dead. Raises RunFolderError."""
    owner = _read(claim)
    if not owner and claim.exists():
        time.sleep(WRITING)
        owner = _read(claim)
    if owner.get("released") or not claim.exists():
        return owner
    if _is_here(owner):
        if _lives_here(owner):
            raise _refusal(claim, owner)
        return owner
    before, deadline = _sign_of_life(claim), time.monotonic() + LEASE
    print(f"{claim.parent.parent}: {_describe(owner)}: waits up to {LEASE:g} s for a sign of life", flush=True)
    while time.monotonic() < deadline:
        time.sleep(RENEWAL / 10)
        if (now := _sign_of_life(claim)) is None or _read(claim).get("released"):
            return _read(claim)  # taken over by another start, or released
        if now != before:
            raise _refusal(claim, owner)
    return owner


def _wait_for_end(owner: dict[str, Any]) -> None:
    deadline = time.monotonic() + LEASE
    while _lives_here(owner) and time.monotonic() < deadline:
        time.sleep(RENEWAL / 10)


def _refusal(claim: Path, owner: dict[str, Any]) -> RunFolderError:
    return RunFolderError(
        f"{claim.parent.parent} is in use: {_describe(owner)}: stop that run, or choose another run_dir", on_every_rank=True
    )


def _release(path: Path) -> None:
    with suppress(OSError):
        if path.exists():
            replace_text(path, json.dumps(_this_process() | {"released": True}))


def _renew(claim: Claim, over: threading.Event) -> None:
    while not over.wait(RENEWAL):
        try:
            claim.confirm()
        except RunFolderError as error:
            report(str(error))
            os._exit(1)
        except OSError:
            continue  # the file system does not answer now


def _names(run_dir: Path) -> set[str]:
    return {path.name for path in run_dir.glob("*") if path.name != FOLDER}


def _newest(folder: Path) -> Path | None:
    return max((path for path in folder.glob("*.json") if path.stem.isdecimal()), key=_number, default=None)


def _number(claim: Path | None) -> int:
    return int(claim.stem) if claim else 0


def _read(claim: Path) -> dict[str, Any]:
    """Empty where the claim is gone, or its owner was killed while it wrote it."""
    try:
        owner = json.loads(claim.read_text())
    except (OSError, ValueError):
        return {}
    is_whole = isinstance(owner, dict) and owner.keys() >= _this_process().keys() and isinstance(owner["process"], int)
    return owner if is_whole else {}


def _sign_of_life(claim: Path) -> tuple[int, int] | None:
    """Changes when the claim is renewed. None: it is gone."""
    try:
        with claim.open("rb") as file:  # a network's file system asks the server when a file is opened
            status = os.fstat(file.fileno())
    except FileNotFoundError:
        return None
    return status.st_mtime_ns, status.st_ino


def _is_here(owner: dict[str, Any]) -> bool:
    return owner.get("machine") == _machine()


def _lives_here(owner: dict[str, Any]) -> bool:
    return _started(owner["process"]) == owner["process_started"]


def _describe(owner: dict[str, Any]) -> str:
    if not owner:
        return "an unknown process has claimed it"
    job = f", Slurm job {owner['job']}," if owner.get("job") else ""
    return f"process {owner['process']} on {owner['host']}{job} has had it since {owner['time']}"


def _this_process() -> dict[str, Any]:
    job = read_job()
    return {
        "host": socket.gethostname(),
        "machine": _machine(),
        "process": os.getpid(),
        "process_started": _started(os.getpid()),
        "job": job and job.id,
        "restarts": job.restarts if job else 0,
        "start": secrets.token_hex(8),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _machine() -> str:
    """Names what numbers of processes mean the same in: this host since it was started, and this container."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"


def _started(process: int) -> str | None:
    """When a process was started, in ticks since the host was. None: there is none, or it is dead."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    state, started = fields[0], fields[19]
    return None if state in "ZX" else started
