"""PyTorchVideo's names, in the files of its hub."""

from __future__ import annotations

from mgtrain.models.weights.naming import STAGES, Naming

I3D_BLOCKS = ((0, "stem"), (1, "res2"), (3, "res3"), (4, "res4"), (5, "res5"))  # the pooling is block 2

PYTORCHVIDEO = Naming(
    "PyTorchVideo",
    sign=r"blocks\.0\.(multipathway_blocks\.0\.)?conv\.weight",
    rules=(
        *((rf"^blocks\.{index}\.multipathway_", f"{stage}.") for index, stage in enumerate(STAGES)),
        (r"^(\w+)\.blocks\.0\.", r"slow.\1."),
        (r"^(\w+)\.blocks\.1\.", r"fast.\1."),
        (r"^(\w+)\.fusion\.", r"laterals.\1."),
        (r"^blocks\.\d+\.proj\.", "head.linear."),
        *((rf"^blocks\.{index}\.", f"slow.{stage}.") for index, stage in I3D_BLOCKS),
        (r"\.res_blocks\.", "."),
        (r"\.branch1_conv\.", ".shortcut.0."),
        (r"\.branch1_norm\.", ".shortcut.1."),
        *((rf"\.branch2\.(conv|norm)_{letter}\.", rf".\g<1>{number}.") for number, letter in enumerate("abc", start=1)),
        (r"\.conv_fast_to_slow\.", ".conv."),
    ),
)
