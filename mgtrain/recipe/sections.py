"""What the user wrote: a recipe, typed, complete, validated and read-only.

A recipe is a YAML 1.2 file. Every key is known, has a type and a range; what is wrong is reported as one line that
starts with `file:line:`. YAML is data here: aliases and tags are refused, so a recipe cannot run code or explode.
"""

from __future__ import annotations

import io
from collections import Counter
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from ruamel.yaml import YAML

from mgtrain.grid import Shape
from mgtrain.recipe.model import ModelOptions

Positive = Annotated[float, Field(gt=0, le=1e9)]
NotNegative = Annotated[float, Field(ge=0, le=1e9)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Scale = Annotated[float, Field(gt=0, le=1)]
Count = Annotated[int, Field(ge=1, le=10**9)]
Length = Annotated[int, Field(ge=1, le=10_000)]  # frames or pixels
Crop = Annotated[int, Field(ge=8, le=10_000)]


class Section(BaseModel):
    """A part of a recipe: its keys are typed, unknown ones are errors, and it never changes."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Data(Section):
    """Which videos."""

    format: Literal["list", "kinetics", "folder", "something_something", "charades", "ucf101", "hmdb51"] = Field(
        description="how the annotations are written"
    )
    root: str = Field(description="the folder that the videos' paths are relative to")
    train: str = Field(description="annotations of the training videos, relative to root")
    val: str = Field(description="annotations of the validation videos, relative to root")
    classes: Annotated[int, Field(ge=2, le=1_000_000)] = Field(description="number of classes")
    outside_root: bool = Field(False, description="whether a list may name videos outside of root (format: list)")
    videos: Count | None = Field(None, description="training videos to expect; `mgtrain plan` uses it without the data")
    checked: str | None = Field(
        None, description="file made by `mgtrain data check`: videos that it says cannot be used are left out"
    )
    prepared: str | None = Field(
        None, description="folder made by `mgtrain data prepare`, to read the clips from; none: from the originals"
    )
    enlarge: Annotated[float, Field(ge=1, le=1e9)] = Field(
        1.0, description="by how much pixels of a prepared level may be enlarged where a larger level exists"
    )
    skip_loop_filter: Literal["default", "bidir", "all"] = Field(
        "default",
        description="of H.264, where clips come from the originals: bidir decodes a tenth faster, 0.4/255 off",
    )
    mirrored: tuple[tuple[str | int, str | int], ...] = Field(
        (), description="pairs of classes, by name or number, that a horizontal flip makes of one another"
    )
    multi_label: bool = Field(
        False, description="whether a video may have several classes, or none: sigmoid, mean average precision"
    )
    max_bad_fraction: Fraction = Field(0.01, description="stop when more of the videos than this cannot be decoded")

    @model_validator(mode="after")
    def _outside_by_lists_only(self) -> Data:
        if self.outside_root and self.format != "list":
            raise ValueError(f"outside_root is for format: list; annotations of format {self.format} name no paths")
        return self

    @model_validator(mode="after")
    def _mirrored_once(self) -> Data:
        for name, count in Counter(name for pair in self.mirrored for name in pair).items():
            if count > 1:
                raise ValueError(f"mirrored names the class {name!r} twice; name every class once at most")
        return self


class Clip(Section):
    """The base grid: how the baseline cuts a clip from a video."""

    frames: Length = Field(description="T, frames of a clip")
    sampling: Literal["dense", "segments"] = Field(
        "dense",
        description="dense: frames `stride` apart; segments: one out of each of `frames` stretches of the whole video",
    )
    stride: Length = Field(
        1, description="frames of the source, at `fps`, from one frame of a clip to the next; of no use with segments"
    )
    crop: Crop = Field(description="S, pixels")
    short_side: tuple[Length, Length] = Field(description="range of the resized video's short side, pixels")
    fps: Positive = Field(30.0, description="frame rate that `stride` refers to")
    flip: Fraction = Field(0.5, description="probability of a horizontal flip")
    inverse_uniform: bool = Field(False, description="draw the short side inverse-uniformly (Something-Something)")

    @model_validator(mode="after")
    def _ordered(self) -> Clip:
        if self.sampling == "dense" and "stride" not in self.model_fields_set:
            raise ValueError("missing key 'stride'; only sampling: segments does without")
        low, high = self.short_side
        if not self.crop <= low <= high:
            raise ValueError(f"short_side [{low}, {high}] must be ascending and not smaller than crop {self.crop}")
        return self


class Augment(Section):
    """What happens to training clips, and to their labels, after they are cut. Everything is off unless asked for."""

    rand_augment: Annotated[int, Field(ge=0, le=100)] = Field(0, description="operations of RandAugment on each clip")
    magnitude: Annotated[int, Field(ge=0, le=30)] = Field(9, description="of RandAugment's operations")
    brightness: Fraction = Field(0.0, description="a clip's brightness is drawn from 1 - brightness .. 1 + brightness")
    contrast: Fraction = Field(0.0, description="the same for contrast, about the clip's mean grey")
    saturation: Fraction = Field(0.0, description="the same for saturation")
    hue: Annotated[float, Field(ge=0, le=0.5)] = Field(0.0, description="largest turn of the hue, in whole turns")
    erase: Fraction = Field(0.0, description="probability that a box of a clip is erased")
    mixup: NotNegative = Field(0.0, description="alpha of MixUp's Beta(alpha, alpha); 0: no MixUp")
    cutmix: NotNegative = Field(
        0.0, description="alpha of CutMix's Beta(alpha, alpha); 0: no CutMix; with MixUp, each pair of clips draws one"
    )
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="share of a label spread evenly")

    @property
    def jitters_colour(self) -> bool:
        """Whether colours change."""
        return max(self.brightness, self.contrast, self.saturation, self.hue) > 0

    @property
    def mixes(self) -> bool:
        """Whether pairs of clips are mixed."""
        return max(self.mixup, self.cutmix) > 0


class Evaluation(Section):
    """The one grid of every evaluation, and when evaluations happen."""

    crop: Crop = Field(description="pixels")
    short_side: Length = Field(description="short side of the resized video, pixels")
    views: Literal["mean", "max"] = Field(
        "mean", description="what becomes of a class's probabilities in several views of a video (Charades: max)"
    )
    per_phase: Annotated[int, Field(ge=1, le=1000)] = Field(
        1, description="evaluations in each phase, the last one at its end"
    )
    recalibration_batches: Annotated[int, Field(ge=0, le=10**9)] = Field(
        200, description="batches that set BatchNorm's statistics before an evaluation; 0: running averages"
    )

    @model_validator(mode="after")
    def _fits(self) -> Evaluation:
        if self.short_side < self.crop:
            raise ValueError(f"short_side {self.short_side} must not be smaller than crop {self.crop}")
        return self


class Init(Section):
    """What training starts from. Fine-tuning usually freezes nothing and takes a lower `optim.lr`."""

    weights: str | None = Field(
        None, description="a file of weights, ours or another project's (see `mgtrain weights`); none: random ones"
    )
    at_least: Fraction = Field(
        1.0, description="share of the model's tensors that the file must have, a resized classifier left aside"
    )
    freeze: Literal["none", "stem", "res2", "res3", "res4", "backbone"] = Field(
        "none", description="the last stage that stays as loaded; backbone: all but the classifier (linear probing)"
    )
    freeze_bn: bool = Field(False, description="keep BatchNorm's statistics as loaded, and normalize by them")


class Batch(Section):
    """The baseline's mini-batch over all GPUs."""

    clips: Count = Field(description="B, clips of a step of the base shape")
    bn_clips: Count = Field(8, description="clips of the long-cycle batch that share BatchNorm's statistics")


class Optim(Section):
    """SGD and the baseline's learning-rate schedule."""

    lr: Annotated[float, Field(gt=0, le=1e30)] = Field(description="base learning rate, for a step of the base shape")
    curve: Literal["steps", "cosine"] = Field("steps", description="how the learning rate falls")
    stages: Annotated[tuple[Positive, ...], Field(min_length=1, max_length=100)] = Field(
        description="epochs of each learning-rate stage of the baseline"
    )
    gamma: Scale = Field(0.1, description="factor from one stage's learning rate to the next (curve: steps)")
    end_lr: NotNegative = Field(0.0, description="learning rate at the end (curve: cosine)")
    warmup_epochs: NotNegative = Field(0.0, description="epochs of linear warm-up")
    warmup_lr: NotNegative = Field(0.0, description="learning rate at the first step of warm-up")
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(0.9, description="of SGD")
    nesterov: bool = Field(True, description="whether the momentum looks ahead")
    weight_decay: NotNegative = Field(1e-4, description="of everything but BatchNorm")
    head_lr: Positive = Field(1.0, description="learning rate of the classifier, relative to that of the rest")

    @model_validator(mode="after")
    def _nesterov_has_momentum(self) -> Optim:
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs a momentum above 0")
        return self


class BaselineSchedule(Section):
    """Every step has the base shape."""

    name: Literal["baseline"]


class MultigridSchedule(Section):
    """The long and the short cycle of Wu et al. 2020; the defaults are the paper's."""

    name: Literal["multigrid"]
    epoch_factor: Positive = Field(1.5, description="epochs relative to the baseline's")
    long_cycle: Annotated[tuple[tuple[Scale, Scale], ...], Field(max_length=20)] = Field(
        ((0.25, 0.7071), (0.5, 0.7071), (0.5, 1.0), (1.0, 1.0)),
        description="[frames, crop] relative to the base, coarse to fine; []: no long cycle",
    )
    short_cycle: Annotated[tuple[Scale, ...], Field(max_length=20)] = Field(
        (0.5, 0.7071), description="crops relative to the base's that take turns with the long cycle's; []: none"
    )
    fine_tune_short_cycle: bool = Field(True, description="keep the short cycle in the last stage")


Schedule = Annotated[BaselineSchedule | MultigridSchedule, Field(discriminator="name")]


class Hardware(Section):
    """How the work is done. Nothing here changes which clips a step sees; only `precision` changes rounding."""

    precision: Literal["fp32", "bf16", "fp16"] = Field("fp32", description="of convolutions, by autocast")
    micro_clips: Count | None = Field(
        None,
        description="most clips of a forward pass on one GPU, at the base shape's volume; cut along BatchNorm groups",
    )
    memory_gib: Positive | None = Field(
        None,
        description="of one device; where a step would take more, micro_clips is lowered, then recompute set. None: "
        "a GPU's own",
    )
    recompute: bool = Field(
        False, description="keep only the blocks' inputs for the backward pass: less memory, a third more time"
    )
    compile: Literal["no", "default", "graphs"] = Field(
        "no",
        description="by torch.compile, each shape for itself where its steps win back the time; graphs: as CUDA graphs",
    )
    workers: Annotated[int, Field(ge=0, le=1000)] | None = Field(
        None,
        description="loader processes per rank; none given: the cores shared among the ranks, half of that on a CPU",
    )
    channels_last: bool = Field(True, description="memory layout of clips and weights")


class Logging(Section):
    """What a run writes down, and how often."""

    steps: Count = Field(10, description="log every so many steps; 1 waits for the GPU at each step")
    checkpoint_steps: Count = Field(1000, description="save every so many steps, besides at every evaluation")
    keep_checkpoints: Count = Field(3, description="newest checkpoints to keep, apart from the last and the best")


class Faults(Section):
    """What is done when something goes wrong. Nothing here changes a run in which nothing does."""

    non_finite: Literal["stop", "skip", "rollback"] = Field(
        "stop",
        description="a loss or gradient that is not finite: stop; leave the step's update out (skip); "
        "or go back to the newest checkpoint's weights as well (rollback)",
    )
    non_finite_steps: Count = Field(10, description="most such steps of a run that are left out or taken back")
    timeout_seconds: Positive = Field(
        900.0, description="a process in which nothing has happened for so long says what it was doing, and ends"
    )


class Recipe(Section):
    """Everything that defines a run. Two runs of one recipe see the same clips in the same steps."""

    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(0, description="of the weights, clips and everything drawn")
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
    def _smooth_one_label(self) -> Recipe:
        if self.data.multi_label and self.augment.label_smoothing:
            raise ValueError("augment.label_smoothing is for one label per video; set it to 0 with data.multi_label")
        return self

    @property
    def base(self) -> Shape:
        """The baseline's mini-batch, B x T x S x S."""
        return Shape(self.batch.clips, self.clip.frames, self.clip.crop)

    @property
    def evaluation_shape(self) -> Shape:
        """One clip of an evaluation."""
        return Shape(1, self.clip.frames, self.evaluation.crop)

    def flat(self) -> dict[str, Any]:
        """Every key with its section, such as `optim.lr`, and its value as plain data."""
        return _flat(self.model_dump(mode="json"))

    def to_yaml(self) -> str:
        """The complete recipe, defaults included, as YAML that `load_recipe` reads back."""
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
