"""Weights of other projects: names, shapes, reports, and files that would rather run something."""

from __future__ import annotations

import collections
import io
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import foreign
import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor, nn

from mgtrain.cli.weights import import_weights
from mgtrain.engine.checks import make_model
from mgtrain.engine.fit import fit
from mgtrain.engine.update.optim import make_optimizer
from mgtrain.errors import CheckpointError, ThresholdError, UsageError
from mgtrain.models import build_model
from mgtrain.models.norm import GroupBatchNorm3d, reset_group_stats
from mgtrain.models.weights.files import read_tensors
from mgtrain.models.weights.load import (
    Weights,
    download,
    fit_shape,
    freeze,
    inflate,
    load_weights,
    model_options,
    read_weights,
    save_weights,
    start_from,
)  # fmt: skip
from mgtrain.models.weights.naming import OWN
from mgtrain.processes.distributed import World
from mgtrain.recipe import Init, Recipe, parse_recipe
from mgtrain.runs.checkpoint import CheckpointInfo, save_checkpoint
from mgtrain.runs.folder import RunDir

BLOCKS = (1, 2, 2, 1)
SMALL = {"width": 8, "depth": list(BLOCKS)}
NAMES = ("slowfast_r50", "i3d_r50", "i3d_nln_r50")


def small(name: str, seed: int = 0, classes: int = 5) -> nn.Module:
    torch.manual_seed(seed)
    return build_model(name, classes=classes, **SMALL)


