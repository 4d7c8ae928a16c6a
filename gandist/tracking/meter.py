"""Statistics of training steps, summed on the device and read once an interval."""

import math
from collections import defaultdict
from collections.abc import Iterable

import torch

from gandist.distributed import World

Scalars = dict[str, float]
_SQUARE = "_square"


class Meter:
    """Means of statistics since the last reading and over all ranks; the device is waited for only when read.

    Values that are not finite are left out, as the updates they come from are.
    """

    def __init__(self, world: World):
        self.world = world
        self._totals: dict[tuple[str, ...], torch.Tensor] = {}  # names → their sums and counts, [2, len(names)]

    def update(self, statistics: Iterable[dict[str, torch.Tensor]]) -> None:
        """Scalars of one optimizer step."""
        for each in statistics:
            values = torch.stack(list(each.values())).double()
            finite = values.isfinite()
            total = torch.stack([torch.where(finite, values, 0), finite.double()])
            names = tuple(each)
            self._totals[names] = self._totals[names] + total if names in self._totals else total

    def read(self) -> Scalars:
        """Every rank calls it, after at least one update. A name of which no value was finite is left out."""
        names = [name for each in self._totals for name in each]  # some in several: there are penalties in some steps only
        sums, counts = self.world.sum(torch.cat(list(self._totals.values()), 1)).tolist()
        self._totals = {}
        totals = defaultdict(lambda: [0.0, 0.0])
        for name, *total in zip(names, sums, counts, strict=True):
            totals[name] = [a + b for a, b in zip(totals[name], total, strict=True)]
        return _derive({name: total / count for name, (total, count) in totals.items() if count})


def _derive(means: Scalars) -> Scalars:
    """Standard deviations from means of squares, which do not depend on how samples were dealt to ranks; and of what is known
    of labelled images alone, the mean over these."""
    values = dict(means)
    for name in means:
        if name.endswith(_SQUARE):
            of = name.removesuffix(_SQUARE)
            values[f"{of}_std"] = math.sqrt(max(0.0, values.pop(name) - means[of] ** 2))
    if "classification/labelled" in means:
        for name in {"loss/classification", "classification/train_top1"} & means.keys():
            values[name] /= max(means["classification/labelled"], 1e-9)
    return values
