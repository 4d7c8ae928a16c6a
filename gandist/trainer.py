"""Builds a run in order, and the loop."""

import resource
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, nullcontext, suppress
from pathlib import Path

import torch
import webdataset
from torch.profiler import record_function

import gandist
from gandist import checkpoint
from gandist.augment import flip
from gandist.config import Config
from gandist.data import DeviceBatch, normalize, open_dataset, upload
from gandist.distributed import World
from gandist.ema import ExponentialMovingAverage
from gandist.engine import (
    Compilations,
    Player,
    build_player,
    choose_compile,
    choose_precision,
    compile_player,
    frozen,
    keep_compiled,
    set_determinism,
)
from gandist.environment import describe_start
from gandist.errors import CheckpointError, ConfigError, DataError, TrainingError
from gandist.evaluation.evaluator import BEST, Evaluation, Evaluator
from gandist.flops import count_run, peak_flops
from gandist.json_lines import read_rows
from gandist.models import build_discriminator, build_generator, freeze, recompute_activations
from gandist.models.spectral_norm import FIRST_ITERATIONS, power_iteration
from gandist.objective import DiscriminatorObjective, GeneratorObjective
from gandist.ownership import Claim
from gandist.preemption import Stopped, StopRequest
from gandist.preview import Preview
from gandist.profiling import StepProfiler
from gandist.randomness import Columns, Purpose, StepRandomness
from gandist.schedule import number_at, scheduled
from gandist.summary import describe, summarize
from gandist.tracking import EVALUATIONS, Meter, Scalars, StepReport, Trackers, open_trackers
from gandist.trained import TrainedGAN, take_over

NAMED_SKIPS = 10  # skipped samples that are named, and that are always allowed


