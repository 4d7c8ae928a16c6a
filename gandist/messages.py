"""What the ranks tell each other, as bytes: JSON, with arrays behind it. To read a message runs nothing that is in it.

A message is a safetensors file in memory. Its array `_VALUE` is JSON, in which lists stand for themselves and every other
container for an object with one key that names its type.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load, save

from gandist.errors import GandistError

_VALUE = "value"
_ATOMS = (type(None), bool, int, float, str)
_MALFORMED = (SafetensorError, ValueError, LookupError, TypeError, AttributeError, RecursionError, OverflowError)


def encode(value: Any) -> bytes:
    """None, truth values, numbers, text, bytes, paths, arrays and tensors (which arrive on the CPU); lists, tuples and dicts of
    these. Raises TypeError for any other type, also for a NamedTuple: send a tuple, and make it again."""
    arrays: dict[str, np.ndarray] = {}
    text = json.dumps(_to_json(value, arrays))
    return save({_VALUE: np.frombuffer(text.encode(), np.uint8), **arrays})


def decode(message: bytes) -> Any:
    """The value that `encode` was given. Raises GandistError for what is no such message."""
    try:
        arrays = load(message)
        return _from_json(json.loads(arrays[_VALUE].tobytes()), arrays)
    except _MALFORMED as error:
        reason = f"{type(error).__name__}: {str(error)[:100]}"
        raise GandistError(
            f"a message that no rank of this run sends was received ({reason}): all ranks must run the same version of "
            "gandist, and no other program may connect to them (docs/security.md)"
        ) from error


def _to_json(value: Any, arrays: dict[str, np.ndarray]) -> Any:
    def each(values: Any) -> list:
        return [_to_json(item, arrays) for item in values]

    if isinstance(value, _ATOMS):
        return value
    if isinstance(value, Path):
        return {"path": str(value)}
    if isinstance(value, bytes):
        return {"bytes": value.hex()}
    if isinstance(value, torch.Tensor):
        return {"tensor": _put(value.detach().cpu().numpy(), arrays)}
    if isinstance(value, np.ndarray):
        return {"array": _put(value, arrays)}
    if type(value) is list:
        return each(value)
    if type(value) is tuple:
        return {"tuple": each(value)}
    if type(value) is dict:
        return {"dict": [each(item) for item in value.items()]}
    raise TypeError(f"a {type(value).__name__} is not sent between ranks")


def _put(array: np.ndarray, arrays: dict[str, np.ndarray]) -> str:
    name = str(len(arrays))
    arrays[name] = np.asarray(array, order="C")  # safetensors takes the memory as it is
    return name


def _from_json(value: Any, arrays: dict[str, np.ndarray]) -> Any:
    def each(values: list) -> list:
        return [_from_json(item, arrays) for item in values]

    if isinstance(value, list):
        return each(value)
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "path":
        return Path(content)
    if kind == "bytes":
        return bytes.fromhex(content)
    if kind == "tensor":
        return torch.from_numpy(arrays[content])
    if kind == "array":
        return arrays[content]
    if kind == "tuple":
        return tuple(each(content))
    if kind == "dict":
        return dict(map(each, content))
    raise ValueError(f"type {kind!r}")
