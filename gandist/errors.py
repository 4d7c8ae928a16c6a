"""Errors a user can act on. Each text says what is wrong, where, and what to do, and holds no secrets."""

from gandist.redaction import redact


class GandistError(Exception):
    """`on_every_rank`: all ranks raise the same error, so rank 0 alone prints it."""

    def __init__(self, message: str, *, on_every_rank: bool = False):
        super().__init__(redact(message))
        self.on_every_rank = on_every_rank


class ConfigError(GandistError):
    """The configuration, or how it fits the ranks: known to all of them."""

    def __init__(self, message: str, *, on_every_rank: bool = True):
        super().__init__(message, on_every_rank=on_every_rank)


class DataError(GandistError):
    """A shard or a sample."""


class CheckpointError(GandistError):
    """A checkpoint that cannot be written, or not be loaded."""


class RunFolderError(GandistError):
    """A run folder that this run may not write to: another one owns it."""


class TrainingError(GandistError):
    """A run that cannot go on."""


class ReportError(GandistError):
    """A report that cannot be made."""
