"""The state of a run as tensors by path, and which rank writes which of them."""

from typing import Any

import torch

Tensors = dict[tuple[str, ...], torch.Tensor]  # path in the nested state → tensor


def flatten(tree: dict[str, Any], prefix: tuple[str, ...] = ()) -> Tensors:
    found = {}
    for name, value in tree.items():
        found |= flatten(value, (*prefix, name)) if isinstance(value, dict) else {(*prefix, name): value}
    return found


def nest(tensors: Tensors) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for (*parents, name), tensor in tensors.items():
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = tensor
    return tree


def assign(tensors: Tensors, size: int) -> dict[tuple[str, ...], int]:
    """The rank, of `size`, that writes each of the tensors, which all ranks have: about as many bytes each."""
    loads = [0] * size
    writers = {}
    for path in sorted(tensors, key=lambda path: (-tensors[path].nbytes, path)):
        writers[path] = loads.index(min(loads))
        loads[writers[path]] += tensors[path].nbytes
    return writers


def name_of(path: tuple[str, ...]) -> str:
    """The name of a tensor in a file. Parts of a path have no slash."""
    return "/".join(path)


def path_of(name: str) -> tuple[str, ...]:
    return tuple(name.split("/"))
