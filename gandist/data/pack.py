"""Writes image collections as shards: `python -m gandist.data.pack digits FOLDER`."""

import argparse
import io
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import webdataset as wds
from PIL import Image

from gandist.data.order import permutation
from gandist.distributed import run
from gandist.errors import DataError

DIGITS_SHARDS = {"train": (400, 350, 300, 250, 137), "test": (200, 160)}  # uneven on purpose: nothing may rely on size
_SPLIT_SEED = 20


def pack_digits(folder: Path, resolution: int = 16) -> None:
    """Packs scikit-learn's handwritten digits (1,797 grey images of 8×8, 10 classes), enlarged bilinearly.

    Every fifth image of each class, in a fixed shuffled order, is held out: 1,437 to train, 360 to test. The bytes are
    the same on every machine. The folder appears whole or not at all. Raises DataError if it exists.
    """
    if folder.exists():
        raise DataError(f"{folder} exists already: name another folder, or remove it")
    images, labels = _digits(resolution)
    shuffled = permutation(len(labels), _SPLIT_SEED)
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    held_out = np.zeros(len(labels), bool)
    held_out[by_class[::5]] = True
    splits = {"train": shuffled[~held_out[shuffled]], "test": shuffled[held_out[shuffled]]}

    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        partial.chmod(0o755)
        info = {"name": "digits", "resolution": resolution, "channels": 1, "classes": [str(i) for i in range(10)]}
        info["splits"] = {name: _write_split(partial, name, images, labels, splits[name]) for name in splits}
        (partial / "_info.json").write_text(json.dumps(info, indent=2) + "\n")
        try:
            partial.rename(folder)
        except OSError:
            if not folder.exists():  # else another process has packed the same meanwhile
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def shard_names(split: str) -> list[str]:
    return [f"digits-{split}-{shard:02d}.tar" for shard in range(len(DIGITS_SHARDS[split]))]


def _digits(resolution: int) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [1797, resolution, resolution], labels int64 [1797]."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    grey = torch.from_numpy(digits.images).unsqueeze(1) * (255 / 16)
    grey = F.interpolate(grey, size=(resolution, resolution), mode="bilinear", antialias=resolution < 8)
    return grey.squeeze(1).round().to(torch.uint8).numpy(), digits.target.astype(np.int64)


def _write_split(folder: Path, name: str, images: np.ndarray, labels: np.ndarray, samples: np.ndarray) -> dict:
    """Writes the shards of one split; returns its entry in `_info.json`."""
    start = 0
    for filename, size in zip(shard_names(name), DIGITS_SHARDS[name], strict=True):
        with wds.TarWriter(str(folder / filename), mtime=0) as writer:
            for sample in samples[start : start + size]:
                png, cls = encode_png(images[sample]), str(labels[sample])
                writer.write({"__key__": f"{name}-{sample:04d}", "png": png, "cls": cls})
        start += size
    return {
        "name": name,
        "num_samples": len(samples),
        "filenames": shard_names(name),
        "shard_lengths": list(DIGITS_SHARDS[name]),
        "class_counts": np.bincount(labels[samples]).tolist(),
    }


def encode_png(image: np.ndarray) -> bytes:
    """PNG of uint8 [H, W] or [H, W, 3], uncompressed: the same bytes everywhere, and the fastest to decode."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "png", compress_level=0)
    return buffer.getvalue()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m gandist.data.pack",
        description="Write an image collection as WebDataset shards.",
        epilog="example: python -m gandist.data.pack digits data/digits-32 --resolution 32",
    )
    parser.add_argument("collection", choices=["digits"], help="what to pack")
    parser.add_argument("folder", type=Path, help="where to; made by this command")
    parser.add_argument("--resolution", type=int, default=16, metavar="PIXELS", help="default: %(default)s")
    options = parser.parse_args(arguments)
    pack_digits(options.folder, options.resolution)
    print(f"packed {options.collection} at {options.resolution} px into {options.folder}")


if __name__ == "__main__":
    run(main)
