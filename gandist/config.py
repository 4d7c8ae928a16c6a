"""The configuration of a run: typed sections, and what of them fits together."""

import os
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, NamedTuple, TypeVar

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)

from gandist.errors import ConfigError
from gandist.redaction import redacted
from gandist.resolution import resolution_of, size_of

RUN_CONFIG = "config.yaml"  # the resolved configuration in a run folder


def _refuse_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("a number is wanted, not true or false")
    return value


def _read_resolution(value: Any, read: ValidatorFunctionWrapHandler) -> Any:
    try:
        return resolution_of(*size_of(read(value)))
    except ValidationError:
        raise ValueError("a number of pixels, or two, [height, width], is wanted, each at least 1") from None


Integer = Annotated[int, BeforeValidator(_refuse_bool)]
Number = Annotated[float, BeforeValidator(_refuse_bool), Field(allow_inf_nan=False)]
Count = Annotated[Integer, Field(ge=1)]
Positive = Annotated[Number, Field(gt=0)]
Interval = Annotated[Number, Field(ge=0.001)]
NotNegative = Annotated[Number, Field(ge=0)]
Share = Annotated[Number, Field(ge=0, le=1)]
Beta = Annotated[Number, Field(ge=0, lt=1)]
ExpandedPath = Annotated[Path, AfterValidator(Path.expanduser)]
ShardSpec = str | tuple[str, ...]
BUILT_IN = "digits:"  # begins the names of the built-in data
TRANSLATORS = ("stargan",)  # families whose generators make images of images


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


T = TypeVar("T")


class Cosine(Section, Generic[T]):
    """From `start` to `end` along half a cosine within the first `kimg`; from then on `end`."""

    start: T
    end: T
    kimg: Positive


_number_or_cosine = Discriminator(lambda value: "cosine" if isinstance(value, dict | Cosine) else "number")


class Scheduled:
    """`Scheduled[T]`: a T, or a cosine between two."""

    def __class_getitem__(cls, number: Any) -> Any:
        return Annotated[Annotated[number, Tag("number")] | Annotated[Cosine[number], Tag("cosine")], _number_or_cosine]


