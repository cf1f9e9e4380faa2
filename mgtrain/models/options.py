"""What a recipe may say under `model:`, without torch: the keyword arguments of the factories of the same names."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Count = Annotated[int, Field(ge=1, le=200)]
Blocks = tuple[Count, Count, Count, Count]


class _ResNetOptions(BaseModel):
    """What all architectures have in common."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    width: int = Field(
        64, ge=8, le=1024, multiple_of=8, description="channels of the (slow) stem; later stages scale with it"
    )
    depth: Literal[50, 101] | Blocks = Field(50, description="50, 101 or the number of blocks of res2 .. res5")
    dropout: float = Field(0.5, ge=0, lt=1, description="probability of dropping a feature before the classifier")


class I3DOptions(_ResNetOptions):
    """I3D, a ResNet inflated in time."""

    name: Literal["i3d_r50"]


class I3DNonLocalOptions(_ResNetOptions):
    """I3D with non-local blocks in res3 and res4."""

    name: Literal["i3d_nln_r50"]


class SlowFastOptions(_ResNetOptions):
    """SlowFast: a wide pathway that sees few frames and a narrow one that sees all of them."""

    name: Literal["slowfast_r50"]
    alpha: int = Field(4, ge=1, le=10_000, description="the slow pathway sees one frame in `alpha`")
    beta_inv: int = Field(8, ge=1, description="the fast pathway has 1/`beta_inv` of the slow one's channels")
    fusion_kernel: Literal[1, 3, 5, 7, 9] = Field(7, description="frames of the lateral convolutions' kernel")

    @model_validator(mode="after")
    def _check_width(self) -> SlowFastOptions:
        if self.width % self.beta_inv:
            raise ValueError(f"width {self.width} does not divide by beta_inv {self.beta_inv}; use a multiple of it")
        return self


ModelOptions = Annotated[I3DOptions | I3DNonLocalOptions | SlowFastOptions, Field(discriminator="name")]
