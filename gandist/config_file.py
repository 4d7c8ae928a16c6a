"""Reading a configuration: a YAML file and `key=value` overrides, and errors a person can read."""

import difflib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from gandist.config import RUN_CONFIG, Config, Section
from gandist.errors import ConfigError


def load_config(path: str | Path | None = None, overrides: Iterable[str] = ()) -> Config:
    """The configuration of a YAML file (`None`: the defaults) with `section.key=value` overrides, whose values are YAML.

    Raises ConfigError with every mistake at once.
    """
    return _resolve(_read_yaml(Path(path)) if path else {}, overrides, path or "configuration")


def load_run_config(run_dir: Path, overrides: Iterable[str] = ()) -> Config:
    """The configuration that is kept in the folder of a run, with overrides. Raises ConfigError.

    The folder may be somebody else's: what its configuration permits does not count, what an override permits does.
    """
    values = _read_yaml(run_dir / RUN_CONFIG)
    if not values:
        raise ConfigError(f"{run_dir / RUN_CONFIG} is empty: start the run again, which writes it")
    return _resolve(values | {"data": without_permissions(values.get("data", {}))}, overrides, run_dir / RUN_CONFIG)


def without_permissions(data: Any) -> Any:
    """The data section that came in a folder: only users themselves permit commands."""
    return {key: value for key, value in data.items() if key != "allow_pipe"} if isinstance(data, dict) else data


def _resolve(values: dict, overrides: Iterable[str], where: str | Path) -> Config:
    mistakes = [mistake for override in overrides if (mistake := _apply_override(values, override))]
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        mistakes += dict.fromkeys(_explain(entry) for entry in error.errors())
    if mistakes:
        lines = "\n".join(f"  {mistake}" for mistake in mistakes)
        raise ConfigError(f"{where}: {len(mistakes)} mistake(s)\n{lines}")
    return config


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML that refuses a key written twice (PyYAML silently keeps the last)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value]
        if repeated := {key for key in keys if keys.count(key) > 1}:
            raise yaml.constructor.ConstructorError(
                None, None, f"key written twice: {', '.join(sorted(repeated))}", node.start_mark
            )
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> dict:
    try:
        values = yaml.load(path.read_text(), _UniqueKeyLoader)
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict | None):
        raise ConfigError(f"{path}: sections are wanted, such as 'train:', not a {type(values).__name__}")
    return values or {}


def _apply_override(values: dict, override: str) -> str | None:
    """Sets one `key=value` in place; returns what is wrong with it, if anything."""
    key, equals, text = override.partition("=")
    if not equals or not key or key.startswith("-"):
        return f"{override!r}: an override is written key=value, such as train.kimg=200"
    *sections, leaf = key.split(".")
    for section in sections:
        child = values.get(section)
        values[section] = values = dict(child) if isinstance(child, dict) else {}
    try:
        values[leaf] = yaml.load(text, _UniqueKeyLoader)
    except yaml.YAMLError as error:
        return f"{key}: {' '.join(str(error).split())}"
    return None


def _explain(entry: dict) -> str:
    # Parts in brackets or named like types are pydantic's names for the members of a union.
    path = ".".join(str(part) for part in entry["loc"] if part not in ("str", "number", "cosine") and "[" not in str(part))
    if entry["type"] == "extra_forbidden":
        key = _nearest_key(path)
        return f"{path}: unknown key" + (f", did you mean '{key}'?" if key else "")
    message = entry["msg"].removeprefix("Value error, ")
    if entry["loc"][-1:] in [("str",), ("tuple[str, ...]",)]:
        message = "a text, or a list of texts, is wanted"
    if entry["type"] == "literal_error":
        expected = entry["ctx"]["expected"].replace("'", "").replace(" or ", ", ").split(", ")
        return f"{path}: {entry['input']!r} is not one of {', '.join(expected)}{nearest(str(entry['input']), expected)}"
    if entry["type"] == "model_type":
        message = f"a section is wanted here, such as {path}:, with its keys below it"
    if isinstance(entry["input"], str | int | float | None):
        message += f" (got {entry['input']!r})"
    return f"{path}: {message}" if path else message


def nearest(word: str, known: Sequence[str]) -> str:
    """What to add to an error about an unknown word."""
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean '{close[0]}'?" if close else ""


def _nearest_key(path: str) -> str | None:
    keys = list(_dotted_keys(Config))
    if close := difflib.get_close_matches(path, keys, n=1, cutoff=0.75):
        return close[0]
    leaves = {key.rpartition(".")[2]: key for key in reversed(keys)}
    close = difflib.get_close_matches(path.rpartition(".")[2], leaves, n=1, cutoff=0.6)
    return leaves[close[0]] if close else None


def _dotted_keys(section: type[Section], prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        yield prefix + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from _dotted_keys(field.annotation, f"{prefix}{name}.")
