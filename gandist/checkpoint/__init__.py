"""Checkpoints: saved whole or not at all, verified before they are loaded.

`step-00012000/` holds the tensors, a safetensors file of each rank's share; `index.json`, which names the file of each tensor;
`meta.json` with the counters and how the run was made; and `SHA256SUMS` (`sha256sum -c SHA256SUMS` checks it by hand). A folder
has its final name only when all of it is on the disk.
"""

from gandist.checkpoint.folder import FOLDER, all_steps, checkpoint_path, complete_steps, is_checkpoint, read_meta
from gandist.checkpoint.identity import refuse_other_run
from gandist.checkpoint.loading import AVERAGED, choose, load, newest, read, verify
from gandist.checkpoint.retention import best
from gandist.checkpoint.saving import Saver, save
from gandist.checkpoint.tensors import Tensors, flatten, nest

__all__ = [
    "AVERAGED",
    "FOLDER",
    "Saver",
    "Tensors",
    "all_steps",
    "best",
    "checkpoint_path",
    "choose",
    "complete_steps",
    "flatten",
    "is_checkpoint",
    "load",
    "nest",
    "newest",
    "read",
    "read_meta",
    "refuse_other_run",
    "save",
    "verify",
]
