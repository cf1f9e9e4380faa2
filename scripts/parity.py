"""Compare our networks with the published ones on the same weights and clips, and write the tests' golden file.

    python scripts/parity.py --pyslowfast CHECKOUT             # full width, float32: a table
    python scripts/parity.py --pyslowfast CHECKOUT --golden F  # width 16, float64: also the golden

Needs a checkout of facebookresearch/SlowFast and, installed, pytorchvideo 0.1.5, mmaction2 1.2 with mmengine and
mmcv-lite, fvcore, iopath, yacs and simplejson (none of which mgtrain needs). Imports that a classifier does not use
(detectron2, cv2 and the like) are replaced by empty modules, and the packages' __init__ files, which import everything,
are skipped. Nothing else is changed, except that heads pool over the whole feature map, as PySlowFast's do in multigrid
training, and return logits.
"""

from __future__ import annotations

import argparse
import importlib.machinery
import importlib.util
import json
import sys
import tempfile
import types
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mgtrain.models import build_model
from mgtrain.models.slowfast import slow_frames
from mgtrain.models.weights.load import load_weights, read_weights

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from foreign import clips, fingerprint, value

ABSENT = {"cv2", "decord", "detectron2", "fairscale", "mmdet", "mmpose", "moviepy", "pandas", "psutil", "sklearn"}
CLASSES = 10


class Empty(types.ModuleType):
    """A module in which any name is an empty class, or 0 if it is in capitals."""

    __path__ = ()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return 0 if name.split("_")[0].isupper() else type(name, (), {"__getattr__": lambda *_: 0})


