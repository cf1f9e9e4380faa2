"""Tables of rules that convert each project's tensor names to common names.

Common names are `<pathway>.<stage>.<rest>`: `slow.stem.conv.weight`, `fast.res2.0.norm1.bias`,
`slow.res3.nonlocal1.query.weight`, `laterals.res4.conv.weight`; and `head.linear.weight`. The pathway of a network with
a single one is `slow`. Within a block, `rest` is as in `mgtrain.models`.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Rules = tuple[tuple[str, str], ...]
STAGES = ("stem", "res2", "res3", "res4", "res5")
LETTERS = (("a", 1), ("b", 2), ("c", 3))  # of a bottleneck's convolutions
PROJECTIONS = (("theta", "query"), ("phi", "key"), ("g", "value"), ("out", "out"))  # of a non-local block
CAFFE2_NORM = (("s", "weight"), ("b", "bias"), ("rm", "running_mean"), ("riv", "running_var"))
BRANCH1 = ((r"\.branch1_conv\.", ".shortcut.0."), (r"\.branch1_norm\.", ".shortcut.1."))
I3D_BLOCKS = ((0, "stem"), (1, "res2"), (3, "res3"), (4, "res4"), (5, "res5"))  # the pooling is block 2
IMAGENET_PIXELS = "its inputs are normalized by ImageNet's mean and deviation, not by 0.45 and 0.225"


@dataclass(frozen=True, slots=True)
class Naming:
    """A project's names: `rules` are regular expressions and replacements, applied one after the other."""

    project: str
    sign: str  # pattern of the start of a name that identifies the project
    rules: Rules
    ignored: str = "$^"  # pattern of names that are not weights, such as an optimizer's state
    convert: Callable[[dict[str, Tensor]], None] = lambda _: None  # changes tensors that differ in more than names
    notes: Rules = ()  # (pattern of common names, how the project's networks with such a tensor differ from ours)

    def common(self, name: str) -> str:
        """The common name of a tensor."""
        for pattern, replacement in self.rules:
            name = re.sub(pattern, replacement, name)
        return name


def _mmaction2_differences(tensors: dict[str, Tensor]) -> None:
    """Add a bias of zero to the last convolution of non-local blocks; put the slow pathway's features first."""
    for name in [name for name in tensors if ".nonlocal" in name and name.endswith(".out.weight")]:
        tensors.setdefault(name.replace("weight", "bias"), torch.zeros(len(tensors[name])))
    last = [name for name in tensors if name.startswith("fast.res5.") and name.endswith(".conv3.weight")]
    if last and "head.linear.weight" in tensors:
        fast = len(tensors[last[0]])
        weight = tensors["head.linear.weight"]  # (classes, fast + slow)
        tensors["head.linear.weight"] = torch.cat([weight[:, fast:], weight[:, :fast]], dim=1)


OWN = Naming(
    "mgtrain",
    sign=r"(stem|slow\.0)\.conv\.weight",
    rules=(
        (r"^(?=stem\.|res\d\.)", "slow."),
        *((rf"^(slow|fast|laterals)\.{index}\.", rf"\1.{stage}.") for index, stage in enumerate(STAGES)),
    ),
)

# facebookresearch/SlowFast: .pyth files, and the Caffe2 .pkl files of its model zoo.
PYSLOWFAST = Naming(
    "PySlowFast",
    sign=r"s1\.pathway0_stem\.conv\.weight",
    rules=(
        (r"bn\.bn\.", "bn."),  # of sub-BN, when it was saved as it is in training
        (r"^s1\.pathway(\d)_stem\.", r"pathway\1.stem."),
        (r"^s(\d)\.pathway(\d)_", r"pathway\2.res\1."),
        *((rf"^pathway{index}\.", f"{pathway}.") for index, pathway in enumerate(("slow", "fast"))),
        (r"^s1_fuse\.", "laterals.stem."),
        (r"^s(\d)_fuse\.", r"laterals.res\1."),
        (r"\.res(\d+)\.branch", r".\1.branch"),
        (r"\.branch1\.", ".shortcut.0."),
        (r"\.branch1_bn\.", ".shortcut.1."),
        *((rf"\.branch2\.{letter}\.", f".conv{number}.") for letter, number in LETTERS),
        *((rf"\.branch2\.{letter}_bn\.", f".norm{number}.") for letter, number in LETTERS),
        *((rf"\.conv_{theirs}\.", f".{ours}.") for theirs, ours in PROJECTIONS),
        (r"\.conv_f2s\.", ".conv."),
        (r"\.bn\.", ".norm."),
        (r"^head\.projection\.", "head.linear."),
    ),
    ignored=r".*bn\.split_bn\.",
)

