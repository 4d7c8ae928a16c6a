"""Errors a user can act on. Each text says what is wrong, where, and what to do."""


class GandistError(Exception):
    """`on_every_rank`: all ranks raise the same error, so rank 0 alone prints it."""

    on_every_rank = False


class ConfigError(GandistError):
    on_every_rank = True


class DataError(GandistError):
    pass


class CheckpointError(GandistError):
    pass


class TrainingError(GandistError):
    pass