class Absent:
    """Imports empty modules in place of those in `ABSENT`."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name.split(".")[0] in ABSENT or name.startswith("mmcv.ops"):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)  # type: ignore[arg-type]
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return Empty(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        module.__dict__.setdefault("__version__", "4.8.0")


def bare(name: str, path: Path) -> None:
    """Make a package importable without running its __init__."""
    module = types.ModuleType(name)
    module.__path__ = [str(path)]
    module.__dict__["__version__"] = "1.2.0"
    sys.modules[name] = module


@dataclass(frozen=True)
class Network:
    """A published network: how to make it, the options of ours, and the clips (B, T, S) to compare them on."""

    project: str
    make: Callable[..., nn.Module]  # called with the width
    options: dict[str, Any]
    shapes: tuple[tuple[int, int, int], ...]
    frames: Callable[[int], tuple[int, ...]] | None = None  # the slow pathway's; None: it takes whole clips


def networks(checkout: Path) -> Iterator[tuple[str, Network]]:
    sys.meta_path.insert(0, Absent())  # type: ignore[arg-type]
    yield from pyslowfast(checkout)
    yield from pytorchvideo()
    yield from mmaction2()


def pyslowfast(checkout: Path) -> Iterator[tuple[str, Network]]:
    sys.path.insert(0, str(checkout))
    import pytorchvideo.layers.distributed as distributed

    for name in ("cat_all_gather", "get_local_process_group", "get_local_rank", "get_local_size", "get_world_size",
                 "init_distributed_training"):  # fmt: skip
        distributed.__dict__.setdefault(name, None)
    for name in ("pytorchvideo.losses", "pytorchvideo.losses.soft_target_cross_entropy"):
        sys.modules[name] = Empty(name)
    bare("slowfast.models", checkout / "slowfast/models")
    from slowfast.config.defaults import get_cfg
    from slowfast.models import video_model_builder

    def maker(config: str) -> Callable[..., nn.Module]:
        def make(width: int, **more: Any) -> nn.Module:
            cfg = get_cfg()
            cfg.merge_from_file(str(checkout / f"configs/Kinetics/{config}.yaml"))
            changes = {"MULTIGRID.SHORT_CYCLE": True, "MODEL.HEAD_ACT": "none", "MODEL.DROPOUT_RATE": 0.0,
                       "MODEL.NUM_CLASSES": CLASSES, "RESNET.WIDTH_PER_GROUP": width, **more}  # fmt: skip
            cfg.merge_from_list([part for change in changes.items() for part in change])
            model: nn.Module = getattr(video_model_builder, cfg.MODEL.MODEL_NAME)(cfg)
            return model

        return make

    slowfast = {"name": "slowfast_r50"}
    shapes = ((2, 8, 112), (2, 16, 158), (2, 3, 112))
    for config, alpha, kernel, depth in [
        ("SLOWFAST_8x8_R50", 4, 7, 50), ("SLOWFAST_4x16_R50", 8, 5, 50), ("c2/SLOWFAST_8x8_R101_101_101", 4, 5, 101),
        ("c2/SLOWFAST_8x8_R101_50_50", 4, 5, 101),
    ]:  # fmt: skip
        options = {**slowfast, "alpha": alpha, "fusion_kernel": kernel, "depth": depth}
        yield config, Network("PySlowFast", maker(config), options, shapes if depth == 50 else shapes[::2],
                              frames=lambda t, alpha=alpha: slow_frames(t, alpha))  # fmt: skip
    shapes = ((2, 8, 112), (2, 4, 158), (2, 5, 112))
    for config, name, depth in [
        ("I3D_8x8_R50", "i3d_r50", 50), ("I3D_NLN_8x8_R50", "i3d_nln_r50", 50), ("I3D_8x8_R101", "i3d_r50", 101),
        ("I3D_NLN_8x8_R101", "i3d_nln_r50", 101),
    ]:  # fmt: skip
        options = {"name": name, "depth": depth}
        yield config, Network("PySlowFast", maker(config), options, shapes if depth == 50 else shapes[::2])


def pytorchvideo() -> Iterator[tuple[str, Network]]:
    from pytorchvideo.models.resnet import create_resnet
    from pytorchvideo.models.slowfast import create_slowfast

    def slowfast(width: int) -> nn.Module:
        model: nn.Module = create_slowfast(
            model_num_class=CLASSES, dropout_rate=0.0, stem_dim_outs=(width, width // 8), head_activation=None
        )
        model.blocks[5].pool = nn.ModuleList([nn.AdaptiveAvgPool3d(1), nn.AdaptiveAvgPool3d(1)])
        return model

    def i3d(width: int) -> nn.Module:  # with the arguments of i3d_r50 in PyTorchVideo's hub
        model: nn.Module = create_resnet(
            model_num_class=CLASSES, dropout_rate=0.0, stem_dim_out=width, head_activation=None,
            stem_conv_kernel_size=(5, 7, 7), stage1_pool=nn.MaxPool3d,
            stage_conv_a_kernel_size=(
                (3, 1, 1), [(3, 1, 1), (1, 1, 1)], [(3, 1, 1), (1, 1, 1)], [(1, 1, 1), (3, 1, 1)],
            ),
        )  # fmt: skip
        model.blocks[6].pool = nn.AdaptiveAvgPool3d(1)
        return model

    options: dict[str, Any] = {"name": "slowfast_r50"}
    shapes = ((2, 8, 112), (2, 16, 158), (2, 3, 112))
    yield "slowfast_r50", Network("PyTorchVideo", slowfast, options, shapes, frames=lambda t: slow_frames(t, 4))
    yield "i3d_r50", Network("PyTorchVideo", i3d, {"name": "i3d_r50"}, ((2, 8, 112), (2, 4, 158), (2, 5, 112)))


class Recognizer(nn.Module):
    """MMAction2's backbone and classifier, named as in its checkpoints."""

    def __init__(self, backbone: nn.Module, features: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.cls_head = nn.Module()
        self.cls_head.fc_cls = nn.Linear(features, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        features = self.backbone(x)
        pathways = features[::-1] if isinstance(features, tuple) else [features]  # its head expects the fast one first
        logits: Tensor = self.cls_head.fc_cls(torch.cat([p.mean((2, 3, 4)) for p in pathways], 1))
        return logits


def mmaction2() -> Iterator[tuple[str, Network]]:
    spec = importlib.util.find_spec("mmengine")
    assert spec is not None
    assert spec.origin is not None
    package = Path(spec.origin).parent.parent / "mmaction"
    for name in ("mmaction", "mmaction.models", "mmaction.models.backbones"):
        bare(name, package.parent / name.replace(".", "/"))
    sys.modules["mmaction.utils"] = Empty("mmaction.utils")
    from mmaction.models.backbones.resnet3d import ResNet3d
    from mmaction.models.backbones.resnet3d_slowfast import ResNet3dSlowFast

    plain = {"depth": 50, "pretrained": None, "conv1_stride_t": 1, "pool1_stride_t": 1, "norm_eval": False}

    def i3d(width: int) -> nn.Module:
        inflate = ((1, 1, 1), (1, 0, 1, 0), (1, 0, 1, 0, 1, 0), (0, 1, 0))
        return Recognizer(ResNet3d(**plain, base_channels=width, conv1_kernel=(5, 7, 7), inflate=inflate), 32 * width)

    def slowfast(width: int) -> nn.Module:
        slow = {**plain, "type": "resnet3d", "lateral": True, "lateral_norm": True, "base_channels": width,
                "conv1_kernel": (1, 7, 7), "inflate": (0, 0, 1, 1), "fusion_kernel": 7}  # fmt: skip
        fast = {**plain, "type": "resnet3d", "lateral": False, "base_channels": width // 8, "conv1_kernel": (5, 7, 7)}
        backbone = ResNet3dSlowFast(
            resample_rate=4, speed_ratio=4, channel_ratio=8, slow_pathway=slow, fast_pathway=fast
        )
        return Recognizer(backbone, 36 * width)

    yield "i3d, no stride in time", Network("MMAction2", i3d, {"name": "i3d_r50"}, ((2, 8, 112), (2, 5, 112)))
    # From 8 frames on, its slow pathway gets other frames than in all other projects.
    yield "slowfast, lateral_norm", Network("MMAction2", slowfast, {"name": "slowfast_r50"}, ((2, 4, 112),))


@torch.no_grad()
def compare(title: str, network: Network, width: int, dtype: torch.dtype, file: Path) -> Iterator[dict[str, Any]]:
    """A row for each shape and mode: the published network's logits, and the relative error of ours."""
    theirs = network.make(width).to(dtype)
    ours, after = (build_model(**network.options, classes=CLASSES, width=width, dropout=0).to(dtype) for _ in range(2))
    for clip_count, frames, crop in network.shapes:
        x = torch.from_numpy(clips(clip_count, 3, frames, crop, crop)).to(dtype)  # (B, 3, T, S, S)
        for mode in ("evaluation", "training"):
            given: Any = x
            if network.frames:  # a new list each time, because PyTorchVideo writes to it
                given = [x[:, :, list(network.frames(frames))], x]
            elif network.project == "PySlowFast":
                given = [x]
            fill(theirs)
            matched = take(theirs, ours, file)
            logits = theirs.train(mode == "training")(given).flatten(1)  # (B, classes)
            error = apart(ours.train(mode == "training")(x), logits)
            take(theirs, after, file)
            own, running = ours.state_dict(), {n: t for n, t in after.state_dict().items() if ".running_" in n}
            yield {
                "title": title, "project": network.project, "model": network.options, "width": width,
                "names": fingerprint((name, tuple(tensor.shape)) for name, tensor in theirs.state_dict().items()),
                "shape": [clip_count, frames, crop], "mode": mode, "logits": logits.tolist(),
                "running": {name: tensor[:3].tolist() for name, tensor in [*running.items()][::97]},
                "matched": matched, "error": error,
                "running_error": max(apart(own[name], tensor) for name, tensor in running.items()),
            }  # fmt: skip


def fill(model: nn.Module) -> None:
    """Set the model's weights by the formula of the tests."""
    for name, tensor in model.state_dict().items():
        tensor.copy_(torch.from_numpy(value(name, tuple(tensor.shape))))


def take(theirs: nn.Module, ours: nn.Module, file: Path) -> int:
    """Save their tensors to a file and import it into our model; returns how many match."""
    torch.save({"state_dict": theirs.state_dict()}, file)
    report = load_weights(ours, read_weights(file))
    report.demand(1.0, file)
    return len(report.matched)


def apart(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, relative to the largest number."""
    return float((ours - theirs).abs().max() / theirs.abs().max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pyslowfast", type=Path, required=True, metavar="CHECKOUT")
    parser.add_argument("--golden", type=Path, metavar="FILE")
    parser.add_argument("--only", default="", help="only networks whose title contains this")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    width, dtype = (16, torch.float64) if arguments.golden else (64, torch.float32)
    rows = []
    print(f"{'project':12} {'network':28} {'B x T x S':12} {'mode':10} {'matched':>7} {'logits':>8} {'BN stats':>8}")
    for title, network in networks(arguments.pyslowfast.resolve()):
        if arguments.only not in title:
            continue
        with tempfile.TemporaryDirectory() as folder:
            for row in compare(title, network, width, dtype, Path(folder) / "weights.pth"):
                shape = "x".join(map(str, row["shape"]))
                print(
                    f"{row['project']:12} {title:28} {shape:12} {row['mode']:10} {row['matched']:7} "
                    f"{row.pop('error'):8.1e} {row.pop('running_error'):8.1e}",
                    flush=True,
                )
                rows.append(row)
    if arguments.golden:
        how = "python scripts/parity.py --pyslowfast CHECKOUT (facebookresearch/SlowFast at 287ec007) --golden FILE"
        lines = ",\n".join("  " + json.dumps(row) for row in rows)
        arguments.golden.write_text(f'{{\n "how": "{how}",\n "cases": [\n{lines}\n ]\n}}\n')


if __name__ == "__main__":
    main()
