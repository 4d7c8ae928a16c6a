"""What a GPU says, within minutes: `python -m benchmarks.device [--minutes N] [--only PART …]`.

Each part is a command with its own share of the time; a part that fails or is not done in time is ended with all its processes,
and the others run all the same. Everything is printed at once, and kept: results.json, results.md and log.txt.
"""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.report import RECORDS, markdown

MACHINE = "machine"  # the first part, which tells whether there is a GPU
NO_GPU = "needs a GPU"


@dataclass(frozen=True)
class Part:
    """arguments: of python; seconds: its share of the minutes, beside those of the others; gpu: whether it is about one"""

    name: str
    seconds: float
    arguments: Sequence[str]
    gpu: bool = True


def throughput(config: str, batch_size: int, rungs: Sequence[str], rounds: int) -> list[str]:
    size = [f"--batch-size={batch_size}", f"--rounds={rounds}", "--steps=3"]
    return ["-m", "benchmarks.throughput", config, *size, "--profile", "--rungs", *rungs]


LADDER = ["bfloat16", "channels last", "compiled"]
PARTS = [
    Part(MACHINE, 20, ["-m", "benchmarks.machine"], gpu=False),
    Part("short-run", 45, ["-m", "benchmarks.resume", "train.compile=false"], gpu=False),
    Part("agreement", 40, ["-m", "benchmarks.agreement"]),
    Part("convolutions", 25, ["-m", "benchmarks.convolution_kinds"]),
    Part("r3gan", 180, throughput("configs/cifar10-r3gan.yaml", 64, LADDER, rounds=2)),
    Part("biggan", 90, throughput("configs/imagenet128-biggan-256.yaml", 32, LADDER[1:], rounds=2)),
    Part("stylegan2", 90, throughput("configs/ffhq256-stylegan2-ada.yaml", 8, LADDER, rounds=1)),
    Part("graphs", 50, throughput("configs/digits.yaml", 64, ["compiled", "CUDA graphs"], rounds=1)),
]


@dataclass
class Result:
    """outcome: "ok", or in one line what went wrong; rows: those of its tables, by their titles"""

    seconds: float
    limit: float
    outcome: str
    rows: dict[str, list[dict[str, str]]]


def run_part(part: Part, limit: float, environment: dict[str, str], log: Path) -> Result:
    """Runs it for at most `limit` seconds; what it prints goes to the console and to the log."""
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        records = Path(folder, "records.jsonl")
        process = subprocess.Popen(
            [sys.executable, "-u", *part.arguments],
            env=os.environ | environment | {RECORDS: str(records)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that all its processes can be ended together
            text=True,
            errors="replace",
        )
        last = [""]
        reader = threading.Thread(target=_pass_on, args=(process.stdout, log, last), daemon=True)
        reader.start()
        try:
            code = process.wait(limit)
            outcome = "ok" if code == 0 else f"exit status {code}: {last[0]}"
        except subprocess.TimeoutExpired:
            outcome = f"not done after {limit:.0f} s"
        finally:  # also where this is stopped itself
            _kill_all(process)
        reader.join(5)
        return Result(round(time.monotonic() - begin, 1), round(limit, 1), outcome, _rows(records))


def _pass_on(stream, log: Path, last: list[str]) -> None:
    """Lines of the stream, as they come; `last` becomes the last one that says something. Python's warnings of what a process
    leaves behind come after its error."""
    with log.open("a") as file:
        for line in stream:
            print(line, end="", flush=True)
            file.write(line)
            if line.strip() and "warn" not in line:
                last[0] = line.strip()[:200]


def _kill_all(process: subprocess.Popen) -> None:
    """It and what it started, which may outlive it."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _rows(records: Path) -> dict[str, list[dict[str, str]]]:
    found: dict[str, list[dict[str, str]]] = {}
    for line in records.read_text().splitlines() if records.exists() else []:
        each = json.loads(line)
        found.setdefault(each["table"], []).append(each["row"])
    return found


def page(command: str, results: dict[str, Result]) -> str:
    """Markdown, to be put into docs/performance.md as it is."""
    machine = {row["machine"]: row[""] for row in results.get(MACHINE, Result(0, 0, "", {})).rows.get(MACHINE, [])}
    on = ", ".join(f"{name} {machine[name]}" for name in ("GPU", "driver", "torch", "CUDA", "cuDNN") if name in machine)
    lines = [f"`{command}`, {datetime.now(UTC):%Y-%m-%d}, {on or 'an unknown machine'}:", ""]
    outcomes = [[name, f"{each.seconds:.0f} of {each.limit:.0f}", each.outcome] for name, each in results.items()]
    lines += [markdown(["part", "s", "outcome"], outcomes), ""]
    for name, result in results.items():
        for title, rows in result.rows.items():
            head = list(rows[0])
            lines += [f"{name}: {title}", "", markdown(head, [[row.get(column, "") for column in head] for row in rows]), ""]
    return "\n".join(lines)


def run_parts(parts: Sequence[Part], minutes: float, output: Path, cache: Path, command: str) -> dict[str, Result]:
    """In their order; what one leaves of its time goes to those after it. Writes the results after each."""
    end = time.monotonic() + 60 * minutes
    caches = {"TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"), "TRITON_CACHE_DIR": str(cache / "triton")}
    results: dict[str, Result] = {}
    without_gpu = False
    for number, part in enumerate(parts):
        share = part.seconds / sum(each.seconds for each in parts[number:])
        limit = share * max(0.0, end - time.monotonic())
        print(f"\n## {part.name}, for at most {limit:.0f} s: python {shlex.join(part.arguments)}", flush=True)
        if part.gpu and without_gpu:
            results[part.name] = Result(0.0, round(limit, 1), NO_GPU, {})
        else:
            results[part.name] = run_part(part, limit, caches, output / "log.txt")
        print(f"{part.name}: {results[part.name].outcome}", flush=True)
        without_gpu = without_gpu or {"machine": "GPU", "": "none"} in results[part.name].rows.get(MACHINE, [])
        stored = {"command": command, "parts": {name: asdict(each) for name, each in results.items()}}
        (output / "results.json").write_text(json.dumps(stored, indent=2) + "\n")
        (output / "results.md").write_text(page(command, results))
    return results


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.device", description=__doc__.partition("\n")[0])
    names = [part.name for part in PARTS]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="PART", help=f"of {', '.join(names)}")
    parser.add_argument("--minutes", type=float, default=9, help="for all of it (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="folder of the results (default: a temporary one)")
    parser.add_argument(
        "--cache", type=Path, help="folder of compiled code, to be kept for the next time (default: in --output)"
    )
    options = parser.parse_args(arguments)
    output = options.output or Path(tempfile.mkdtemp(prefix="gandist-device-"))
    output.mkdir(parents=True, exist_ok=True)
    given = sys.argv[1:] if arguments is None else arguments
    command = shlex.join(["python", "-m", "benchmarks.device", *given])
    parts = [part for part in PARTS if part.name in {MACHINE, *options.only}]
    results = run_parts(parts, options.minutes, output, options.cache or output / "compiled", command)
    print(f"\n{page(command, results)}\nresults: {output}", flush=True)
    if any(result.outcome not in ("ok", NO_GPU) for result in results.values()):
        sys.exit(1)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # by way of the part that runs, which is ended too
    main()
