"""The state of a run as tensors by path, and the ranks' shares of it."""

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


def share(tensors: Tensors, rank: int, size: int) -> Tensors:
    """What one of `size` ranks writes of tensors that all of them have: about as many bytes each, each tensor once."""
    loads = [0] * size
    mine = {}
    for path in sorted(tensors, key=lambda path: (-tensors[path].nbytes, path)):
        writer = loads.index(min(loads))
        loads[writer] += tensors[path].nbytes
        if writer == rank:
            mine[path] = tensors[path]
    return mine
