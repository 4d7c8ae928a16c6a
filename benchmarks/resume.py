"""A short run and its resumption, by the commands that a user types: `python -m benchmarks.resume [key=value …]`. Prints what
worked; exit status 1 if something did not."""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path

from benchmarks.photos import CLASSES, PhotoSet
from benchmarks.report import header, record, table
from gandist import checkpoint

PHOTOS = PhotoSet(16, 2_000, 4, quality=90, grain=8)  # in place of the digits, for which scikit-learn is wanted
COLUMNS = ["step", "result", "s"]


def settings(folder: Path, kimg: float, overrides: Sequence[str]) -> list[str]:
    photos = PHOTOS.folder(folder)
    return [
        f"data.train={photos}/{{0000..0002}}.tar",
        f"data.test={photos}/0003.tar",
        f"data.num_classes={CLASSES}",
        f"data.cache_dir={folder}/cache",
        f"run_dir={folder}/run",
        "evaluation.metrics=[fd_classifier]",
        f"evaluation.judge={files('gandist.evaluation') / 'weights' / 'digits_judge.pt'}",
        f"evaluation.every_kimg={kimg}",
        "evaluation.num_images=500",
        "tracking.wandb=off",
        *overrides,
    ]


def train(arguments: list[str]) -> str:
    code = subprocess.run([sys.executable, "-m", "gandist.train", *arguments], check=False).returncode
    if code:
        raise RuntimeError(f"gandist.train ended with status {code}, see above")
    return "ok"


def evaluated(run_dir: Path) -> str:
    lines = (run_dir / "evaluations.jsonl").read_text().splitlines()
    values = [record for record in map(json.loads, lines) if "value" in record]
    return ", ".join(f"{each['metric']} {each['value']:.4g}" for each in values[:1])


def saved(run_dir: Path) -> str:
    newest = checkpoint.complete_steps(run_dir)[-1]
    subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=newest, check=True)
    return f"ok, {newest.name}"


def resumed(run_dir: Path, before: int) -> str:
    """before: the step at which the first run ended"""
    steps = [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    if not before < steps[-1] < 2 * before or len(set(steps)) != len(steps):
        raise ValueError(f"metrics.jsonl has steps {steps}, but the first run ended at {before}")
    return f"ok, from step {before} to {steps[-1]}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.resume", description=__doc__)
    parser.add_argument(
        "--kimg", type=float, default=5, help="of the first run; the second: a fifth more (default: %(default)s)"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for both")
    options = parser.parse_args(arguments)
    print(header(), flush=True)
    rows = []

    def attempt(step: str, work: Callable[..., str], *given: object) -> bool:
        begin = time.perf_counter()
        try:
            result, done = work(*given), True
        except Exception as error:
            result, done = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}", False
        rows.append([step, result, f"{time.perf_counter() - begin:.1f}"])
        record("short run", COLUMNS, rows[-1])
        return done

    with tempfile.TemporaryDirectory() as temporary:
        run_dir = Path(temporary, "run")
        common = settings(Path(temporary), options.kimg, options.overrides)
        done = attempt("train", train, [*common, f"train.kimg={options.kimg}"])
        done = done and attempt("evaluate", evaluated, run_dir) and attempt("save", saved, run_dir)
        if done:
            before = checkpoint.read_meta(checkpoint.complete_steps(run_dir)[-1])["step"]
            done = attempt("train on", train, [*common, f"train.kimg={1.2 * options.kimg}"])
            done = done and attempt("resume", resumed, run_dir, before)
    print(table(COLUMNS, rows), flush=True)
    if not done:
        sys.exit(1)


if __name__ == "__main__":
    main()
