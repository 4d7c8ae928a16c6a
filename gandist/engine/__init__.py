"""How the players are updated: with DistributedDataParallel, or with DeepSpeed."""

from torch import nn

from gandist.config import Config, Cosine
from gandist.distributed import World
from gandist.engine.compilation import Compilations, choose_compile, compile_player, keep_compiled
from gandist.engine.ddp import DDPPlayer
from gandist.engine.player import Player, frozen
from gandist.engine.precision import Precision, choose_precision, set_determinism

__all__ = [
    "Compilations",
    "Player",
    "Precision",
    "build_player",
    "choose_compile",
    "choose_precision",
    "compile_player",
    "frozen",
    "keep_compiled",
    "set_determinism",
]


def build_player(
    name: str, objective: nn.Module, config: Config, world: World, precision: Precision, *, lr: float | Cosine
) -> Player:
    """name: as errors and statistics call it; lr: Adam's learning rate. Takes the objective's parameters as they are."""
    if config.engine == "deepspeed":
        from gandist.engine.zero import DeepSpeedPlayer  # which loads DeepSpeed

        return DeepSpeedPlayer(name, objective, config, world, precision, lr=lr)
    return DDPPlayer(name, objective, config, world, precision, lr=lr)