class DataConfig(Section):
    """Where the images come from and what they are."""

    train: ShardSpec = "digits:train"  # the built-in digits, or shards: a folder, a glob, braces, URLs, or a list of these
    test: ShardSpec | None = "digits:test"  # held-out images for the class head's accuracy
    resolution: Annotated[Count | tuple[Count, Count], WrapValidator(_read_resolution)] = 16  # pixels; or [height, width]
    resize: Literal["none", "center-crop", "stretch"] = "none"  # of images of another size; none: they are an error
    channels: Literal[1, 3] = 1  # 1: grey, 3: RGB
    num_classes: Annotated[Integer, Field(ge=0)] = 10  # 0: no labels are read, the networks are unconditional
    label: Annotated[str, Field(pattern=r"^(cls|json:.+)$")] = "cls"  # or json:FIELD, a field of each sample's .json
    unlabelled: Literal["refuse", "allow"] = "refuse"  # what to do with samples that have no label
    labelled: Annotated[Number, Field(gt=0, le=1)] = 1.0  # share of each class's images whose labels are trained with
    labelled_seed: Annotated[Integer, Field(ge=0)] = 0  # which ones
    on_error: Literal["raise", "skip"] = "raise"  # skip: an image that cannot be used is replaced by its neighbour
    max_skip: Share = 0.001  # share of images that may be replaced so
    num_workers: Annotated[Integer, Field(ge=0)] = 1  # decoding processes a rank
    in_memory: ByteSize = ByteSize(10**9)  # decoded sets up to this size are held in memory; 0: none
    shuffle_block: Annotated[Integer, Field(ge=0)] = 0  # shards shuffled together; 0: all
    lanes: Count = 1  # a multiple of the ranks lets each read its share of the shards alone; must divide batch_size
    stage: bool = False  # whether local shards, too, are copied into cache_dir, to be read there
    allow_pipe: bool = False  # whether `pipe:COMMAND` may be run by a shell to produce a shard
    cache_dir: ExpandedPath = Field(Path("~/.cache/gandist"), validate_default=True)  # may hold $VARIABLES of each node
    cache_limit: ByteSize = ByteSize(200 * 10**9)  # of the remote shards in it, on each node

    @model_validator(mode="after")
    def _two_classes_or_none(self) -> "DataConfig":
        if self.num_classes == 1:
            raise ValueError("num_classes=1: there is nothing to tell apart; 0 trains without classes")
        return self

    @model_validator(mode="after")
    def _labels_to_choose_from(self) -> "DataConfig":
        if self.labelled < 1 and not self.num_classes:
            raise ValueError(
                f"labelled={self.labelled:g} is a share of the labels, of which num_classes=0 reads none: leave it out"
            )
        return self

    @property
    def without_label(self) -> str | None:
        """The key by which images without a label may be trained with; None where it cannot be so."""
        if self.labelled < 1:
            return f"data.labelled={self.labelled:g}"
        return "data.unlabelled=allow" if self.num_classes and self.unlabelled == "allow" else None

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the images."""
        return size_of(self.resolution)

    @property
    def cache_folder(self) -> Path:
        """`cache_dir` on this node. Raises ConfigError for a variable that is not set here."""
        expanded = os.path.expandvars(self.cache_dir)
        if "$" in expanded:
            raise ConfigError(f"data.cache_dir={self.cache_dir}: the variable is not set on this node", on_every_rank=False)
        return Path(expanded)


class ModelConfig(Section):
    """The two networks."""

    family: Literal["mlp", "dcgan", "resnet", "biggan", "biggan_deep", "stylegan2", "r3gan", "stargan"] = "dcgan"
    latent_dim: Count = 64
    generator_width: Count = 16  # channels at full resolution, of which those at the others are multiples; mlp: hidden units
    discriminator_width: Count = 24
    widths: tuple[Count, ...] | None = None  # r3gan, both networks: channels from 4 pixels up; null: one width everywhere
    group_size: Count = 16  # r3gan: channels of a group of the grouped convolutions
    attention: tuple[Count, ...] = ()  # resnet, biggan, biggan_deep: resolutions of feature maps that have self-attention
    discriminator_norm: Literal["spectral", "batch", "layer", "none"] = "spectral"  # dcgan, resnet
    generator_spectral_norm: bool = False  # resnet: besides batch norm
    max_width: Count = 512  # stylegan2: the most channels
    mapping_layers: Count = 8  # stylegan2, generator
    style_mixing: Share = 0.9  # stylegan2: share of generated images made of two latents
    minibatch_std: Annotated[Integer, Field(ge=0)] = 4  # stylegan2: images whose spread the discriminator sees; 0: it does not
    discriminator_architecture: Literal["resnet", "plain"] = "resnet"  # stylegan2
    conditioning: Literal[
        "projection", "auxiliary", "twin_auxiliary", "adc", "contrastive", "d2d_ce", "multi_hinge", "k_plus_one", "none"
    ] = "projection"  # of the discriminator

    @property
    def translates(self) -> bool:
        """Whether the generator makes images of images, not of latents."""
        return self.family in TRANSLATORS

    @model_validator(mode="after")
    def _keys_fit_the_family(self) -> "ModelConfig":
        keys = {
            "widths": ("r3gan",),
            "group_size": ("r3gan",),
            "attention": ("resnet", "biggan", "biggan_deep"),
            "discriminator_norm": ("dcgan", "resnet"),
            "generator_spectral_norm": ("resnet",),
            "max_width": ("stylegan2",),
            "mapping_layers": ("stylegan2",),
            "style_mixing": ("stylegan2",),
            "minibatch_std": ("stylegan2",),
            "discriminator_architecture": ("stylegan2",),
        }
        for key, families in keys.items():
            if getattr(self, key) != type(self).model_fields[key].default and self.family not in families:
                raise ValueError(f"{key} is for family={' or '.join(families)}, not for {self.family}: leave it out")
        return self


class LossConfig(Section):
    """The adversarial game."""

    adversarial: Literal["hinge", "non_saturating", "saturating", "least_squares", "wasserstein", "relativistic"] = "hinge"
    r1_gamma: Scheduled[NotNegative] = 0.0  # weight of the R1 gradient penalty, on real images; 0: none
    r2_gamma: Scheduled[NotNegative] = 0.0  # of R2, the same on generated images
    wgan_gp_lambda: NotNegative = 0.0  # of WGAN-GP's gradient penalty, on images between real and generated ones
    dragan_lambda: NotNegative = 0.0  # of DRAGAN's, on images around the real ones
    penalty_every: Count = 1  # discriminator updates from one with these penalties, so many times as heavy, to the next
    path_length_weight: NotNegative = 0.0  # stylegan2: of the path length penalty
    path_length_every: Count = 1  # generator updates from one with it, so many times as heavy, to the next
    lecam_weight: NotNegative = 0.0  # of keeping logits near the averages of the opposite side
    orthogonal_weight: NotNegative = 0.0  # of keeping the generator's filters orthogonal to each other
    reconstruction_weight: NotNegative = 0.0  # stargan: of the L1 distance of an image to itself, translated there and back
    identity_weight: NotNegative = 0.0  # stargan: of the L1 distance of an image to itself, translated to its own class
    top_k: Scheduled[Annotated[Number, Field(gt=0, le=1)]] = (
        1.0  # share of its images, the best, that the generator learns from
    )
    generator_weight: NotNegative = 1.0  # of the generator's adversarial loss
    feature_matching_weight: NotNegative = 0.0  # of the generator matching the mean features of real images
    conditioning_weight: NotNegative = (
        1.0  # of the conditioning's own loss: twin_auxiliary, adc, contrastive, d2d_ce, multi_hinge
    )
    temperature: Positive = 0.5  # of the comparisons of contrastive and d2d_ce
    margin: Share = 0.98  # d2d_ce: the cosine to its class's proxy that is near enough, and 1 − margin to others far enough

    @model_validator(mode="after")
    def _generator_learns(self) -> "LossConfig":
        if not (self.generator_weight or self.feature_matching_weight):
            raise ValueError(
                "generator_weight=0: the generator then learns by loss.feature_matching_weight, which is 0 as well"
            )
        return self

    @property
    def has_penalty(self) -> bool:
        """On the discriminator's gradient."""
        return bool(self.r1_gamma or self.r2_gamma or self.wgan_gp_lambda or self.dragan_lambda)


