"""Distributed training of class-conditional GANs whose discriminator also classifies.

In Python there are `load`, of a trained GAN that generates, classifies and translates; `Config` and `load_config`; and
`train_run` and `evaluate_run`, which do what the commands do. They are imported when they are first asked for, as each
command imports this package, too.
"""

import signal
import sys
from importlib import import_module
from typing import Any

__version__ = "0.1.0"
_HOMES = {
    "Config": "gandist.config",
    "TrainedGAN": "gandist.trained",
    "evaluate_run": "gandist.api",
    "load": "gandist.trained",
    "load_config": "gandist.config_file",
    "train_run": "gandist.api",
}
__all__ = ["__version__", *_HOMES]

if sys.argv[:1] == ["-m"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # Python is about to start one of the commands. A Ctrl-C while that imports torch ends it without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'gandist' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)
