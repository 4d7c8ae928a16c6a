"""Published weights: from a file or from the network, and never read before their SHA-256 is the published one."""

import hashlib
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch

from gandist.config import DataConfig
from gandist.data.cache import ShardCache
from gandist.data.remote import Remote
from gandist.errors import ConfigError, DataError


class Published(NamedTuple):
    """sha256: all of it, or as many of its first digits as were published; key: of the configuration, that names a copy"""

    url: str
    sha256: str
    key: str


def load_weights(published: Published, path: Path | None, data: DataConfig) -> tuple[dict[str, Any], str]:
    """The state dict, and the file's SHA-256.

    path: a copy of the file. Without, it is downloaded into `data.cache_dir`, once a node: the others wait for it.
    Raises ConfigError for a file that is not there or is another one, DataError where it cannot be downloaded.
    """
    if path is None:
        cache = ShardCache(data.cache_folder / "weights", data.cache_limit, Remote())
        try:
            file = cache.fetch(published.url, lambda arrived: _check_download(arrived, published))
        except DataError as error:
            raise DataError(f"{error}; or name a copy of the file in {published.key}") from error
    else:
        try:
            file = path.open("rb")
        except OSError as error:
            raise ConfigError(f"{published.key}={path}: {error.strerror}", on_every_rank=False) from error
    with file:
        digest = sha256(file)
        if not digest.startswith(published.sha256):
            raise ConfigError(
                f"{published.key}: {path or published.url} is not the file that was published: its SHA-256 is {digest}, "
                f"not {published.sha256}{'…' if len(published.sha256) < 64 else ''}; get it from {published.url}",
                on_every_rank=False,
            )
        return torch.load(file, map_location="cpu", weights_only=True), digest


def sha256(file: BinaryIO) -> str:
    """Of all of the file, which then stands at its beginning again."""
    file.seek(0)
    digest = hashlib.file_digest(file, "sha256").hexdigest()
    file.seek(0)
    return digest


def _check_download(path: Path, published: Published) -> None:
    with path.open("rb") as file:
        if not (digest := sha256(file)).startswith(published.sha256):
            raise DataError(f"{published.url}: what was downloaded has the SHA-256 {digest}, not {published.sha256}")
