import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from torch._subclasses import FakeTensorMode

from gandist.data.pack import pack_digits
from gandist.distributed import World, join_world
from gandist.models import spectral_norm

settings.register_profile("suite", deadline=None)  # other processes take time, too
settings.load_profile("suite")

collect_ignore = [] if torch.cuda.is_available() else ["gpu"]  # which tests/test_gpu.py runs, on a null GPU
LONGEST = [
    f"test_{name}"
    for name in (
        *("gpu", "slurm", "promises", "launch", "features", "engines", "tracking", "evaluation", "commands", "survival"),
        *("pack", "objectives", "use"),
    )
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest first, so that no process is left alone with one of them at the end."""
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _ctrl_c_is_heard() -> None:
    """Also by the processes that tests start, where these tests themselves run in the background, in which shells ignore it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory) -> Path:
    """A cache with the built-in digits in it."""
    folder = tmp_path_factory.mktemp("cache")
    pack_digits(folder / "digits-16")
    return folder


@pytest.fixture(scope="session")
def world() -> Iterator[World]:
    """This process as a world of one rank."""
    with join_world() as world:
        yield world


@pytest.fixture
def shapes_alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tensors have no values, for which power iterations would be a waste of time."""
    monkeypatch.setattr(spectral_norm, "FIRST_ITERATIONS", 0)
    with FakeTensorMode():
        yield
