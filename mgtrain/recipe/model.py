"""The `model` section of a recipe, with the arguments of the factories of the same names; does not import torch."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from mgtrain.recipe.base import Fraction, Section

BlockCount = Annotated[int, Field(ge=1, le=200)]
Blocks = tuple[BlockCount, BlockCount, BlockCount, BlockCount]
MEAN, STD = 0.45, 0.225  # of pixels in 0..1, the same for all channels (Feichtenhofer et al. 2019)
Colour = tuple[Fraction, Fraction, Fraction]
Deviation = Annotated[float, Field(gt=0, le=10)]


class _ResNetOptions(Section):
    """Options of all built-in architectures."""

    width: int = Field(
        64, ge=8, le=1024, multiple_of=8, description="channels of the (slow) stem; later stages scale with it"
    )
    depth: Literal[50, 101] | Blocks = Field(50, description="50, 101, or the numbers of blocks of res2 to res5")
    dropout: float = Field(0.5, ge=0, lt=1, description="probability of dropping a feature before the classifier")


class I3DOptions(_ResNetOptions):
    """I3D, a ResNet inflated in time."""

    name: Literal["i3d_r50"]


class I3DNonLocalOptions(_ResNetOptions):
    """I3D with non-local blocks in res3 and res4."""

    name: Literal["i3d_nln_r50"]
    attention: Literal["softmax", "dot_product"] = Field(
        "softmax", description="normalization in the non-local blocks; the paper's dot product has no softmax"
    )


class SlowFastOptions(_ResNetOptions):
    """SlowFast: a wide pathway that sees few frames, and a narrow one that sees all of them."""

    name: Literal["slowfast_r50"]
    alpha: int = Field(4, ge=1, le=10_000, description="the slow pathway sees one frame in `alpha`")
    beta_inv: int = Field(8, ge=1, description="the fast pathway has 1/`beta_inv` of the slow one's channels")
    fusion_kernel: Literal[1, 3, 5, 7, 9] = Field(7, description="kernel size of the lateral convolutions, frames")

    @model_validator(mode="after")
    def _check_width(self) -> "SlowFastOptions":
        if self.width % self.beta_inv:
            raise ValueError(f"width {self.width} is not a multiple of beta_inv {self.beta_inv}; use a multiple")
        return self


class TorchvisionOptions(Section):
    """A network of `torchvision.models.video`."""

    name: Literal["r3d_18", "mc3_18", "r2plus1d_18", "s3d", "swin3d_t", "mvit_v2_s"]
    drop_path: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        None,
        description=(
            "stochastic depth of swin3d_t and mvit_v2_s: the last block's probability of being left out, "
            "to which it rises from 0 at the first; null: torchvision's, 0.1 and 0.2"
        ),
    )

    @model_validator(mode="after")
    def _drops_paths_of_transformers(self) -> "TorchvisionOptions":
        if self.drop_path is not None and self.name not in ("swin3d_t", "mvit_v2_s"):
            raise ValueError(f"drop_path is for swin3d_t and mvit_v2_s; {self.name} has no stochastic depth")
        return self


class OwnOptions(Section):
    """Your own network: `MODELS[network](classes, **options)` of a Python module."""

    name: Literal["own"]
    module: str = Field(
        pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*$",
        description="Python module, installed or in the current folder, with a dict MODELS",
    )
    network: str = Field(description="key in MODELS")
    options: dict[str, Any] = Field({}, description="keyword arguments besides the number of classes")
    mean: Colour = Field((MEAN, MEAN, MEAN), description="mean of red, green and blue, pixels in 0..1")
    std: tuple[Deviation, Deviation, Deviation] = Field((STD, STD, STD), description="their standard deviations")


ModelOptions = Annotated[
    I3DOptions | I3DNonLocalOptions | SlowFastOptions | TorchvisionOptions | OwnOptions, Field(discriminator="name")
]
# Means and standard deviations for which torchvision trained its weights; `TORCHVISION_USUAL` for those not listed.
TORCHVISION_USUAL = (0.43216, 0.394666, 0.37645), (0.22803, 0.22145, 0.216989)
TORCHVISION_OWN = {
    "swin3d_t": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "mvit_v2_s": ((0.45, 0.45, 0.45), (0.225, 0.225, 0.225)),
}


def pixel_statistics(options: ModelOptions) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of red, green and blue that normalize the network's input; pixels in 0..1."""
    match options:
        case OwnOptions():
            return options.mean, options.std
        case TorchvisionOptions():
            return TORCHVISION_OWN.get(options.name, TORCHVISION_USUAL)
    return (MEAN,) * 3, (STD,) * 3
