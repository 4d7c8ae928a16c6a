"""What docs/extending.md shows works: its changes are made to a copy of gandist, which is trained with."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from tests.ranks import ROOT

PAGE = (ROOT / "docs/extending.md").read_text()


def test_the_worked_examples_train(tmp_path: Path, cache_dir: Path) -> None:
    shutil.copytree(ROOT / "gandist", tmp_path / "gandist", ignore=shutil.ignore_patterns("__pycache__"))
    for patch in re.findall(r"```diff\n(.*?)```", PAGE, re.DOTALL):
        subprocess.run(["git", "apply", "-C1", "-"], input=patch, cwd=tmp_path, text=True, check=True)
    for path, text in re.findall(r"`(gandist/\S+)`:\n\n```python\n(.*?)```", PAGE, re.DOTALL):
        (tmp_path / path).write_text(text)
    (command,) = re.findall(r"^torchrun .*-m gandist\.train (.*)", PAGE, re.MULTILINE)
    short = ["train.kimg=0.256", "evaluation.every_kimg=1", "tracking.wandb=off", f"data.cache_dir={cache_dir}"]
    result = subprocess.run(
        [sys.executable, "-m", "gandist.train", *command.split(), *short],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "networks: linear" in result.stdout
    rows = [json.loads(line) for line in (tmp_path / "runs/digits/metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["kimg"] == 0.256
    assert rows[-1]["loss/discriminator"] > 0
