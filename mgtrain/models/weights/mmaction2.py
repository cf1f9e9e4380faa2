"""MMAction2's names, in its .pth files."""

from __future__ import annotations

import torch

from mgtrain.models.weights.naming import STAGES, Naming, Tensors


def mend(tensors: Tensors) -> Tensors:
    """The classifier's columns in our order, as MMAction2's SlowFast has the fast pathway's features first.

    And a bias of zero for the last convolution of a non-local block, which has none there.
    """
    for name in [name for name in tensors if ".nonlocal" in name and name.endswith(".out.weight")]:
        tensors.setdefault(name.replace("weight", "bias"), torch.zeros(len(tensors[name])))
    last = [name for name in tensors if name.startswith("fast.res5.") and name.endswith(".conv3.weight")]
    if last and "head.linear.weight" in tensors:
        fast = len(tensors[last[0]])
        weight = tensors["head.linear.weight"]  # (classes, fast + slow)
        tensors["head.linear.weight"] = torch.cat([weight[:, fast:], weight[:, :fast]], dim=1)
    return tensors


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
        (r"\.theta\.conv\.", ".query."),
        (r"\.phi(\.0)?\.conv\.", ".key."),
        (r"\.g(\.0)?\.conv\.", ".value."),
        (r"\.conv_out\.conv\.", ".out."),
        (r"\.conv(\d)\.conv\.", r".conv\1."),
        (r"\.conv(\d)\.bn\.", r".norm\1."),
        (r"\.downsample\.conv\.", ".shortcut.0."),
        (r"\.downsample\.bn\.", ".shortcut.1."),
        (r"\.(conv_out\.)?bn\.", ".norm."),
    ),
    mend=mend,
    notes=(
        (r"slow\.stem\.", "its inputs are normalized by ImageNet's mean and deviation, not by 0.45 and 0.225"),
        (r"laterals\.", "its lateral connections have no ReLU, and no BatchNorm if the file has none"),
        (r".*\.nonlocal", "its non-local blocks pool after their projections and do not scale the attention"),
    ),
)