CAFFE2 = Naming(
    "Caffe2",
    sign=r"(t_)?conv1_w",
    rules=(
        # 1. The suffix: `_w`, `_b` of a convolution, `_bn_s`, `_bn_b`, `_bn_rm`, `_bn_riv` of a BatchNorm.
        *((rf"_bn_{theirs}$", f"_norm.{ours}") for theirs, ours in CAFFE2_NORM),
        *((rf"_{theirs}$", f"_conv.{ours}") for theirs, ours in (("w", "weight"), ("b", "bias"))),
        # 2. The pathway, stage and block.
        (r"^t_pool1_subsample_", "laterals.stem."),
        (r"^t_res(\d)_\d+_branch2c_bn_subsample_", r"laterals.res\1."),
        (r"^t_(?=res|conv1)", "fast."),
        (r"^(?=res|conv1)", "slow."),
        (r"\.(res_)?conv1_", ".stem."),
        (r"\.res(\d)_(\d+)_", r".res\1.\2."),
        (r"^nonlocal_conv(\d)_(\d+)_", r"slow.res\1.nonlocal\2."),
        # 3. The layer within the block.
        *BRANCH1,
        *((rf"\.branch2{letter}_(conv|norm)\.", rf".\g<1>{number}.") for letter, number in LETTERS),
        *((rf"\.{theirs}_conv\.", f".{ours}.") for theirs, ours in PROJECTIONS),
        (r"^pred_conv\.", "head.linear."),
    ),
    ignored=r"lr$|model_iter$|.*_momentum$",
)

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
        *BRANCH1,
        *((rf"\.branch2\.(conv|norm)_{letter}\.", rf".\g<1>{number}.") for letter, number in LETTERS),
        (r"\.conv_fast_to_slow\.", ".conv."),
    ),
)

MMACTION2 = Naming(
    "MMAction2",
    sign=r"backbone\.(slow_path\.)?conv1\.conv\.weight",
    rules=(
        (r"^backbone\.(slow|fast)_path\.", r"\1."),
        (r"^backbone\.", "slow."),
        (r"^cls_head\.fc_cls\.", "head.linear."),
        (r"^slow\.conv1_lateral\.", "laterals.stem."),
        *((rf"^slow\.layer{index}_lateral\.", f"laterals.{stage}.") for index, stage in enumerate(STAGES) if index),
        (r"^(slow|fast)\.conv1\.", r"\1.stem."),
        *((rf"^(slow|fast)\.layer{index}\.", rf"\1.{stage}.") for index, stage in enumerate(STAGES) if index),
        (r"\.(\d+)\.non_local_block\.", r".nonlocal\1."),
        *((rf"\.{theirs}(\.0)?\.conv\.", f".{ours}.") for theirs, ours in PROJECTIONS[:3]),
        (r"\.conv_out\.conv\.", ".out."),
        (r"\.conv(\d)\.conv\.", r".conv\1."),
        (r"\.conv(\d)\.bn\.", r".norm\1."),
        (r"\.downsample\.conv\.", ".shortcut.0."),
        (r"\.downsample\.bn\.", ".shortcut.1."),
        (r"\.(conv_out\.)?bn\.", ".norm."),
    ),
    convert=_mmaction2_differences,
    notes=(
        (r"slow\.stem\.", IMAGENET_PIXELS),
        (r"laterals\.", "its lateral connections have no ReLU, and no BatchNorm if the file has none"),
        (r".*\.nonlocal", "its non-local blocks pool after their projections and do not scale the attention"),
    ),
)

# The 2-D ResNets of torchvision and timm.
TORCHVISION_2D = Naming(
    "torchvision",
    sign=r"layer1\.0\.conv1\.weight",
    rules=(
        (r"^conv1\.", "slow.stem.conv."),
        (r"^bn1\.", "slow.stem.norm."),
        *((rf"^layer{index}\.", f"slow.{stage}.") for index, stage in enumerate(STAGES) if index),
        (r"\.bn(\d)\.", r".norm\1."),
        (r"\.downsample\.", ".shortcut."),
        (r"^fc\.", "head.linear."),
    ),
    notes=((r"slow\.stem\.", IMAGENET_PIXELS),),
)

NAMINGS = (OWN, PYSLOWFAST, CAFFE2, PYTORCHVIDEO, MMACTION2, TORCHVISION_2D)
