"""PySlowFast's names (facebookresearch/SlowFast), in its .pyth files and in the Caffe2 .pkl files of its model zoo."""

from __future__ import annotations

from mgtrain.models.weights.naming import Naming

LETTERS = (("a", 1), ("b", 2), ("c", 3))  # of a bottleneck's convolutions
PROJECTIONS = (("theta", "query"), ("phi", "key"), ("g", "value"), ("out", "out"))  # of a non-local block

PYSLOWFAST = Naming(
    "PySlowFast",
    sign=r"s1\.pathway0_stem\.conv\.weight",
    rules=(
        (r"bn\.bn\.", "bn."),  # of sub-BN, when it was saved as it is in training
        (r"^s1\.pathway(\d)_stem\.", r"pathway\1.stem."),
        (r"^s(\d)\.pathway(\d)_", r"pathway\2.res\1."),
        (r"^pathway0\.", "slow."),
        (r"^pathway1\.", "fast."),
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
        # 1. The last part: `_w`, `_b` of a convolution, `_bn_s`, `_bn_b`, `_bn_rm`, `_bn_riv` of a BatchNorm.
        (r"_bn_s$", "_norm.weight"),
        (r"_bn_b$", "_norm.bias"),
        (r"_bn_rm$", "_norm.running_mean"),
        (r"_bn_riv$", "_norm.running_var"),
        (r"_w$", "_conv.weight"),
        (r"_b$", "_conv.bias"),
        # 2. Where it is.
        (r"^t_pool1_subsample_", "laterals.stem."),
        (r"^t_res(\d)_\d+_branch2c_bn_subsample_", r"laterals.res\1."),
        (r"^t_(?=res|conv1)", "fast."),
        (r"^(?=res|conv1)", "slow."),
        (r"\.(res_)?conv1_", ".stem."),
        (r"\.res(\d)_(\d+)_", r".res\1.\2."),
        (r"^nonlocal_conv(\d)_(\d+)_", r"slow.res\1.nonlocal\2."),
        # 3. Which one it is there.
        (r"\.branch1_conv\.", ".shortcut.0."),
        (r"\.branch1_norm\.", ".shortcut.1."),
        *((rf"\.branch2{letter}_(conv|norm)\.", rf".\g<1>{number}.") for letter, number in LETTERS),
        *((rf"\.{theirs}_conv\.", f".{ours}.") for theirs, ours in PROJECTIONS),
        (r"^pred_conv\.", "head.linear."),
    ),
    ignored=r"lr$|model_iter$|.*_momentum$",
)
