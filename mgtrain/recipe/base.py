"""What all sections of a recipe are: their base class, and the ranges of their numbers."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[float, Field(gt=0, le=1e9)]
NotNegative = Annotated[float, Field(ge=0, le=1e9)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Scale = Annotated[float, Field(gt=0, le=1)]
Count = Annotated[int, Field(ge=1, le=10**9)]
Length = Annotated[int, Field(ge=1, le=10_000)]  # frames or pixels
Crop = Annotated[int, Field(ge=8, le=10_000)]


class Section(BaseModel):
    """A section of a recipe: typed keys, no unknown keys, read-only."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
