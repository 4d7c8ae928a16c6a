"""Nothing runs that came as data, nobody else joins a run, and no secret is written anywhere."""

import os
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import torch.distributed as dist

from gandist.distributed import World, join_world, run
from gandist.errors import ConfigError, GandistError
from gandist.messages import decode, encode
from tests.ranks import end_ranks, run_command, run_ranks, start_ranks

# ------------------------------------------------------------------------------------------------- between the ranks


class Trap:
    """Where it is unpickled, it leaves a file named like the process that did it."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self) -> tuple:
        return exec, (f"import os; open('{self.folder}/' + str(os.getpid()), 'w')",)


VALUES = {
    "atoms": [None, True, -3, 0.1, float("inf"), "a\udc80é", b"\0\xff"],
    "containers": [(), ([1], (2,)), {}, {"path": Path("a\udc80"), 3: {(1, 2): []}}],
}


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
def test_a_message_arrives_as_it_was_sent(value: object) -> None:
    assert decode(encode(value)) == value


def test_an_array_arrives_as_it_was_sent() -> None:
    array = np.arange(6, dtype=np.int64).reshape(2, 3)
    for sent in (array, array.T, array[:, ::2], np.zeros((0, 3)), np.array(True)):
        got = decode(encode([sent]))[0]
        assert (got.dtype, got.shape, got.tolist()) == (sent.dtype, sent.shape, sent.tolist())
        tensor = decode(encode({"x": torch.from_numpy(sent)}))["x"]
        assert tensor.equal(torch.from_numpy(sent))
        assert tensor.dtype == torch.from_numpy(sent).dtype


def test_what_no_message_holds_is_refused() -> None:
    for value in (ConfigError("x"), {1, 2}, object(), Trap(Path())):
        with pytest.raises(TypeError, match=f"a {type(value).__name__} is not sent between ranks"):
            encode([value])


@pytest.mark.parametrize(
    "value",
    ['{"path": 3}', '{"run": "x"}', "{}", '{"a": 1, "b": 2}', '{"dict": [[[], 1]]}', '{"array": "9"}', "[" * 10**5, "x"],
)
def test_a_message_of_another_form_is_one_error(value: str) -> None:
    for message in (value.encode(), encode("0" * len(value)).replace(b'"' + b"0" * len(value), value.encode() + b" ")):
        with pytest.raises(GandistError, match="a message that no rank of this run sends was received"):
            decode(message)


def _attack(folder: Path) -> tuple[int, str]:
    """Rank 1 sends a pickle where values are gathered, then rank 0 where one is broadcast; what the other one then raises."""
    with join_world() as world:
        try:
            if world.rank == 1:
                with suppress(Exception):  # it unpickles the answers
                    dist.all_gather_object([None] * 2, Trap(folder / "gathered"), group=world.control)
                world.broadcast(None)
            else:
                world.gather("hello")
        except GandistError as error:
            return os.getpid(), str(error)
        finally:
            if world.rank == 0:
                dist.broadcast_object_list([Trap(folder / "broadcast")], src=0, group=world.control)
        return os.getpid(), "no error"


def test_a_pickle_between_the_ranks_is_not_unpickled(tmp_path: Path) -> None:
    for name in ("gathered", "broadcast"):
        (tmp_path / name).mkdir()
    (process, *_), _ = answers = run_ranks(2, _attack, tmp_path)
    assert not (tmp_path / "gathered" / str(process)).exists()
    assert not list((tmp_path / "broadcast").iterdir())
    for _, error in answers:
        assert error.startswith("a message that no rank of this run sends was received")


# --------------------------------------------------------------------------------------------- the store of the ranks


STRANGER = {
    "LOCAL_WORLD_SIZE": "1",
    "GANDIST_JOIN_TIMEOUT": "20",
}  # rank 1 is on another node, so rank 0 listens on the network


def _join(error: Path, secret: str, trap: Trap | None) -> None:
    """As a rank does; trap: as a stranger does, who knows the port and not the secret, and sends a pickle."""
    os.environ |= STRANGER | {"LOCAL_RANK": "0", "GANDIST_SECRET": secret}
    os.dup2(os.open(error, os.O_WRONLY | os.O_CREAT), sys.stderr.fileno())

    def main() -> None:
        with join_world() as world:
            if trap:
                dist.all_gather_object([None] * world.size, trap, group=world.control)
            world.gather("hello")

    run(main)


def test_a_stranger_cannot_take_the_place_of_a_rank(tmp_path: Path) -> None:
    (folder := tmp_path / "ran").mkdir()
    errors = [tmp_path / f"{rank}.err" for rank in range(2)]
    works = [(_join, errors[0], "ours", None), (_join, errors[1], "", Trap(folder))]
    ranks = start_ranks(2, works.__getitem__)
    ranks[0].join(40)
    end_ranks(ranks)
    assert ranks[0].exitcode == 1
    assert not (folder / str(ranks[0].pid)).exists()
    said = r"error.*: the place of rank [01] has been taken by a process that does not know GANDIST_SECRET \([01] on "
    assert re.search(said, errors[0].read_text()), errors[0].read_text()


def _listening(world: World) -> list[str]:
    """The addresses on which this process serves the store."""
    port = int(os.environ["MASTER_PORT"])
    mine = (each for each in psutil.net_connections() if each.pid == os.getpid() and each.status == psutil.CONN_LISTEN)
    return [each.laddr.ip for each in mine if each.laddr.port == port]


def _where_rank_0_listens() -> list[str]:
    with join_world() as world:
        return world.broadcast(_listening(world))


def test_on_one_node_nobody_else_reaches_the_store() -> None:
    assert run_ranks(2, _where_rank_0_listens) == [["127.0.0.1"]] * 2


MEET_TWICE = """
import os
from concurrent.futures import ThreadPoolExecutor
from gandist.launcher import Launch
from gandist.rendezvous import meet

for port, place in {"29511": {}, "29512": {"one_node": True}}.items():
    os.environ["MASTER_PORT"] = port
    with ThreadPoolExecutor() as threads:
        list(threads.map(lambda rank: meet(Launch(rank, 2, 0, 1, **place), 10), range(2)))
print("met")
"""


def test_a_node_without_ipv4_whose_localhost_is_127_0_0_1(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("127.0.0.1 localhost\n")
    prepare = f"ip link set lo up && ip address delete 127.0.0.1/8 dev lo && mount --bind {tmp_path}/hosts /etc/hosts"
    alone = ["unshare", "--net", "--mount", "sh", "-c", f'{prepare} && exec "$@"', "sh"]
    if subprocess.run([*alone, "true"], capture_output=True, check=False).returncode:
        pytest.skip("a network of its own needs root")
    result = run_command(*alone, "env", "MASTER_ADDR=::1", "GANDIST_SECRET=a", sys.executable, "-c", MEET_TWICE)
    assert (result.returncode, result.stdout) == (0, "met\n"), result.stderr
