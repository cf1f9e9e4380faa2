"""The sections of a recipe: every key with its type, range, default and meaning."""

import io
from collections import Counter
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator
from ruamel.yaml import YAML

from mgtrain.grid import Shape
from mgtrain.recipe.base import Count, Crop, Fraction, Length, NotNegative, Positive, Scale, Section
from mgtrain.recipe.model import ModelOptions
from mgtrain.recipe.optim import Optim

Name = Annotated[str, Field(min_length=1, max_length=200)]


class Data(Section):
    """The videos and their labels."""

    format: Literal["list", "kinetics", "folder", "something_something", "charades", "ucf101", "hmdb51"] = Field(
        description="format of the annotations"
    )
    root: str = Field(description="folder of the videos; their paths are relative to it")
    train: str = Field(description="annotations of the training videos, relative to root or absolute")
    val: str = Field(description="annotations of the validation videos, relative to root or absolute")
    classes: int = Field(ge=2, le=1_000_000, description="number of classes")
    outside_root: bool = Field(False, description="allow paths outside of root (format: list)")
    videos: Count | None = Field(
        None, description="expected number of training videos, with which `mgtrain plan` works without the data"
    )
    checked: str | None = Field(
        None, description="file written by `mgtrain data check`; videos that it calls unusable are skipped"
    )
    prepared: str | None = Field(
        None, description="folder written by `mgtrain data prepare` to read clips from; null: read the original videos"
    )
    fps: Positive | None = Field(None, description="frames per second of videos that are folders of frames")
    mirrored: tuple[tuple[str | int, str | int], ...] = Field(
        (), description="pairs of classes, by name or number, that swap in a horizontal flip"
    )
    multi_label: bool = Field(
        False,
        description="videos may have several classes, or none: train with sigmoids, report mean average precision",
    )
    balance: Literal["none", "sqrt", "full"] = Field(
        "none",
        description="how often clips of a class are trained on; none: as often as it has videos; sqrt: as the square "
        "root of its number of videos; full: all classes equally. Epochs keep their length",
    )
    max_bad_fraction: Fraction = Field(0.01, description="share of videos that may be broken; above it, a run stops")

    @model_validator(mode="after")
    def _consistent(self) -> "Data":
        if self.outside_root and self.format != "list":
            raise ValueError(f"outside_root is for format: list; format {self.format} has no paths")
        if self.multi_label and self.balance != "none":
            raise ValueError("balance needs one label per video; set it to none with multi_label")
        for name, count in Counter(name for pair in self.mirrored for name in pair).items():
            if count > 1:
                raise ValueError(f"mirrored names the class {name!r} twice; name a class at most once")
        return self


class Clip(Section):
    """The base grid: how the baseline cuts a clip from a video."""

    frames: Length = Field(description="T, frames per clip")
    sampling: Literal["dense", "segments"] = Field(
        "dense",
        description=(
            "dense: a frame every `stride` frames; segments: a frame from each of `frames` equal parts of the video"
        ),
    )
    stride: Length = Field(
        1, description="frames of the video, at `fps`, from one frame of a clip to the next; unused with segments"
    )
    crop: Crop = Field(description="S, side of the square crop, pixels")
    short_side: tuple[Length, Length] = Field(
        description="range of the resized video's short side, which is random, pixels"
    )
    fps: Positive = Field(30.0, description="frame rate that `stride` refers to")
    flip: Fraction = Field(0.5, description="probability of a horizontal flip")
    inverse_uniform: bool = Field(
        False, description="draw the inverse of the short side uniformly (Something-Something)"
    )

    @model_validator(mode="after")
    def _ordered(self) -> "Clip":
        if self.sampling == "dense" and "stride" not in self.model_fields_set:
            raise ValueError("missing key 'stride'; only sampling: segments can omit it")
        low, high = self.short_side
        if not self.crop <= low <= high:
            raise ValueError(f"short_side [{low}, {high}] must be ascending and not smaller than crop {self.crop}")
        return self


class Augment(Section):
    """Augmentation of training clips and their labels, besides crop, scale and flip. All of it is off by default."""

    rand_augment: int = Field(0, ge=0, le=100, description="RandAugment operations per clip")
    magnitude: int = Field(9, ge=0, le=30, description="magnitude of the RandAugment operations")
    brightness: Fraction = Field(0.0, description="brightness jitter: factors from 1 - brightness to 1 + brightness")
    contrast: Fraction = Field(0.0, description="contrast jitter, about the clip's mean grey")
    saturation: Fraction = Field(0.0, description="saturation jitter")
    hue: float = Field(0.0, ge=0, le=0.5, description="hue jitter: largest rotation of the hue, in full turns")
    erase: Fraction = Field(0.0, description="probability of erasing a random box of a clip")
    mixup: NotNegative = Field(0.0, description="alpha of MixUp's Beta(alpha, alpha); 0: no MixUp")
    cutmix: NotNegative = Field(
        0.0, description="alpha of CutMix's Beta(alpha, alpha); 0: no CutMix; with MixUp, each pair uses one at random"
    )
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="share of the label spread over all classes")

    @property
    def jitters_colour(self) -> bool:
        """Whether colours change."""
        return max(self.brightness, self.contrast, self.saturation, self.hue) > 0

    @property
    def mixes(self) -> bool:
        """Whether pairs of clips are mixed."""
        return max(self.mixup, self.cutmix) > 0