class ConsistencyConfig(Section):
    """The discriminator shall not mind small changes: λ of mean squares of changes of its logit, 0 for none."""

    real_weight: NotNegative = 0.0  # between a real image and the same mirrored and shifted
    fake_weight: NotNegative = 0.0  # the same with generated ones
    latent_weight: NotNegative = 0.0  # between the images of a latent and of one near it
    latent_diversity_weight: NotNegative = 0.0  # by which the generator draws these two images apart
    latent_noise: Positive = 0.07  # standard deviation between the two latents


class AugmentationConfig(Section):
    """What is done to images before the discriminator sees them."""

    xflip: bool = False  # whether half of the real images, by chance, are mirrored
    pipe: Literal["none", "translation", "diffaugment", "ada", "r3gan"] = (
        "none"  # of real and generated images, within the game
    )
    probability: Scheduled[Share] = 1.0  # of each of its transformations
    target: Annotated[Number, Field(ge=-1, le=1)] | None = None  # the mean sign of real images' logits that it adapts to
    speed_kimg: Positive = 500.0  # in which it can adapt from 0 to 1


class ClassificationConfig(Section):
    """The class head."""

    weight: NotNegative = 1.0  # of its cross-entropy in the losses
    detach: bool = False  # whether the rest of the discriminator learns nothing from it


class OptimizerConfig(Section):
    """Adam for both networks."""

    generator_lr: Scheduled[Positive] = 3e-3
    discriminator_lr: Scheduled[Positive] = 1e-3
    betas: tuple[Beta, Scheduled[Beta]] = (0.0, 0.9)
    eps: Positive = 1e-8
    clip_norm: NotNegative = 0.0  # gradients of a network with a larger norm are scaled down to it; 0: never


class EmaConfig(Section):
    """The averaged generator that is evaluated and sampled."""

    half_life_kimg: Scheduled[NotNegative] = 2.0  # after so many images a weight counts half
    ramp_up: Positive | None = None  # it is at most this share of the images so far


