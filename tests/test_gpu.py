"""The tests of tests/gpu, on GPUs that are not there. On a machine with a GPU, pytest runs them by themselves."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.null_gpu import Unavailable, environment
from tests.ranks import ROOT

FILES = sorted((ROOT / "tests/gpu").glob("test_*.py"))


@pytest.mark.timeout(900)
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_on_a_null_gpu(file: Path) -> None:
    try:
        variables = environment(gpus=2)
    except Unavailable as reason:
        pytest.skip(f"no null GPU: {reason}")
    ours = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    done = subprocess.run(command, cwd=ROOT, env=ours | variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-5_000:]
