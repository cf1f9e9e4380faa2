"""The `optim` section of a recipe."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from mgtrain.recipe.base import NotNegative, Positive, Scale, Section

Momentum = Annotated[float, Field(ge=0, lt=1)]


class Optim(Section):
    """The optimizer, and the baseline's learning-rate schedule."""

    # Keys that came after the first checkpoints are not part of the plan's fingerprint: repr=False.
    name: Literal["sgd", "adamw"] = Field("sgd", repr=False, description="the optimizer; by default sgd")
    lr: float = Field(gt=0, le=1e30, description="base learning rate, for steps at the base shape")
    curve: Literal["steps", "cosine"] = Field("steps", description="shape of the learning-rate decay")
    stages: tuple[Positive, ...] = Field(
        min_length=1, max_length=100, description="epochs of each of the baseline's learning-rate stages"
    )
    gamma: Scale = Field(0.1, description="factor from one stage's learning rate to the next (curve: steps)")
    end_lr: NotNegative = Field(0.0, description="learning rate at the end (curve: cosine)")
    warmup_epochs: NotNegative = Field(0.0, description="epochs of linear warm-up")
    warmup_lr: NotNegative = Field(0.0, description="learning rate at the start of warm-up")
    scaling: Literal["linear", "sqrt"] = Field(
        "linear",
        repr=False,
        description=(
            "how the learning rate grows with a long-cycle shape's clips: as they do, or as their square root"
        ),
    )
    momentum: Momentum = Field(0.9, description="momentum (name: sgd)")
    nesterov: bool = Field(True, description="use Nesterov momentum (name: sgd)")
    betas: tuple[Momentum, Momentum] = Field(
        (0.9, 0.999), repr=False, description="decay of the means of gradients and of their squares (name: adamw)"
    )
    eps: Positive = Field(1e-8, repr=False, description="added to the root of the mean square (name: adamw)")
    weight_decay: NotNegative = Field(
        1e-4,
        description=(
            "weight decay; sgd: of all parameters but normalizations'; adamw: decoupled, of all but "
            "those, biases, scales, tokens and position tables"
        ),
    )
    head_lr: Positive = Field(1.0, description="learning rate of the classifier relative to the rest")
    layer_decay: Scale = Field(
        1.0, repr=False, description="learning rate of each repeated block relative to the next one's, down to the stem"
    )
    clip_norm: Positive | None = Field(
        None,
        repr=False,
        description="largest norm of a step's whole gradient; a larger one is scaled to it; null: none",
    )
    ema: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None,
        repr=False,
        description=(
            "decay, per `batch.clips` clips, of a moving average of the weights, which is evaluated and "
            "exported in their place; null: no average"
        ),
    )

    @model_validator(mode="after")
    def _keys_of_the_optimizer(self) -> "Optim":
        other, keys = ("adamw", ("betas", "eps")) if self.name == "sgd" else ("sgd", ("momentum", "nesterov"))
        for key in keys:
            if getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key} is a key of name: {other}, and name is {self.name}; leave it out")
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs a momentum above 0")
        return self