class TrainConfig(Section):
    """Length, batch and arithmetic. One kimg is 1,000 real images shown to the discriminator."""

    kimg: Positive = 100.0
    batch_size: Count = 64  # images a discriminator update, over all ranks and micro-batches
    discriminator_updates: Count = 1  # for each generator update
    accumulation: Count = 1  # micro-batches an update is split into
    micro_batch_size: Count | None = None  # in place of it: the most images of one rank in one pass, whatever the ranks
    precision: Literal["auto", "float64", "float32", "tf32", "bfloat16", "float16"] = "auto"  # bfloat16 on GPUs that have it
    compile: Literal["auto"] | bool = "auto"  # whether torch.compile makes the steps; auto: on GPUs
    activation_checkpointing: bool = False  # saves memory: activations are computed again in the backward pass
    init_from: ExpandedPath | None = None  # a run, a checkpoint or an exported folder, whose weights a new run starts from
    freeze_d: Annotated[Integer, Field(ge=0)] = 0  # parts of the discriminator, from the image on, that keep their weights
    non_finite: Literal["stop", "skip"] = "stop"  # at an update whose gradient is not finite
    deterministic: bool = False  # the same command gives the same bits again, at some cost in speed
    profile: Annotated[Integer, Field(ge=0)] = 0  # steps of which rank 0 writes a trace and a summary; 0: none
    timeout_minutes: Positive = 10.0  # a rank that makes no progress for so long ends the run with an error

    @model_validator(mode="after")
    def _whole_micro_batches(self) -> "TrainConfig":
        if self.batch_size % self.accumulation:
            raise ValueError(f"accumulation={self.accumulation} does not divide batch_size={self.batch_size}")
        return self

    @model_validator(mode="after")
    def _frozen_weights_are_trained_ones(self) -> "TrainConfig":
        if self.freeze_d and self.init_from is None:
            raise ValueError(f"freeze_d={self.freeze_d} keeps weights as they are in another run: name it in init_from")
        return self

    @model_validator(mode="after")
    def _one_way_to_split(self) -> "TrainConfig":
        if self.micro_batch_size and self.accumulation != 1:
            raise ValueError("accumulation and micro_batch_size both say how an update is split: leave out one of them")
        return self

    def accumulation_on(self, world_size: int) -> int:
        """Micro-batches of an update on so many ranks."""
        if self.micro_batch_size is None:
            return self.accumulation
        images = self.batch_size // world_size
        return next(count for count in range(1, images + 1) if images % count == 0 and images // count <= self.micro_batch_size)

    @model_validator(mode="after")
    def _compiled_or_recomputed(self) -> "TrainConfig":
        if self.activation_checkpointing and self.compile is True:
            raise ValueError(
                "activation_checkpointing=true and compile=true exclude each other: torch.compile chooses itself what to "
                "compute again; leave out one of them"
            )
        return self


class Measure(NamedTuple):
    """A value that an evaluation gives.

    of: the entry of evaluation.metrics that makes it
    """

    of: str
    better: Literal["lower", "higher"]


MEASURES = {
    "eval/fid": Measure("fid", "lower"),
    "eval/fid50k_full": Measure("fid50k_full", "lower"),
    "eval/fid50k": Measure("fid50k", "lower"),
    "eval/fid10k": Measure("fid10k", "lower"),
    "eval/fd_dinov2": Measure("fd_dinov2", "lower"),
    "eval/fd_classifier": Measure("fd_classifier", "lower"),
    "eval/fd_random": Measure("fd_random", "lower"),
    "eval/fd_per_class": Measure("fd_per_class", "lower"),
    "eval/kid": Measure("kid", "lower"),
    "eval/kd_dinov2": Measure("kd_dinov2", "lower"),
    "eval/kd_classifier": Measure("kd_classifier", "lower"),
    "eval/precision": Measure("precision_recall", "higher"),
    "eval/recall": Measure("precision_recall", "higher"),
    "eval/precision_dinov2": Measure("precision_recall_dinov2", "higher"),
    "eval/recall_dinov2": Measure("precision_recall_dinov2", "higher"),
    "eval/precision_classifier": Measure("precision_recall_classifier", "higher"),
    "eval/recall_classifier": Measure("precision_recall_classifier", "higher"),
    "eval/density": Measure("density_coverage", "higher"),
    "eval/coverage": Measure("density_coverage", "higher"),
    "eval/density_dinov2": Measure("density_coverage_dinov2", "higher"),
    "eval/coverage_dinov2": Measure("density_coverage_dinov2", "higher"),
    "eval/density_classifier": Measure("density_coverage_classifier", "higher"),
    "eval/coverage_classifier": Measure("density_coverage_classifier", "higher"),
    "eval/is50k": Measure("is50k", "higher"),
    "eval/gan_test": Measure("gan_test", "higher"),
    "eval/cas": Measure("cas", "higher"),
    "eval/reconstruction_l1": Measure("reconstruction", "lower"),
    "eval/reconstruction_accuracy": Measure("reconstruction", "higher"),
    "classification/test_top1": Measure("accuracy", "higher"),
    "classification/test_top5": Measure("accuracy", "higher"),
    "classification/test_balanced_accuracy": Measure("accuracy", "higher"),
}
Metric = Literal[*dict.fromkeys(measure.of for measure in MEASURES.values())]
JUDGED = (
    "fd_classifier",
    "fd_per_class",
    "kd_classifier",
    "precision_recall_classifier",
    "density_coverage_classifier",
    "gan_test",
    "reconstruction",
)
NEED_CLASSES = ("accuracy", "fd_per_class", "gan_test", "cas", "reconstruction")
NEED_TEST_SET = ("accuracy", "cas")


class EvaluationConfig(Section):
    """What is measured, and when. It is always measured at the end."""

    every_kimg: Interval = 20.0
    metrics: tuple[Metric, ...] = ("accuracy", "fd_classifier", "gan_test")
    num_images: Annotated[Integer, Field(ge=2)] | None = None  # generated images; null: as many as the training set has
    batch_size: Count = 256  # images a forward pass of one rank; part of the protocol, like the seed
    seed: Annotated[Integer, Field(ge=0)] | None = None  # of the generated images; null: the run's
    labels: Literal["training", "balanced"] = "training"  # how frequent classes are among them
    ema: bool = True  # whether they come from the averaged generator
    truncation: Positive | None = None  # none of the latents is farther from 0; stylegan2: ψ, from the mean w; null: as trained
    standing_stats: Annotated[Integer, Field(ge=0)] = 0  # batches that batch norm is measured anew with; 0: it is not
    judge: ExpandedPath | None = None  # a classifier of gandist.evaluation.judge; null: that of the built-in digits
    inception_weights: ExpandedPath | None = None  # the file that torch-fidelity released; null: it is downloaded
    dinov2_weights: ExpandedPath | None = None  # of ViT-L/14, as its authors released it; null: it is downloaded
    reference: ExpandedPath | None = None  # moments of the real images, of `gandist.evaluate reference`; null: measured


class CheckpointConfig(Section):
    """When the run is saved, and which checkpoints are kept. It is always saved at the end, and when it is stopped."""

    every_kimg: Interval = 10.0
    keep: Annotated[Integer, Field(ge=2)] = 2  # the newest so many; two at least, should the newest be damaged
    best: Literal[*MEASURES] | None = None  # a measure by which the best is kept, too; each evaluation is saved then
    keep_every_kimg: Interval | None = None  # the first at or after each multiple of it is kept for good
    asynchronous: bool = False  # whether it is written in the background, while training goes on
    on_error: Literal["stop", "continue"] = "stop"  # where one cannot be written; continue: with a warning, to the next


class TrackingConfig(Section):
    """Console, metrics.jsonl, sample grids and Weights & Biases."""

    every_kimg: Interval = 2.0
    samples_every_kimg: Interval = 20.0
    wandb: Literal["auto", "online", "offline", "off"] = "auto"  # auto: online with a key, else offline
    wandb_project: str = "gandist"
    wandb_group: str | None = None  # null: of the tasks of one Slurm array, the array
    wandb_tags: tuple[str, ...] = ()
    wandb_checkpoints: bool = False  # whether the newest and the best checkpoint are uploaded as artifacts, at the end

    @model_validator(mode="before")
    @classmethod
    def _yaml_off(cls, values: Any) -> Any:
        # YAML 1.1 reads a bare `off` as false.
        if isinstance(values, dict) and values.get("wandb") is False:
            return {**values, "wandb": "off"}
        return values


class Config(Section):
    run_dir: ExpandedPath = Path("runs/digits")
    seed: Annotated[Integer, Field(ge=0)] = 0
    engine: Literal["ddp", "deepspeed"] = "ddp"  # what updates the networks on all ranks
    zero_stage: Integer | None = None  # with deepspeed. 0: nothing is sharded, 1: Adam's state, 2: gradients too; null: 1
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    consistency: ConsistencyConfig = ConsistencyConfig()
    classification: ClassificationConfig = ClassificationConfig()
    augmentation: AugmentationConfig = AugmentationConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    ema: EmaConfig = EmaConfig()
    train: TrainConfig = TrainConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _conditioning_fits_the_data(self) -> "Config":
        if (self.data.num_classes == 0) != (self.model.conditioning == "none"):
            raise ValueError(
                "data.num_classes=0 and model.conditioning=none go together: without classes there is nothing to condition on"
            )
        if classified := set(NEED_CLASSES) & set(self.evaluation.metrics) if not self.data.num_classes else ():
            raise ValueError(
                f"evaluation.metrics has {', '.join(sorted(classified))}, which need classes: leave them out with "
                "data.num_classes=0"
            )
        return self

    @model_validator(mode="after")
    def _class_head_is_not_needed_elsewhere(self) -> "Config":
        conditioning = self.model.conditioning
        if self.classification.detach and conditioning in ("auxiliary", "twin_auxiliary"):
            raise ValueError(
                f"classification.detach=true and model.conditioning={conditioning} exclude each other: the generator learns "
                "its classes from the class head alone; choose another conditioning"
            )
        if self.classification.detach and conditioning == "k_plus_one":
            raise ValueError(
                "classification.detach=true and model.conditioning=k_plus_one exclude each other: the class logits are the "
                "adversarial one; choose another conditioning"
            )
        return self

    @model_validator(mode="after")
    def _multi_hinge_is_a_hinge(self) -> "Config":
        if self.model.conditioning == "multi_hinge" and self.loss.adversarial != "hinge":
            raise ValueError(
                "model.conditioning=multi_hinge is the hinge loss of several classes: say loss.adversarial=hinge, not "
                f"{self.loss.adversarial}"
            )
        if self.model.conditioning == "multi_hinge" and self.loss.generator_weight != 1:
            raise ValueError(
                "loss.generator_weight is of the adversarial loss, in place of which model.conditioning=multi_hinge has its "
                "own: say loss.conditioning_weight"
            )
        return self

    @model_validator(mode="after")
    def _path_length_has_styles(self) -> "Config":
        if self.loss.path_length_weight and self.model.family != "stylegan2":
            raise ValueError(
                f"loss.path_length_weight is for model.family=stylegan2, whose generator has styles, not {self.model.family}"
            )
        return self

    @model_validator(mode="after")
    def _translation_fits(self) -> "Config":
        family = self.model.family
        translating = {
            "loss.reconstruction_weight": self.loss.reconstruction_weight > 0,
            "loss.identity_weight": self.loss.identity_weight > 0,
            "evaluation.metrics=[reconstruction]": "reconstruction" in self.evaluation.metrics,
        }
        if (meant := [key for key, used in translating.items() if used]) and not self.model.translates:
            raise ValueError(
                f"{meant[0]} is for model.family={' or '.join(TRANSLATORS)}, which translates images, not for {family}: leave "
                "it out"
            )
        reasons = {
            "data.num_classes=0": (self.data.num_classes == 0, "translates images from class to class"),
            "data.unlabelled=allow": (self.data.unlabelled == "allow", "translates images back to the class that they had"),
            "data.labelled": (self.data.labelled < 1, "translates images back to the class that they had"),
            "loss.adversarial=relativistic": (
                self.loss.adversarial == "relativistic",
                "makes of an image of one class one of another, and has no pairs of a class",
            ),
            "consistency.latent_weight": (self.consistency.latent_weight > 0, "has no latents"),
            "consistency.latent_diversity_weight": (self.consistency.latent_diversity_weight > 0, "has no latents"),
            "evaluation.truncation": (self.evaluation.truncation is not None, "has no latents"),
        }
        for key, (used, reason) in reasons.items():
            if used and self.model.translates:
                raise ValueError(f"{key} cannot be used with model.family={family}, which {reason}")
        return self

    @model_validator(mode="after")
    def _augmentation_has_a_pipe(self) -> "Config":
        augmentation = self.augmentation
        if augmentation.target is not None:
            if augmentation.pipe == "none":
                raise ValueError(
                    "augmentation.target adapts how often a pipe augments: name one, such as augmentation.pipe=ada"
                )
            if augmentation.probability != 1.0:
                raise ValueError(
                    "augmentation.target and augmentation.probability both say how often the pipe augments: leave out one"
                )
        return self

    @model_validator(mode="after")
    def _pairs_have_classes(self) -> "Config":
        if self.loss.adversarial == "relativistic" and self.data.without_label:
            raise ValueError(
                "loss.adversarial=relativistic pairs each real image with a generated one of its class: it cannot be used with "
                f"{self.data.without_label}"
            )
        return self

    @model_validator(mode="after")
    def _unlabelled_images_have_a_logit(self) -> "Config":
        family = self.model.family
        alone = family in ("r3gan", "stylegan2") and self.model.conditioning == "projection"
        if self.data.without_label and alone:
            raise ValueError(
                f"{self.data.without_label}: with model.family={family} and model.conditioning=projection the discriminator's "
                "logit is the match of image and label alone: say model.conditioning=auxiliary, or train with all labels"
            )
        return self

    @model_validator(mode="after")
    def _stage_fits_the_engine(self) -> "Config":
        if self.zero_stage == 3:
            raise ValueError(
                "zero_stage=3 shards the weights, but the second derivatives of a gradient penalty, the generator's update, "
                "the averaged generator and checkpoints need them whole: use zero_stage=2, or 1"
            )
        if self.zero_stage not in (None, 0, 1, 2):
            raise ValueError(f"zero_stage={self.zero_stage}: there are the stages 0, 1 and 2, and null for the default")
        if self.zero_stage is not None and self.engine != "deepspeed":
            raise ValueError(
                f"zero_stage={self.zero_stage} is an option of DeepSpeed: say engine=deepspeed too, or leave it out"
            )
        return self

    @model_validator(mode="after")
    def _precision_fits_the_engine(self) -> "Config":
        if self.engine == "deepspeed" and self.train.precision == "float16":
            raise ValueError(
                "train.precision=float16 needs a loss scale, which engine=deepspeed does without: use bfloat16, or engine=ddp"
            )
        if self.engine == "deepspeed" and self.train.precision == "float64":
            raise ValueError(
                "engine=deepspeed keeps weights and Adam's state in float32, whatever train.precision says: use float32, or "
                "engine=ddp"
            )
        return self

    @model_validator(mode="after")
    def _float16_has_the_range(self) -> "Config":
        if self.train.precision == "float16" and (self.loss.has_penalty or self.loss.path_length_weight):
            raise ValueError(
                "train.precision=float16 has too small a range for the second derivatives of a gradient penalty: use "
                "bfloat16, tf32 or float32, or set the penalty's weight in loss to 0"
            )
        return self

    @model_validator(mode="after")
    def _lanes_divide_the_batch(self) -> "Config":
        if self.train.batch_size % self.data.lanes:
            raise ValueError(f"data.lanes={self.data.lanes} does not divide train.batch_size={self.train.batch_size}")
        return self

    @model_validator(mode="after")
    def _metrics_fit_the_data(self) -> "Config":
        metrics = set(self.evaluation.metrics)
        if self.data.test is None and (tested := metrics & set(NEED_TEST_SET)):
            raise ValueError(
                f"evaluation.metrics has {', '.join(sorted(tested))}, which need data.test: name held-out shards, or leave "
                "them out"
            )
        if not _is_built_in(self.data.train):
            if _is_built_in(self.data.test):
                raise ValueError(
                    "data.test is the built-in digits but data.train is not: name held-out shards of the same data, or "
                    "say data.test=null and leave 'accuracy' out of evaluation.metrics"
                )
            if (judged := metrics & set(JUDGED)) and not self.evaluation.judge:
                raise ValueError(
                    f"evaluation.metrics has {', '.join(sorted(judged))}, whose judge knows only the built-in digits: "
                    "train one on your own data (python -m gandist.evaluation.judge --help) and name it in evaluation.judge, "
                    "or say evaluation.metrics=[accuracy]"
                )
        return self

    @model_validator(mode="after")
    def _best_is_measured(self) -> "Config":
        best = self.checkpoint.best
        if best and (metric := MEASURES[best].of) not in self.evaluation.metrics:
            raise ValueError(f"checkpoint.best={best} is not measured: add {metric} to evaluation.metrics")
        return self

    @property
    def stage(self) -> int:
        """ZeRO's, with DeepSpeed."""
        return 1 if self.zero_stage is None else self.zero_stage

    def saved(self) -> dict[str, Any]:
        """As it is kept, shown and sent: in JSON's types, without secrets."""
        return redacted(self.model_dump(mode="json"))

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.saved(), sort_keys=False)


def _is_built_in(spec: ShardSpec | None) -> bool:
    return isinstance(spec, str) and spec.startswith(BUILT_IN)
