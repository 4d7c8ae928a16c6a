"""What every place has to which numbers and pictures of a run are sent."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from PIL import Image
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

from gandist.evaluation.evaluator import Evaluation
from gandist.tracking.meter import Scalars

GRID_CELL = 64  # pixels that a small image is enlarged to at least


@dataclass(frozen=True)
class Samples:
    """grid: generated images, one row a class; diversity: of these, as a share of the real ones'

    logits: of the discriminator, of "real" and "fake" images
    """

    grid: Image.Image
    diversity: float | None = None
    logits: dict[str, list[float]] = field(default_factory=dict)

    @property
    def scalars(self) -> Scalars:
        return {} if self.diversity is None else {"health/diversity": self.diversity}


class Tracker:
    """A place to send things to. `progress` is {"step", "kimg"}."""

    def step(self, progress: dict) -> None:
        """A training step is on its way."""

    def scalars(self, progress: dict, values: Scalars) -> None:
        """Means of an interval."""

    def evaluation(self, progress: dict, evaluation: Evaluation) -> None:
        """The measured values."""

    def real(self, grid: Image.Image) -> None:
        """Real images, one row a class; once, at the start."""

    def samples(self, progress: dict, samples: Samples) -> None:
        """Generated images."""

    def finish(self) -> None:
        """Nothing more comes."""


@dataclass(frozen=True)
class StepReport:
    """What there is to report of a step; false where that is nothing but that it was made.

    progress: {"step", "kimg"}; scalars: means of the interval that ends with this step
    """

    progress: dict
    scalars: Scalars | None = None
    samples: Samples | None = None
    evaluation: Evaluation | None = None

    def __bool__(self) -> bool:
        return any(each is not None for each in (self.scalars, self.samples, self.evaluation))

    def tell(self, tracker: Tracker) -> None:
        tracker.step(self.progress)
        if self.samples:
            tracker.samples(self.progress, self.samples)
        if self.scalars:
            tracker.scalars(self.progress, self.scalars | (self.samples.scalars if self.samples else {}))
        if self.evaluation:
            tracker.evaluation(self.progress, self.evaluation)


class Trackers:
    """All trackers of a run, as one; false without any. What one of them cannot write is a warning and never ends the run.

    files: those that keep the run folder's own files
    """

    def __init__(self, files: Sequence[Tracker] = (), others: Sequence[Tracker] = ()):
        self._files = files
        self._others = others
        self._warned: set[str] = set()  # files

    def __bool__(self) -> bool:
        return bool(self._files or self._others)

    def record(self, report: StepReport) -> None:
        """Writes a step into the files."""
        self._each(self._files, report.tell)

    def tell(self, report: StepReport) -> None:
        """Tells a step to all others."""
        self._each(self._others, report.tell)

    def real(self, grid: Image.Image) -> None:
        self._each([*self._files, *self._others], lambda tracker: tracker.real(grid))

    def finish(self) -> None:
        self._each([*self._files, *self._others], lambda tracker: tracker.finish())

    def _each(self, trackers: Sequence[Tracker], tell: Callable[[Tracker], None]) -> None:
        for tracker in trackers:
            try:
                tell(tracker)
            except OSError as error:
                if error.filename not in self._warned:
                    self._warned.add(error.filename)
                    print(f"warning: {error.filename}: {error.strerror}; the run goes on without it", flush=True)


def per_class_columns(evaluation: Evaluation) -> dict[str, list[float]]:
    """What was measured of each class: of the class head on the held-out images, and of the generated ones."""
    report = evaluation.report
    head = {"precision": report.precision, "recall": report.recall, "f1": report.f1} if report else {}
    return head | {name.rpartition("/")[2].removesuffix("_per_class"): values for name, values in evaluation.per_class.items()}


def evaluation_table(evaluation: Evaluation, class_names: list[str]) -> str:
    """The values, and those of each class."""
    lines = [
        f"{record.metric:<38} {record.value:.4f}" + (f" ± {record.spread:.4f}" if record.spread is not None else "")
        for record in evaluation.records
    ]
    if columns := per_class_columns(evaluation):
        width = max(len(name) for name in (*class_names, "class"))
        lines.append(f"\n{'class':<{width}}" + "".join(f"  {name:>9}" for name in columns))
        rows = zip(class_names, *columns.values(), strict=True)
        lines += [f"{name:<{width}}" + "".join(f"  {value:>9.4f}" for value in values) for name, *values in rows]
    return "\n".join(lines)


def sample_grid(images: torch.Tensor, columns: int) -> Image.Image:
    """uint8 [N, C, H, W] → a picture with `columns` images a row; small images are enlarged."""
    enlarge = max(1, GRID_CELL // max(images.shape[2:]))
    grid = make_grid(images.repeat_interleave(enlarge, 2).repeat_interleave(enlarge, 3), columns)
    return to_pil_image(grid.cpu())