class Trainer:
    """One run, on one rank. Its state is `step`, `images`, `evaluation_pending` and the tensors of `state_dict`; all
    else follows from these.

    images:             real images shown to the discriminator so far
    evaluation_pending: whether this step is yet to be evaluated: a stop may come in the midst of it
    claim:              on the run folder; None: nothing is written there, or by another rank
    """

    def __init__(self, config: Config, world: World, claim: Claim | None = None):
        _check_batch_size(config, world)
        self.config = config
        self.world = world
        self.accumulation = config.train.accumulation_on(world.size)
        if "cas" in config.evaluation.metrics:
            raise ConfigError(
                "evaluation.metrics has cas, which trains a classifier each time: measure it when the run has ended, with "
                f"python -m gandist.evaluate {config.run_dir} metrics=[cas]"
            )
        self.watchdog = world.watchdog
        self._confirm_owner = claim.confirm if claim else lambda: None
        self.step = 0
        self.images = 0
        self.evaluation_pending = False
        self.images_per_step = config.train.batch_size * config.train.discriminator_updates

        # Open the data.
        self.train_set = open_dataset(config.data.train, config.data, world)
        self.randomness = StepRandomness(
            config.seed,
            config.train.batch_size,
            config.model.latent_dim,
            self.train_set.class_counts,
            world.rank,
            world.size,
        )

        # Build the networks, equal on all ranks.
        set_determinism(config.train.deterministic)
        self.precision = choose_precision(config.train.precision, world.device)
        placement = {"device": world.device, "dtype": self.precision.dtype, "memory_format": torch.channels_last}
        torch.manual_seed(config.seed)
        generator = build_generator(config.model, config.data).to(**placement)
        discriminator = build_discriminator(config.model, config.data).to(**placement)
        self.ema = ExponentialMovingAverage(generator, config.ema)
        freeze(discriminator, config.train.freeze_d)
        if config.train.activation_checkpointing:
            recompute_activations(generator)
            recompute_activations(discriminator)

        # Give each its objective.
        autocast = self.precision.autocast
        discriminating = DiscriminatorObjective(discriminator, config, autocast).to(world.device)
        generating = GeneratorObjective(generator, discriminating, config, autocast).to(world.device)
        self.flops = count_run(config, discriminating, generating, world.device, self.precision.dtype) if world.is_main else {}
        self.paired, self.translates = generating.adversarial.paired, generating.translates

        # Make them players.
        setting = config, world, self.precision
        optimizer = config.optimizer
        self.discriminator = build_player("discriminator", discriminating, *setting, lr=optimizer.discriminator_lr)
        self.generator = build_player("generator", generating, *setting, lr=optimizer.generator_lr)
        self.generate = generating.generate

        # Compile their updates, if that is wanted.
        self.compiled = choose_compile(config.train, world)
        self.compilations = Compilations(world, self.watchdog)
        if self.compiled:
            compile_player(self.discriminator)
            compile_player(self.generator)
            self.generate = torch.compile(self.generate)

        # Prepare to look at them.
        self.evaluator = Evaluator(config, self.train_set, world)
        self.measured: dict[str, float] = {}  # at this step
        self.meter = Meter(world)
        self.skipped: list[str] = []  # on this rank, since the last report
        self.total_skipped = 0  # on all ranks
        self.saver = checkpoint.Saver(config.run_dir, config.checkpoint, world, self._confirm_owner)
        self._start_interval()

    @property
    def progress(self) -> dict[str, float]:
        return {"step": self.step, "kimg": self.images / 1000}

    @property
    def position(self) -> int:
        """In the data, of which the generator's updates may take a part as well."""
        extra = self.images // self.config.train.discriminator_updates if self.generator.objective.wants_real else 0
        return self.images + extra

    @property
    def trained(self) -> bool:
        return self.images >= self.config.train.kimg * 1000

    @property
    def finished(self) -> bool:
        return self.trained and not self.evaluation_pending

    def train(self) -> None:
        """Trains from where the run stands to its end, or until asked to stop. Saves in either case."""
        if self.compiled:
            keep_compiled(self.config.run_dir / "compiled", self.world)
        start = {"step": self.step, **describe_start(self.world), **self._summarize()}
        trackers = open_trackers(self.config, start, self.world, step=self.step, evaluated=not self.evaluation_pending)
        if trackers:
            self.preview = self._open_preview()
            trackers.real(self.preview.real_grid)
        stop = StopRequest(self.world)
        with closing(self._open_batches()) as batches, self.saver, self._open_profiler() as profiler:
            stopped = self._train(batches, trackers, stop, profiler)
        if not stopped:
            self._confirm_best(trackers, stop)
        self.watchdog.doing("ending what tracks the run", patience=2)
        trackers.finish()

    def _train(self, batches: Iterator[DeviceBatch], trackers: Trackers, stop: StopRequest, profiler: StepProfiler) -> bool:
        """Whether a request to stop came before the end.

        A step goes into the run folder's files before it is saved: a resumed run drops their rows of steps that it repeats,
        but could not make up for missing ones. It is told to all others after it is saved: that can fail or take long.
        """
        config = self.config
        stopping = False
        self._start_interval()
        while not (self.finished or stopping):
            scalars, samples, evaluation = None, None, None
            saving = self.evaluation_pending  # the process before this one was stopped in this evaluation
            if not self.evaluation_pending:
                self.train_step(batches)
                profiler.step()
                stopping = stop.agreed()
                self.evaluation_pending = bool(config.evaluation.metrics) and self._due(config.evaluation.every_kimg)
                saving = stopping or self._checkpoint_due()
                drawing = self._due(config.tracking.samples_every_kimg)
                if saving or drawing or self._due(config.tracking.every_kimg):
                    scalars = self._report_interval()
                if drawing and trackers:
                    samples = self.preview.draw(self.ema.module, self.discriminator.network)
            if self.evaluation_pending and not stopping:
                evaluation = self._evaluate(stop)
                stopping = evaluation is None
                saving |= stopping
            report = StepReport(self.progress, scalars, samples, evaluation)
            self._record(trackers, report)
            if saving:
                self.save()
            trackers.tell(report)
            if scalars:
                self._start_interval()
        return stopping

    def _record(self, trackers: Trackers, report: StepReport) -> None:
        if report:
            self._confirm_owner()
            trackers.record(report)

    def train_step(self, batches: Iterator[DeviceBatch]) -> None:
        """One iteration of Goodfellow et al. 2014 (1406.2661), algorithm 1: updates of D, one of G, one of the average."""
        train, count = self.config.train, self.accumulation
        seen = torch.full((), self.images, dtype=self.precision.dtype, device=self.world.device)
        for update in range(train.discriminator_updates):
            real, real_labels = self._next_real(batches, update)
            penalized = self.discriminator.objective.is_penalized(self.step * train.discriminator_updates + update)
            with record_function("discriminator update"), self._compiling(self.discriminator, penalized):
                latents, labels = self._wanted(real, real_labels, *self._latents(Purpose.DISCRIMINATOR, update))
                noise = self._noise(Purpose.DISCRIMINATOR_NOISE, update, self.discriminator.objective.columns)
                drawn = real, real_labels, latents, labels, noise
                micro_batches = zip(*(each.chunk(count) for each in drawn), strict=True)
                inputs = ((x, y, *self._fakes(z, c, u), seen, penalized) for x, y, z, c, u in micro_batches)
                self.meter.update(self.discriminator.update(inputs, count, self.step + 1, self.images))

        latents, labels = self._latents(Purpose.GENERATOR)
        noise = self._noise(Purpose.GENERATOR_NOISE, 0, self.generator.objective.columns)
        drawn = latents, labels, noise
        if self.generator.objective.wants_real:
            real, real_labels = self._next_real(batches, train.discriminator_updates)
            drawn = *self._wanted(real, real_labels, latents, labels), noise, real, real_labels
        penalized = self.generator.objective.is_penalized(self.step)
        compiling = self._compiling(self.generator, penalized)
        with record_function("generator update"), compiling, frozen(self.discriminator.network):
            micro_batches = zip(*(each.chunk(count) for each in drawn), strict=True)
            inputs = ((z, c, u, seen, penalized, *real) for z, c, u, *real in micro_batches)
            self.meter.update(self.generator.update(inputs, count, self.step + 1, self.images))

        self.ema.update(self.images_per_step, self.images)
        self.step += 1
        self.images += self.images_per_step
        self.measured = {}

    def state_dict(self) -> dict:
        """The tensors of the run; loading a checkpoint copies into them."""
        return {
            "generator": self.generator.state_dict(),
            "discriminator": self.discriminator.state_dict(),
            "generator_ema": self.ema.module.state_dict(),
        }

    def save(self) -> None:
        """Writes a checkpoint, or begins to. Raises CheckpointError where that fails, TrainingError rather than save what
        is broken."""
        self.watchdog.doing(f"saving step {self.step}")
        state = self.state_dict()
        self._refuse_non_finite(state)
        meta = {
            **self.progress,
            "images": self.images,
            "skipped": self.total_skipped,
            "evaluation_pending": self.evaluation_pending,
            "metrics": self.measured,
            "world_size": self.world.size,
            "data_fingerprint": self.train_set.fingerprint,
            "class_names": self.train_set.class_names,
            "config": self.config.saved(),
            "versions": {
                "gandist": gandist.__version__,
                "torch": torch.__version__,
                "webdataset": webdataset.__version__,
            },
        }
        self.saver.save(self.step, state, meta)

    def resume(self, accepted: Sequence[str] = ()) -> Path | None:
        """Goes on from the newest checkpoint, if there is one, and returns it.

        Raises CheckpointError if all are damaged, or if the newest is of another run: other networks, data or seed.
        accepted: what of these may be other, by the names in that error or by what these begin with, such as `data`
        """
        path = checkpoint.newest(self.config.run_dir, self.world)
        if path is None:
            return None
        try:
            meta = checkpoint.read_meta(path)
            counters = meta["step"], meta["images"], meta["skipped"], meta["evaluation_pending"]
            checkpoint.refuse_other_run(path, meta, self.config, self.train_set.fingerprint, self.world, accepted)
        except (LookupError, TypeError, ValueError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise CheckpointError(f"{path} was saved by another version of gandist ({reason})", on_every_rank=True) from error
        state = self.state_dict()
        checkpoint.load(path, state, self.world, entire=True)
        self.generator.load_state_dict(state["generator"])
        self.discriminator.load_state_dict(state["discriminator"])
        self.step, self.images, self.total_skipped, self.evaluation_pending = counters
        return path

    def start_from(self, trained: TrainedGAN) -> str:
        """Takes over the weights of networks trained before, as far as they fit: the averaged generator and the discriminator.
        Returns what was taken and what was not. Raises ConfigError if nothing fits."""
        origin = trained.origin["checkpoint"]
        reports = [
            take_over(f"{player.name} of {origin}", getattr(trained, player.name).state_dict(), player.network.state_dict())
            for player in (self.generator, self.discriminator)
        ]
        for player in (self.generator, self.discriminator):
            power_iteration(player.network, FIRST_ITERATIONS)  # of weights that were not taken as well
            player.load_state_dict(player.state_dict())
        self.ema.module.load_state_dict(self.generator.network.state_dict())
        return "\n".join(f"starts from {report}" for report in reports)

    def describe(self) -> str:
        """What is about to run, for the console."""
        manner = self.precision.name + (", compiled" if self.compiled else "")
        return describe(self.config, self.world, self._summarize(), manner, shards=len(self.train_set.shards.shards))

    def _summarize(self) -> dict:
        networks = {player.name: player.network for player in (self.generator, self.discriminator)}
        return summarize(self.train_set, self.evaluator.test_set, networks, self.flops)

    def _open_preview(self) -> Preview:
        return Preview(self.config, self.train_set, self.evaluator.sources, self.world, self.precision.dtype)

    def _open_profiler(self) -> StepProfiler:
        steps = self.config.train.profile if self.world.is_main else 0
        return StepProfiler(self.config.run_dir / "profile", steps, self.world.device)

    def _open_batches(self) -> Iterator[DeviceBatch]:
        batch_size = self.config.train.batch_size
        return self.train_set.training_batches(seed=self.config.seed, batch_size=batch_size, start=self.position)

    def _next_real(self, batches: Iterator[DeviceBatch], update: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Images [B / world_size, C, H, W] in [-1, 1] and their labels, on the device."""
        start = time.perf_counter()
        self.watchdog.doing(f"waiting for data after step {self.step}")
        with record_function("waiting for data"):
            images, labels, skipped = next(batches)
        self.watchdog.doing(f"computing step {self.step + 1}, or waiting for other ranks in it")
        self.data_wait += time.perf_counter() - start
        self.skipped += skipped.values()
        images = normalize(images, self.precision.dtype)
        if self.config.augmentation.xflip:
            images = flip(images, self._noise(Purpose.FLIPS, update, Columns(xflip=1))[:, 0])
        return images, labels

    def _compiling(self, player: Player, penalized: bool) -> AbstractContextManager:
        """Around an update. With and without penalties it is different code, compiled when first run."""
        kind = "penalized update" if penalized else "update"
        return self.compilations.of(f"{player.name}'s {kind}") if self.compiled else nullcontext()

    def _latents(self, purpose: Purpose, update: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        latents, labels = self.randomness.draw(purpose, self.step, update)
        device = self.world.device
        return upload(latents, device).to(self.precision.dtype), upload(labels, device)

    def _wanted(
        self, real: torch.Tensor, real_labels: torch.Tensor, latents: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What images are made of: real ones, where they are translated; their labels: of real ones, where they are paired."""
        return real if self.translates else latents, real_labels if self.paired else labels

    def _noise(self, purpose: Purpose, update: int, columns: Columns) -> torch.Tensor:
        """float32 [B / world_size, columns]"""
        return upload(self.randomness.draw_uniform(purpose, self.step, update, columns.width), self.world.device)

    @torch.no_grad()
    def _fakes(
        self, latents: torch.Tensor, labels: torch.Tensor, noise: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor]:
        """The discriminator's: images, of latents near these as well if it wants them, the labels and the noise."""
        objective = self.discriminator.objective
        near = self.generate(objective.near(latents, noise), labels) if objective.wants_near else None
        return self.generate(latents, labels), near, labels, noise

    def _due(self, every_kimg: float) -> bool:
        """Whether this step reached or passed a multiple of the interval, or the end."""
        interval = round(every_kimg * 1000)
        return self.trained or self.images // interval > (self.images - self.images_per_step) // interval

    def _checkpoint_due(self) -> bool:
        config = self.config
        return self._due(config.checkpoint.every_kimg) or (
            config.checkpoint.best is not None and self._due(config.evaluation.every_kimg)
        )

    def _start_interval(self) -> None:
        self.interval_start = time.perf_counter()
        self.interval_images = self.images
        self.data_wait = 0.0

    def _report_interval(self) -> Scalars:
        """What the steps since the last report amount to. Every rank calls it. Raises GandistError where the run must stop."""
        self.saver.check()
        values = self._report_guards() | self.meter.read() | self._report_skipped()
        seconds = time.perf_counter() - self.interval_start
        rate = (self.images - self.interval_images) / seconds
        values |= {
            **{f"lr/{player.name}": player.rates(self.images)["lr"] for player in (self.generator, self.discriminator)},
            **{f"schedule/{key}": number_at(cosine, self.images) for key, cosine in scheduled(self.config)},
            "ema/distance": self.ema.distance().item(),
            "ema/half_life_kimg": self.ema.half_life(self.images) / 1000,
            "throughput/images_per_second": rate,
            "throughput/data_wait": self.data_wait / seconds,
            "memory/peak_gib": _peak_memory(self.world.device) / 2**30,
        }
        if self.flops:
            achieved = rate * self.flops["update"] / self.world.size
            values["throughput/tflops"] = achieved / 1e12  # of a rank
            if peak := peak_flops(self.world.device, self.precision.name):
                values["throughput/mfu"] = achieved / peak
        return values

    def _report_guards(self) -> dict[str, float]:
        """Counts the updates that were left out. Raises TrainingError where the run must stop."""
        skipped = {player.name: player.guard.report() for player in (self.discriminator, self.generator)}
        if self.world.is_main and self.precision.name != "float16":  # there the loss scale is found so
            for name, count in skipped.items():
                if count:
                    print(f"warning: {count} update(s) of the {name} were not finite and are left out", flush=True)
        return {f"skipped/{name}_updates": count for name, count in skipped.items()}

    def _report_skipped(self) -> dict[str, float]:
        """Counts the samples that others stood in for, over all ranks. Raises DataError if they are too many."""
        data = self.config.data
        if data.on_error == "raise":
            return {}
        skipped = [each for part in self.world.gather(self.skipped) for each in part]
        self.skipped = []
        if skipped and self.world.is_main and self.total_skipped < NAMED_SKIPS:
            print("\n".join(f"skipped: {each}" for each in skipped[: NAMED_SKIPS - self.total_skipped]), flush=True)
        self.total_skipped += len(skipped)
        if self.total_skipped > max(NAMED_SKIPS, data.max_skip * self.images):
            raise DataError(
                f"{self.total_skipped:,} of {self.images:,} images could not be used, more than data.max_skip="
                f"{data.max_skip:g} allows; the last: {skipped[-1]}",
                on_every_rank=True,
            )
        return {"data/skipped": self.total_skipped}

    def _evaluate(self, stop: StopRequest) -> Evaluation | None:
        """None where a request to stop came first."""
        generator = self.ema.module if self.config.evaluation.ema else self.generator.network
        try:
            evaluation = self.evaluator(
                generator, self.discriminator.network, **self.progress, between_batches=self._evaluating(stop)
            )
        except Stopped:
            return None
        self.evaluation_pending = False
        self.measured = {record.metric: record.value for record in evaluation.records}
        return evaluation

    def unconfirmed_best(self) -> Path | None:
        """The checkpoint that is best by `checkpoint.best`, on every rank; None where it has been measured again already."""
        run_dir, best = self.config.run_dir, None
        if self.world.is_main:
            best = checkpoint.best(run_dir, self.config.checkpoint)
            rows = read_rows(run_dir / EVALUATIONS, "metric", "step")
            confirmed = {row["step"] for row in rows if row["metric"].startswith(f"{BEST}/")}
            if best and checkpoint.read_meta(best)["step"] in confirmed:
                best = None
        return self.world.broadcast(best)

    def _confirm_best(self, trackers: Trackers, stop: StopRequest) -> None:
        """Measures the best checkpoint once more, with another seed: the best of many noisy values is biased."""
        path = self.unconfirmed_best()
        if path is None or checkpoint.verify(path, self.world):
            return
        options = {"seed": self.evaluator.seed + 1, "between_batches": self._evaluating(stop)}
        with suppress(Stopped):
            evaluation = self.evaluator.measure_checkpoint(path, **options).renamed(BEST)
            report = StepReport(self.progress, evaluation=evaluation)
            self._record(trackers, report)
            trackers.tell(report)

    def _evaluating(self, stop: StopRequest) -> Callable[[], None]:
        """What an evaluation does between two batches."""

        def between_batches() -> None:
            self.watchdog.doing(f"evaluating step {self.step}")
            stop.leave()

        return between_batches

    def _refuse_non_finite(self, state: dict) -> None:
        tensors = {path: tensor for path, tensor in checkpoint.flatten(state).items() if tensor.is_floating_point()}
        if not torch.stack([tensor.isfinite().all() for tensor in tensors.values()]).all():
            broken = next(path for path, tensor in tensors.items() if not tensor.isfinite().all())
            raise TrainingError(
                f"{'.'.join(broken)} is not finite at step {self.step} (kimg {self.images / 1000:g}) and is not saved: the "
                "newest checkpoint is from before; lower the learning rates, or use train.precision=float32",
                on_every_rank=True,
            )


def _check_batch_size(config: Config, world: World) -> None:
    batch_size, accumulation = config.train.batch_size, config.train.accumulation  # 1 beside micro_batch_size, which adapts
    parts = world.size * accumulation
    if batch_size % parts:
        fitting = [n for n in range(1, batch_size + 1) if batch_size % (n * accumulation) == 0]
        raise ConfigError(
            f"train.batch_size={batch_size} cannot be split evenly over {world.size} rank(s) × {accumulation} "
            f"micro-batch(es): use {max(1, batch_size // parts) * parts}, or run {', '.join(map(str, fitting))} ranks"
        )


def _peak_memory(device: torch.device) -> int:
    """Bytes: of the GPU's allocator, or resident of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
