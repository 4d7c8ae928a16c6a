from pathlib import Path

import pytest
import torch

from gandist.data.pack import pack_digits


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory) -> Path:
    """A cache with the built-in digits in it."""
    folder = tmp_path_factory.mktemp("cache")
    pack_digits(folder / "digits-16")
    return folder
