"""BatchNorm of all groups at once, with the ReLU that follows it, in Triton kernels for GPUs."""

from mgtrain.models.fused.norm import norm_groups, usable

__all__ = ["norm_groups", "usable"]