def common(model: nn.Module) -> dict[str, Tensor]:
    """The weights of the formula under common names, in the model's shapes."""
    shapes = {OWN.common(name): tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    return {
        name: torch.from_numpy(foreign.value(name, shape)).float()
        for name, shape in shapes.items()
        if not name.endswith("num_batches_tracked")
    }


def assert_taken(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    for name, tensor in model.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(tensor, tensors[OWN.common(name)]), name


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("wrapper", ["", "module.", "model."])
def test_pyslowfast_files_are_taken_whole(name: str, wrapper: str, tmp_path: Path) -> None:
    model = small(name)
    tensors = common(model)
    state = collections.OrderedDict((wrapper + foreign.pyslowfast(k), v) for k, v in tensors.items())
    file = tmp_path / "checkpoint_epoch_00196.pyth"
    torch.save({"epoch": 195, "model_state": state, "optimizer_state": {"state": {}}, "cfg": "TRAIN: {}"}, file)
    report = load_weights(model, read_weights(file))
    assert (report.project, report.missing, report.unused) == ("PySlowFast", {}, [])
    assert_taken(model, tensors)


def test_files_of_old_torch_and_of_sub_bn_are_taken(tmp_path: Path) -> None:
    model = small("i3d_r50")
    tensors = common(model)
    state = {foreign.pyslowfast(k): v for k, v in tensors.items()}
    split = {k.replace("bn.running", "bn.split_bn.running"): v.repeat(8) for k, v in state.items() if "running" in k}
    state = {k.replace("bn.running", "bn.bn.running"): v for k, v in state.items()} | split
    torch.save({"model_state": state}, tmp_path / "old.pyth", _use_new_zipfile_serialization=False)
    assert load_weights(model, read_weights(tmp_path / "old.pyth")).unused == []
    assert_taken(model, tensors)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_caffe2_files_are_taken_whole(name: str, protocol: int, tmp_path: Path) -> None:
    model = small(name)
    tensors = common(model)
    blobs: dict[str, Any] = {foreign.caffe2(k, BLOCKS): v.numpy() for k, v in tensors.items()}
    blobs |= {f"{k}_momentum": v for k, v in blobs.items()} | {"lr": np.float32(0.1), "model_iter": np.array([3])}
    blobs["pred_w"] = np.asfortranarray(blobs["pred_w"])[:, :, None, None, None]
    blobs["conv1_w"] = blobs["conv1_w"].astype(">f4")
    (tmp_path / "model.pkl").write_bytes(pickle.dumps({"blobs": blobs, "cfg": "x"}, protocol))
    report = load_weights(model, read_weights(tmp_path / "model.pkl"))
    assert (report.project, report.missing, report.unused) == ("Caffe2", {}, [])
    assert_taken(model, tensors)


def test_caffe2_names_are_the_model_zoos() -> None:
    names = {foreign.caffe2(OWN.common(n), BLOCKS) for n in (*small("slowfast_r50").state_dict(),) if "num_b" not in n}
    assert names > {
        "conv1_w", "res_conv1_bn_s", "t_conv1_w", "t_res_conv1_bn_riv", "res2_0_branch1_w", "res2_0_branch1_bn_s",
        "res3_1_branch2a_bn_rm", "t_res5_0_branch2c_w", "t_pool1_subsample_w", "t_pool1_subsample_bn_b",
        "t_res2_0_branch2c_bn_subsample_w", "t_res4_1_branch2c_bn_subsample_bn_s", "pred_w", "pred_b",
    }  # fmt: skip
    assert foreign.caffe2("slow.res3.nonlocal1.query.weight", BLOCKS) == "nonlocal_conv3_1_theta_w"
    assert foreign.caffe2("slow.res4.nonlocal5.norm.running_var", BLOCKS) == "nonlocal_conv4_5_bn_riv"


@pytest.mark.parametrize("name", NAMES[:2])
def test_pytorchvideo_files_are_taken_whole(name: str, tmp_path: Path) -> None:
    model = small(name)
    tensors = common(model)
    state = {foreign.pytorchvideo(k, 2 if name == NAMES[0] else 1): v for k, v in tensors.items()}
    torch.save({"model_state": state}, tmp_path / "hub.pyth")
    report = load_weights(model, read_weights(tmp_path / "hub.pyth"))
    assert (report.project, report.missing, report.unused) == ("PyTorchVideo", {}, [])
    assert_taken(model, tensors)


def test_mmaction2_puts_the_fast_features_first_and_lacks_some_tensors(tmp_path: Path) -> None:
    model = small("slowfast_r50")
    tensors = common(model)
    state = {foreign.mmaction2(k, 2): v for k, v in tensors.items() if not ("laterals" in k and "norm" in k)}
    weight = tensors["head.linear.weight"]  # (classes, 32 * 8 + 32)
    state["cls_head.fc_cls.weight"] = torch.cat([weight[:, 256:], weight[:, :256]], dim=1)
    torch.save({"meta": {"mmengine_version": "0.10"}, "state_dict": state}, tmp_path / "model.pth")
    report = load_weights(model, read_weights(tmp_path / "model.pth"))
    assert torch.equal(model.state_dict()["head.linear.weight"], weight)
    assert set(report.missing) == {
        f"laterals.{i}.norm.{last}" for i in range(4) for last in ("weight", "bias", "running_mean", "running_var")
    }
    assert any("no ReLU" in note for note in report.notes)


def test_mmaction2s_non_local_blocks_have_no_last_bias(tmp_path: Path) -> None:
    model = small("i3d_nln_r50")
    tensors = common(model)
    state = {foreign.mmaction2(k, 1): v for k, v in tensors.items() if not k.endswith(".out.bias")}
    torch.save({"state_dict": state}, tmp_path / "model.pth")
    assert load_weights(model, read_weights(tmp_path / "model.pth")).share == 1
    assert not model.state_dict()["res3.nonlocal1.out.bias"].any()


@pytest.mark.parametrize("name", NAMES)
def test_our_own_checkpoints_and_imports_are_taken_whole(
    name: str, tmp_path: Path, tiny: Callable[..., Recipe]
) -> None:
    model, other = small(name), small(name, seed=1)
    optimizer = make_optimizer(model, tiny().optim)
    model(torch.randn(2, 3, 2, 16, 16)).sum().backward()
    optimizer.step()
    save_checkpoint(tmp_path / "a.safetensors", model, optimizer, CheckpointInfo(3, "", [], "", ""))
    weights = read_weights(tmp_path / "a.safetensors")
    report = load_weights(other, weights)
    assert (report.project, report.missing, report.unused) == ("mgtrain", {}, [])
    assert_taken(other, common_of(model))
    save_weights(tmp_path / "b.safetensors", other, {"name": name}, (), report.matched)
    assert load_weights(small(name, seed=2), read_weights(tmp_path / "b.safetensors")).share == 1


def common_of(model: nn.Module) -> dict[str, Tensor]:
    return {OWN.common(name): tensor for name, tensor in model.state_dict().items()}


@pytest.fixture(scope="module")
def in1k(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of torchvision's 2-D ResNet."""
    file = tmp_path_factory.mktemp("weights") / "in1k.pth"
    torch.save(torchvision.models.resnet50().state_dict(), file)
    return file


def test_a_2d_resnet_fills_all_of_i3d(in1k: Path) -> None:
    weights = read_weights(in1k)
    options = model_options(weights, "i3d_r50")
    assert options == {"name": "i3d_r50", "width": 64, "depth": 50, "classes": 1000}
    with torch.device("meta"):
        model = build_model(**options)
    report = load_weights(model, weights)
    assert (len(report.matched), report.missing, report.unused) == (267, {}, [])
    assert report.lines()[0] == "torchvision: matched 267 of 267 tensors, 53 of them inflated from 2-D kernels"
    with pytest.raises(CheckpointError, match="fit several models; choose one of slowfast_r50"):
        model_options(weights)


def test_a_2d_resnet_fills_slowfasts_slow_pathway(in1k: Path) -> None:
    with torch.device("meta"):
        model = build_model("slowfast_r50", classes=5)
    model.to_empty(device="cpu")
    report = load_weights(model, read_weights(in1k))
    assert len(report.matched) == 265
    assert {name.split(".")[0] for name in report.missing} == {"fast", "laterals", "head"}
    assert "(1000, 2048) in the file and (5, 2304) here, so it starts from random weights" in report.resized
    kernel = model.state_dict()["slow.1.0.conv1.weight"]  # (64, 64 + 16, 1, 1, 1)
    assert not kernel[:, 64:].any()
    assert kernel[:, :64].abs().min() > 0
    with pytest.raises(ThresholdError, match=r"matched 265 of 552 tensors, a share of 0\.481, below the required 1"):
        report.demand(1.0, in1k)
    report.demand(0.48, in1k)


def test_an_inflated_kernel_computes_of_a_still_clip_what_the_flat_one_computes_of_its_frame() -> None:
    kernel, frame = torch.randn(4, 3, 3, 3), torch.randn(2, 3, 9, 9)
    clip = frame.unsqueeze(2).repeat(1, 1, 5, 1, 1)
    still = nn.functional.conv3d(clip, inflate(kernel, 3, 5))[:, :, 0]
    torch.testing.assert_close(still, nn.functional.conv2d(frame, kernel))


def test_a_kernel_of_one_frame_computes_the_same_in_the_middle_of_a_longer_one() -> None:
    kernel, clip = torch.randn(4, 3, 1, 1, 1), torch.randn(2, 3, 5, 2, 2)
    longer = fit_shape(kernel, (4, 3, 3, 1, 1))
    assert longer is not None
    same = nn.functional.conv3d(clip, longer, padding=(1, 0, 0))
    torch.testing.assert_close(same, nn.functional.conv3d(clip, kernel))


def test_what_does_not_fit_is_named_and_left_as_it_was() -> None:
    model, tensors = small("i3d_r50"), common(small("i3d_r50"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    del tensors["slow.stem.norm.weight"]
    tensors["slow.res2.0.conv2.weight"] = torch.ones(9, 8, 1, 3, 3)
    tensors["slow.res9.0.conv2.weight"] = torch.ones(1)
    report = load_weights(model, read(tensors))
    assert report.missing == {
        "stem.norm.weight": "absent", "res2.0.conv2.weight": "(9, 8, 1, 3, 3) in the file, (8, 8, 1, 3, 3) here",
    }  # fmt: skip
    assert report.unused == ["slow.res9.0.conv2.weight"]
    for name in report.missing:
        assert torch.equal(model.state_dict()[name], before[name])
    with pytest.raises(ThresholdError, match="for example res2"):
        report.demand(1.0, Path("x.pyth"))


def read(tensors: dict[str, Tensor]) -> Any:
    return Weights("PySlowFast", tensors, ())


def test_the_classifier_of_other_classes_starts_afresh_with_a_message() -> None:
    model, tensors = small("i3d_r50", classes=7), common(small("i3d_r50", classes=5))
    before = model.state_dict()["head.linear.weight"].clone()
    report = load_weights(model, read(tensors))
    assert torch.equal(model.state_dict()["head.linear.weight"], before)
    assert "(5, 256) in the file and (7, 256) here, so it starts from random weights" in "\n".join(report.lines())
    report.demand(1.0, Path("x.pyth"))


@pytest.mark.parametrize("name", NAMES)
def test_the_model_is_known_from_its_tensors(name: str) -> None:
    options = model_options(read(common(small(name))))
    extra = {"beta_inv": 8, "fusion_kernel": 7} if name == "slowfast_r50" else {}
    assert options == {"name": name, "width": 8, "depth": BLOCKS, "classes": 5, **extra}


def test_the_published_slowfast_4x16_is_known_from_its_kernel() -> None:
    model = build_model("slowfast_r50", classes=5, fusion_kernel=5, **SMALL)
    assert model_options(read(common(model)))["alpha"] == 8, "the recipes of 4x16 have it, and no weight its size"


class Runs:
    """What a hostile pickle holds: something to call when it is read."""

    def __init__(self, call: Callable[..., Any], *words: Any) -> None:
        self.call = (call, words)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("layout", ["zip", "legacy", "caffe2", "caffe2 0", "caffe2 dtype", "bare"])
def test_a_hostile_file_runs_nothing(layout: str, tmp_path: Path) -> None:
    canary, file = tmp_path / "canary", tmp_path / "model.pth"
    for evil in (Runs(os.mkdir, str(canary)), Runs(eval, f"open({str(canary)!r}, 'w')"), Runs(getattr, "x", "upper")):
        content: Any = {"blobs": {"conv1_w": evil}, "state_dict": {"conv1.weight": torch.zeros(1), "x": evil}}
        if layout == "bare":
            file.write_bytes(pickle.dumps(evil))
        elif layout == "caffe2 dtype":
            file.write_bytes(pickle.dumps({"blobs": {"conv1_w": np.array([evil], dtype=object)}}, 2))
        elif layout.startswith("caffe2"):
            del content["state_dict"]
            file.write_bytes(pickle.dumps(content, 0 if "0" in layout else 2))
        else:
            torch.save(content, file, _use_new_zipfile_serialization=layout == "zip")
        with pytest.raises(CheckpointError, match="cannot be read as weights") as caught:
            read_weights(file)
        assert len(str(caught.value).splitlines()) == 1
        assert not canary.exists()


def test_arrays_that_are_not_what_they_say_are_refused(tmp_path: Path) -> None:
    good = pickle.dumps({"blobs": {"conv1_w": np.arange(6, dtype=np.float32).reshape(2, 3)}}, 2)
    (tmp_path / "good.pkl").write_bytes(good)
    assert read_tensors(tmp_path / "good.pkl")["conv1_w"].tolist() == [[0, 1, 2], [3, 4, 5]]
    for old, new in [(b"K\x02K\x03\x86", b"K\x02K\x04\x86"), (b"f4", b"O8"), (b"f4", b"V4")]:
        assert old in good
        (tmp_path / "bad.pkl").write_bytes(good.replace(old, new))
        with pytest.raises(CheckpointError):
            read_tensors(tmp_path / "bad.pkl")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused_and_named(tmp_path: Path, value: float) -> None:
    model = small("i3d_r50")
    model.stem.norm.running_mean[2] = value  # type: ignore[union-attr,index]
    save_weights(tmp_path / "w.safetensors", model, {})
    with pytest.raises(CheckpointError, match=r"stem\.norm\.running_mean has NaN or infinity in 1 of its 8"):
        read_weights(tmp_path / "w.safetensors")


def test_damaged_files_are_one_line(tmp_path: Path) -> None:
    whole = io.BytesIO()
    torch.save({"model_state": {"conv1.weight": torch.zeros(3)}}, whole)
    model = small("i3d_r50")
    save_weights(tmp_path / "own.safetensors", model, {})
    own = (tmp_path / "own.safetensors").read_bytes()
    generator = np.random.default_rng(0)
    contents = [b"", b"x", b"\x80", own[:100], own[: len(own) // 2], b"PK\x03\x04", generator.bytes(300)]
    contents += [whole.getvalue()[:cut] for cut in (20, 200, 600)] + [pickle.dumps([1, 2]), pickle.dumps({"a": 1})]
    for content in contents:
        (tmp_path / "bad").write_bytes(content)
        with pytest.raises(CheckpointError) as caught:
            read_weights(tmp_path / "bad")
        assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(CheckpointError, match="No such file"):
        read_weights(tmp_path / "absent")
    torch.save({"encoder.weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=r"'encoder\.weight', which no known network has"):
        read_weights(tmp_path / "other.pth")


def test_only_known_networks_are_downloaded() -> None:
    with pytest.raises(
        UsageError, match="must be one of torchvision:resnet50, torchvision:resnet101, torchvision:r3d_18,"
    ):
        download("torchvision:vit")


@pytest.mark.parametrize("name", NAMES)
def test_freezing_goes_up_to_a_stage_and_takes_its_statistics_along(name: str) -> None:
    model = small(name)
    freeze(model, Init(freeze="res3"))
    for parameter, tensor in model.named_parameters():
        assert tensor.requires_grad == (OWN.common(parameter).split(".")[1] in ("res4", "res5", "linear")), parameter
    before = {key: value.clone() for key, value in model.state_dict().items()}
    reset_group_stats(model)
    model.train()(torch.randn(2, 3, 4, 32, 32))
    for key, value in model.state_dict().items():
        frozen = OWN.common(key).split(".")[1] in ("stem", "res2", "res3")
        assert frozen == torch.equal(value, before[key]) or "running" not in key, key


def test_a_frozen_backbone_leaves_the_classifier_and_frozen_statistics_leave_all_weights() -> None:
    model = small("slowfast_r50")
    freeze(model, Init(freeze="backbone"))
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [
        "head.linear.weight",
        "head.linear.bias",
    ]
    model = small("slowfast_r50")
    freeze(model, Init(freeze_bn=True))
    assert all(p.requires_grad for p in model.parameters())
    x = torch.randn(2, 3, 4, 32, 32)
    model.head.dropout.p = 0.0
    torch.testing.assert_close(model.train()(x), model.eval()(x))
    assert all(m.frozen and not m.training for m in model.train().modules() if isinstance(m, GroupBatchNorm3d))


def test_the_classifier_may_learn_faster(tiny: Callable[..., Recipe]) -> None:
    recipe = tiny("optim.head_lr=5")
    groups = make_optimizer(make_model(recipe), recipe.optim).param_groups
    assert [group["lr_factor"] for group in groups] == [1, 1, 5]


def test_weights_are_loaded_on_a_fresh_start_only(tmp_path: Path) -> None:
    source, model = small("i3d_r50"), small("i3d_r50", seed=1)
    tensors = common(source)
    torch.save({"model_state": {foreign.pyslowfast(k): v for k, v in tensors.items()}}, tmp_path / "w.pyth")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    start_from(model, Init(weights=str(tmp_path / "w.pyth"), freeze="stem"), fresh=False)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not model.stem.conv.weight.requires_grad
    start_from(model, Init(weights=str(tmp_path / "w.pyth")), fresh=True)
    assert_taken(model, tensors)


def test_a_run_starts_from_imported_weights(
    tmp_path: Path, tiny: Callable[..., Recipe], capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    model = build_model("i3d_r50", classes=9, width=8, depth=[1, 1, 1, 1])
    state = {foreign.pyslowfast(k): v for k, v in common(model).items()}
    torch.save({"model_state": state, "cfg": ""}, tmp_path / "k400.pyth")
    import_weights(tmp_path / "k400.pyth", to=tmp_path / "k400.safetensors", json_=True)
    report = json.loads(capsys.readouterr().out)
    assert (report["schema"], report["share"], len(report["matched"])) == ("mgtrain.weights_import/1", 1, 87)
    assert report["model"] == {"name": "i3d_r50", "width": 8, "depth": [1, 1, 1, 1]}
    short = ("optim.stages=[1]", "optim.warmup_epochs=0")
    changes = (f"init.weights={tmp_path / 'k400.safetensors'}", "init.freeze=backbone", *short)
    caplog.set_level("INFO", logger="mgtrain")
    run = RunDir(tmp_path / "run")
    fit(tiny(*changes, "schedule.name=baseline"), run, World())
    assert "k400.safetensors: mgtrain: matched 85 of 87 tensors" in caplog.text
    assert "(9, 256) in the file and (4, 256) here, so it starts from random weights" in caplog.text
    kept = read_weights(run.checkpoints()[-1]).tensors
    for name, tensor in common(model).items():
        if name.startswith("head."):
            assert kept[name].shape != tensor.shape
        else:
            assert torch.equal(kept[name], tensor), name


def test_too_few_matches_have_an_exit_code_of_their_own_and_write_nothing(tmp_path: Path) -> None:
    tensors = {foreign.pyslowfast(k): v for k, v in common(small("i3d_r50")).items() if "res3.1" not in k}
    torch.save(tensors, tmp_path / "part.pyth")
    with pytest.raises(ThresholdError, match="use the model that the weights belong to, or lower --at-least") as caught:
        import_weights(tmp_path / "part.pyth", model="i3d_nln_r50", to=tmp_path / "x.safetensors")
    assert caught.value.exit_code == 6
    assert not (tmp_path / "x.safetensors").exists()
    with pytest.raises(UsageError, match="give either a FILE or --from"):
        import_weights(None)


def test_a_recipe_says_what_it_starts_from(tiny_text: str) -> None:
    recipe = parse_recipe(tiny_text + "init: {weights: k400.safetensors, at_least: 0.9, freeze_bn: true}\n", "my.yaml")
    assert recipe.init == Init(weights="k400.safetensors", at_least=0.9, freeze="none", freeze_bn=True)
    assert parse_recipe(recipe.to_yaml(), "again.yaml") == recipe
