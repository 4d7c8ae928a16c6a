"""Nothing runs that came as data, nobody else joins a run, and no secret is written anywhere."""

import os
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from gandist.distributed import join_world
from gandist.errors import ConfigError, GandistError
from gandist.messages import decode, encode
from tests.ranks import run_ranks

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