class Evaluation(Section):
    """The grid of every evaluation, and how often to evaluate."""

    crop: Crop = Field(description="side of the square crop, pixels")
    short_side: Length = Field(description="short side of the resized video, pixels")
    views: Literal["mean", "max"] = Field(
        "mean", description="how class probabilities of a video's views are combined (Charades: max)"
    )
    times: int = Field(
        8, ge=1, le=10_000, description="evaluations of the run, at equal shares of its steps; the last is at its end"
    )
    recalibration_batches: int = Field(
        200,
        ge=0,
        le=10**9,
        description="most batches that recalibrate BatchNorm's statistics before an evaluation, if recent steps had "
        "other shapes. Fewer are used early: 1/7 of the steps since the last evaluation (after the last step, of all "
        "steps), but at least 5. 0: use the running averages",
    )

    @model_validator(mode="after")
    def _fits(self) -> "Evaluation":
        if self.short_side < self.crop:
            raise ValueError(f"short_side {self.short_side} must not be smaller than crop {self.crop}")
        return self


class Init(Section):
    """The initial weights. Fine-tuning usually freezes nothing and lowers `optim.lr`."""

    weights: str | None = Field(
        None, description="weights file, of mgtrain or another project (see `mgtrain weights`); null: random weights"
    )
    at_least: Fraction = Field(
        1.0, description="share of the model's tensors that the file must contain, except a resized classifier"
    )
    freeze: Literal["none", "stem", "res2", "res3", "res4", "backbone"] = Field(
        "none", description="last stage to freeze; backbone: all but the classifier (linear probing)"
    )
    freeze_bn: bool = Field(False, description="freeze BatchNorm's statistics and normalize by them")


class Batch(Section):
    """The baseline's mini-batch over all GPUs."""

    clips: Count = Field(description="B, clips per step at the base shape")
    bn_clips: Count = Field(8, description="clips per BatchNorm group of the long-cycle batch")


class BaselineSchedule(Section):
    """Every step has the base shape."""

    name: Literal["baseline"]


class MultigridSchedule(Section):
    """The long and the short cycle of Wu et al. 2020, with the paper's defaults."""

    name: Literal["multigrid"]
    epoch_factor: Positive = Field(1.5, description="number of epochs relative to the baseline's")
    long_cycle: Annotated[tuple[tuple[Scale, Scale], ...], Field(max_length=20)] = Field(
        ((0.25, 0.7071), (0.5, 0.7071), (0.5, 1.0), (1.0, 1.0)),
        description="[frames, crop] relative to the base, coarse to fine; []: no long cycle",
    )
    short_cycle: Annotated[tuple[Scale, ...], Field(max_length=20)] = Field(
        (0.5, 0.7071),
        description="crops, relative to the base's, that alternate with the long cycle's; []: no short cycle",
    )
    fine_tune: bool = Field(
        True, description="train the last stage at the finest shape only; false: run a long cycle in it, too"
    )
    fine_tune_short_cycle: bool = Field(
        True, description="with a long cycle: keep the short cycle while fine-tuning in the last stage"
    )
    lr_scaling: Literal["long", "both", "none"] = Field(
        "long",
        description=(
            "scale the learning rate by the batch of the long cycle or of both; the paper found that "
            "scaling by the short cycle's hurts"
        ),
    )
    bn_groups: Literal["long", "both"] = Field(
        "long",
        description="batch that sets the number of BatchNorm groups; long: the long cycle's, so that groups grow with "
        "the short cycle's batch, as in the authors' code; both: groups always have `batch.bn_clips` clips",
    )

    @field_validator("long_cycle")
    @classmethod
    def _is_coarse_to_fine(cls, cycle: tuple[tuple[float, float], ...]) -> tuple[tuple[float, float], ...]:
        volumes = [frames * crop**2 for frames, crop in cycle]
        if volumes != sorted(volumes):
            raise ValueError("long_cycle must go from coarse to fine, because the last shape is that of fine-tuning")
        return cycle


Schedule = Annotated[BaselineSchedule | MultigridSchedule, Field(discriminator="name")]


