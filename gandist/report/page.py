"""The page: what runs tell, side by side, as one HTML file."""

import math
import shlex
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

import jinja2
import yaml
from plotly.offline import get_plotlyjs

import gandist
from gandist.config import RUN_CONFIG
from gandist.report.runs import RATE, Row, Run, flatten

# Groups of curves, in this order; others follow.
GROUPS = ("loss", "logits", "penalty", "grad", "lr", "classification", "throughput", "memory", "health", "skipped")
# How a value was made: the record's key, its column and its format.
MADE = {
    "kimg": ("kimg", "{:g}"),
    "n_fake": ("generated", "{:,}"),
    "n_real": ("real", "{:,}"),
    "split": ("split", "{}"),
    "extractor": ("extractor", "{}"),
    "weights_sha256": ("weights (SHA-256)", "{:.8}…"),
    "resize": ("resized to", "{}"),
    "seed": ("seed", "{}"),
    "ema": ("EMA", "{}"),
    "labels": ("labels", "{}"),
    "truncation": ("truncation", "{:g}"),
    "standing_stats": ("standing statistics", "{}"),
}
START = ("time", "step", "world_size", "device", "git", "slurm_job", "versions")  # what the table of starts tells of each
OWN_KEYS = {"run_dir"}  # of the configuration: differ between any two runs


def render(runs: list[Run]) -> str:
    """The whole page."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("gandist.report", ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    environment.filters |= {"number": _number, "yaml": partial(yaml.safe_dump, sort_keys=False, allow_unicode=True)}
    curves = [run.curves() for run in runs]
    evaluations = [run.evaluation_curves() for run in runs]
    return environment.get_template("page.html.jinja").render(
        runs=runs,
        facts=_facts(runs),
        groups=_grouped(_names(curves)),
        evaluated=_names(evaluations),
        final={name: [run.final().get(name) for run in runs] for name in _names([run.final() for run in runs])},
        made=_made(runs, best=False),
        made_of_best=_made(runs, best=True),
        differences=_differences(runs),
        data=_finite(
            {
                "runs": [run.name for run in runs],
                "curves": curves,
                "evaluations": evaluations,
                "grids": [[vars(grid) for grid in run.grids] for run in runs],
                "confusion": [run.confusion and run.confusion["value"] for run in runs],
                "classes": [run.class_names for run in runs],
            }
        ),
        real=_real(runs),
        commands=_commands,
        starts=_starts,
        plotly=get_plotlyjs(),
        written=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        version=gandist.__version__,
    )


def _number(value: Any) -> str:
    """For people: four decimals, fewer of what is large, thousands apart."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return _text(value)
    if isinstance(value, int) or not math.isfinite(value):
        return f"{value:,}"
    return f"{value:,.4f}" if 1e-3 <= abs(value) < 1e3 or not value else f"{value:,.5g}"


def _text(value: Any) -> str:
    if value is None:
        return "–"
    return ", ".join(map(_text, value)) if isinstance(value, list) else str(value)


def _names(each: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for names in each for name in names))


def _grouped(names: list[str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {group: [] for group in GROUPS}
    for name in names:
        groups.setdefault(name.partition("/")[0], []).append(name)
    return {group: members for group, members in groups.items() if members}


def _facts(runs: list[Run]) -> dict[str, list[str]]:
    """What there is to say of each run; lines that no run has anything to say in are left out."""
    each = [_facts_of(run) for run in runs]
    facts = {name: [facts.get(name) or "–" for facts in each] for name in _names(each)}
    return {name: texts for name, texts in facts.items() if {*texts} != {"–"}}


def _facts_of(run: Run) -> dict[str, str]:
    start, last = run.started, run.metrics[-1]
    data, networks, flat = start.get("data") or {}, start.get("networks") or {}, flatten(run.config)
    facts = {
        "trained": f"{last['kimg']:,g} of {flat.get('train.kimg', '?')} kimg, {last['step']:,} steps",
        "duration": f"{timedelta(seconds=round(run.hours[-1] * 3600))} of training" if run.hours else "",
        "throughput": f"{_number(last[RATE])} images/s" if RATE in last else "",
        "started": " → ".join(row["time"] for row in run.starts if "time" in row),
        "processes": f"{start['world_size']} on {start.get('device', '?')}" if "world_size" in start else "",
        "training data": _count(flat.get("data.train"), data.get("train")),
        "held-out data": _count(flat.get("data.test"), data.get("test")),
        "classes": _text(flat.get("data.num_classes")),
    }
    for name, network in networks.items():
        flops = f", {network['flops'] / 1e9:,.4g} GFLOPs an image forward" if network.get("flops") else ""
        facts[name] = f"{network.get('parameters', 0):,} parameters{flops}"
    versions = start.get("versions") or {}
    facts["software"] = ", ".join(f"{name} {version}" for name, version in versions.items())
    facts["git revision"] = start.get("git") or ""
    facts["Slurm job"] = str(start.get("slurm_job") or "")
    return facts


def _count(source: Any, count: int | None) -> str:
    return _text(source) + (f": {count:,} images" if count is not None else "")


def _real(runs: list[Run]) -> dict[str, list[str]]:
    """The pictures of real images, each once, and the names of the runs that have it."""
    pictures: dict[str, list[str]] = {}
    for run in runs:
        if run.real:
            pictures.setdefault(run.real, []).append(run.name)
    return pictures


def _commands(run: Run) -> list[str]:
    """What starts this run again: the commands that did, each once; if it did not keep them, one of its configuration."""
    kept = [row["command"] for row in run.starts if "command" in row]
    again = f"python -m gandist.train --config {shlex.quote(str(run.folder / RUN_CONFIG))} run_dir=runs/again"
    return list(dict.fromkeys(kept)) or [again]


def _starts(run: Run) -> Row:
    """A table of all starts, without what is told elsewhere."""
    rows = [flatten({name: row[name] for name in START if name in row}) for row in run.starts]
    columns = _names(rows)
    return {"columns": columns, "rows": [[_text(row.get(name)) for name in columns] for row in rows]}


def _made(runs: list[Run], *, best: bool) -> Row:
    """A table of the newest values and how each was made, without columns that are empty."""
    records = [(run.name, record) for run in runs for record in run.final(best=best).values()]
    order = _names([{record["metric"]: None} for _, record in records])
    records.sort(key=lambda each: order.index(each[1]["metric"]))
    columns = {key: made for key, made in MADE.items() if any(key in record for _, record in records)}
    rows = [
        (name, record, [form.format(record[key]) if key in record else "–" for key, (_, form) in columns.items()])
        for name, record in records
    ]
    return {"columns": [title for title, _ in columns.values()], "rows": rows}


def _differences(runs: list[Run]) -> dict[str, list[str]]:
    """Key → its value in each run, of the keys that differ."""
    flats = [flatten(run.config) for run in runs]
    values = {key: [_text(flat[key]) if key in flat else "absent" for flat in flats] for key in _names(flats)}
    return {key: texts for key, texts in values.items() if len({*texts}) > 1 and key not in OWN_KEYS}


def _finite(value: Any) -> Any:
    """As JSON has it: None for what is not finite; and six digits are enough."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_finite(each) for each in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
