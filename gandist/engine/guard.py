"""The numerical guard: updates whose gradient is not finite are seen and left out on the device, and told of later."""

import torch

from gandist.errors import TrainingError

PATIENCE = 50  # updates in a row that may be left out before a run that skips them counts as diverged


class NumericalGuard:
    """Watches the updates of one player.

    `found` is decided on the device from the gradient that all ranks share, so every rank leaves out the same updates, and
    the host is never waited for. stops: whether one such update ends the run; else PATIENCE of them in a row do.
    """

    def __init__(self, player: str, device: torch.device, *, stops: bool):
        self.player = player
        self.stops = stops
        self._skipped = torch.zeros((), dtype=torch.int64, device=device)  # since the last report
        self._in_a_row = torch.zeros_like(self._skipped)
        self._first = torch.zeros_like(self._skipped)  # step of the first since the last report

    def watch(self, gradient_norm: torch.Tensor, step: int) -> torch.Tensor:
        """gradient_norm [] of the update about to be made → `found`, float32 []: 1 where it must be left out, else 0."""
        bad = gradient_norm.isfinite().logical_not()
        self._first.copy_(torch.where(bad & (self._skipped == 0), step, self._first))
        self._skipped += bad
        self._in_a_row.add_(1).mul_(bad)
        return bad.float()

    def report(self) -> int:
        """Updates left out since the last report. Waits for the device. Raises TrainingError where the run must stop."""
        skipped, in_a_row, first = torch.stack([self._skipped, self._in_a_row, self._first]).tolist()
        self._skipped.zero_()
        if skipped and self.stops:
            reason = "train.non_finite=skip leaves out such updates, if they are rare"
        elif in_a_row >= PATIENCE:
            reason = f"{in_a_row} updates in a row had to be left out"
        else:
            return skipped
        raise TrainingError(
            f"the gradient of the {self.player} was not finite at step {first}: {reason}. The newest checkpoint is from "
            "before; lower the learning rates, set optimizer.clip_norm, or use train.precision=float32",
            on_every_rank=True,
        )