class Hardware(Section):
    """Speed and memory. Nothing here changes the clips of a step."""

    precision: Literal["fp32", "bf16", "fp16"] = Field("fp32", description="precision of convolutions, by autocast")
    micro_clips: Count | None = Field(
        None,
        description="limit of the clips in a forward pass on one GPU, at the base shape; coarse shapes get more clips "
        "of the same volume. A micro-batch holds whole BatchNorm groups",
    )
    memory_gib: Positive | None = Field(
        None,
        description=(
            "memory limit of one device, GiB; lowers micro_clips, then sets recompute, until every step is "
            "estimated to fit. A GPU's free memory is a limit, too, and the only one if null; with a "
            "value, torch allocates no more than that"
        ),
    )
    recompute: bool = Field(
        False, description="keep only the blocks' inputs for the backward pass: less memory, about a third more time"
    )
    compile: Literal["no", "default", "graphs"] = Field(
        "no",
        description=(
            "use torch.compile for the shapes whose steps save more time than compiling takes; graphs: with CUDA graphs"
        ),
    )
    tf32: bool = Field(
        True,
        description=(
            "on GPUs in fp32: round the inputs of convolutions and matrix products to TF32, 10 bits "
            "instead of 23 (relative errors of about 1e-3), which is several times as fast"
        ),
    )
    deterministic: bool = Field(
        False,
        description=(
            "use deterministic algorithms, so that two runs are equal bit for bit; slower. false: use the "
            "fastest algorithms on this machine, so that two runs differ by rounding"
        ),
    )
    workers: Annotated[int, Field(ge=0, le=1000)] | None = Field(
        None,
        description=(
            "loader processes per rank; null: a rank's share of the cores, or half of it on a CPU, at most 16"
        ),
    )
    channels_last: bool = Field(
        True,
        description=(
            "use the channels-last memory format for clips and weights; without it, half precision is slow on GPUs "
            "with cuDNN 9.8 to 9.14"
        ),
    )


class Logging(Section):
    """What a run writes, and how often."""

    steps: Count = Field(10, description="steps between log lines; 1 makes each step wait for the GPU")
    checkpoint_steps: Count = Field(1000, description="steps between checkpoints; every evaluation saves one, too")
    keep_checkpoints: Count = Field(3, description="number of the newest checkpoints to keep, besides the best")
    wandb: Name | None = Field(
        None, description="project, or entity/project, to log to at Weights & Biases (pip install wandb); null: none"
    )
    mlflow: Name | None = Field(
        None,
        description=(
            "experiment to log to with MLflow (pip install mlflow-skinny), at MLFLOW_TRACKING_URI; null: none"
        ),
    )


class Faults(Section):
    """How a run responds to faults. The keys change nothing in a run without faults."""

    non_finite: Literal["stop", "skip", "rollback"] = Field(
        "stop",
        description="response to a loss or gradient that is not finite: stop the run, skip the update, or skip it and "
        "restore the weights of the newest checkpoint (rollback)",
    )
    non_finite_steps: Count = Field(
        10, description="number of such steps that a run skips or rolls back before it stops"
    )
    timeout_seconds: Positive = Field(
        900.0, description="end a process without progress after so long, and report what it was doing"
    )


class Recipe(Section):
    """Everything that defines a run. Two runs of a recipe train on the same clips in the same steps."""

    seed: int = Field(0, ge=0, lt=2**32, description="seed of the weights, the clips and all other random draws")
    data: Data
    clip: Clip
    augment: Augment = Augment()
    evaluation: Evaluation
    model: ModelOptions
    init: Init = Init()
    batch: Batch
    optim: Optim
    schedule: Schedule
    hardware: Hardware = Hardware()
    logging: Logging = Logging()
    faults: Faults = Faults()

    @model_validator(mode="after")
    def _smooth_one_label(self) -> "Recipe":
        if self.data.multi_label and self.augment.label_smoothing:
            raise ValueError("augment.label_smoothing needs one label per video; set it to 0 with data.multi_label")
        return self

    @property
    def base(self) -> Shape:
        """The baseline's mini-batch, B x T x S x S."""
        return Shape(self.batch.clips, self.clip.frames, self.clip.crop)

    @property
    def evaluation_shape(self) -> Shape:
        """One clip of an evaluation."""
        return Shape(1, self.clip.frames, self.evaluation.crop)

    def changed(self, section: str, **keys: Any) -> "Recipe":
        """A copy with other values of a section's keys, which are not validated."""
        return self.model_copy(update={section: getattr(self, section).model_copy(update=keys)})

    def flat(self) -> dict[str, Any]:
        """Dotted key, such as `optim.lr`, -> plain value."""
        return _flat(self.model_dump(mode="json"))

    def to_yaml(self) -> str:
        """The complete recipe with its defaults, as YAML that `load_recipe` reads back."""
        text = io.StringIO()
        yaml = YAML(typ="safe", pure=True)
        yaml.default_flow_style = None
        yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
        yaml.dump(self.model_dump(mode="json"), text)
        return text.getvalue()


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
