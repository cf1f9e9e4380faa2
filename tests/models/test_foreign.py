"""Networks that are not ours: torchvision's and one's own keep the laws, or are refused with the layer's name."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import get_model_weights, video
from torchvision.models.video import mvit
from torchvision.models.video.swin_transformer import ShiftedWindowAttention3d
from torchvision.ops import StochasticDepth
from warm import Start

from mgtrain.clips.augment import normalize
from mgtrain.engine.checks import check_shapes, make_model, misfit
from mgtrain.engine.step import to_input
from mgtrain.engine.update.optim import make_optimizer
from mgtrain.errors import PlanError, UsageError
from mgtrain.models import TORCHVISION, build_model
from mgtrain.models.dropout import DropFeatures, Dropout, DropPath
from mgtrain.models.foreign import WindowAttention, classifier_of, group_batchnorm
from mgtrain.models.norm import GroupBatchNorm3d
from mgtrain.models.part import Part, set_part
from mgtrain.models.weights.load import freeze, load_weights, read_weights, save_weights
from mgtrain.recipe import Init, Recipe

torch.set_num_threads(1)
OWN = """
from torch import nn, ones


class Flattens(nn.Module):
    def __init__(self, classes, size=16):
        super().__init__()
        self.conv = nn.Conv3d(3, 4, 3, padding=1)
        self.fc = nn.Linear(4 * 2 * size * size, classes)

    def forward(self, x):
        return self.fc(self.conv(x).flatten(1))


class Positions(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.embed = nn.Conv3d(3, 8, (2, 8, 8), (2, 8, 8))
        self.table = nn.Parameter(nn.init.zeros_(__import__("torch").empty(1, 16, 8)))
        self.head = nn.Linear(8, classes)

    def forward(self, x):
        x = self.embed(x).flatten(2).transpose(1, 2) + self.table
        return self.head(x.mean(1))


class Windows(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.conv, self.head = nn.Conv3d(3, 8, 1), nn.Linear(8, classes)

    def forward(self, x):
        b, _, t, s, _ = x.shape
        x = self.conv(x).reshape(b, 8, t, s // 8, 8, s // 8, 8).mean((2, 3, 4, 5, 6))
        return self.head(x)


class PerFrame(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.head = nn.Conv3d(3, classes, 1)

    def forward(self, x):
        return self.head(x).mean((3, 4))


class Recurrent(nn.Module):
    def __init__(self, classes, width=8):
        super().__init__()
        self.conv, self.norm = nn.Conv3d(3, width, 3, 2, 1), nn.BatchNorm3d(width)
        self.gru, self.drop = nn.GRU(width, width, batch_first=True), nn.Dropout(0.5)
        self.head = nn.Linear(width, classes)
        self.unused = nn.Parameter(ones(2))

    def forward(self, x):
        x = self.norm(self.conv(x)).relu().mean((3, 4)).transpose(1, 2)
        return self.head(self.drop(self.gru(x)[0][:, -1]))


class Wrapped(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.model = Recurrent(classes)

    def forward(self, x):
        return self.model(x)


class Frames2d(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.norm, self.head = nn.BatchNorm2d(3), nn.Linear(3, classes)


MODELS = {
    "flattens": Flattens, "positions": Positions, "windows": Windows, "per_frame": PerFrame, "recurrent": Recurrent,
    "wrapped": Wrapped, "fails": lambda classes: {}["no key"], "frames2d": Frames2d, "number": lambda classes: 3,
}
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a module of networks, in which the test runs."""
    (tmp_path / "my_networks.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    sys.modules.pop("my_networks", None)


def section(network: str, options: str = "{}") -> str:
    return f"model={{name: own, module: my_networks, network: {network}, options: {options}}}"


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("r2plus1d_18", (2, 3, 4, 32, 32)),
        ("swin3d_t", (1, 3, 4, 224, 224)),
        *(pytest.param(name, (2, 3, 4, 32, 32), marks=pytest.mark.slow) for name in ("r3d_18", "mc3_18")),
        *(pytest.param(name, (1, 3, 16, 224, 224), marks=pytest.mark.slow) for name in ("s3d", "mvit_v2_s")),
    ],
)
@torch.no_grad()
def test_logits_are_torchvisions_own_on_the_same_weights(name: str, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    theirs = getattr(video, name)(num_classes=5).eval()
    ours = build_model(name, classes=5).eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(shape)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", TORCHVISION)
def test_every_network_of_torchvision_takes_all_shapes_of_a_plan_from_8_frames_on(name: str) -> None:
    with torch.device("meta"):
        model = build_model(name, classes=5)
    for frames, crop in ((8, 79), (8, 112), (8, 158), (16, 158), (32, 112), (32, 224), (32, 256)):
        assert misfit(model, frames, crop, 5) is None
    norms = [layer for layer in model.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
    assert all(isinstance(norm, GroupBatchNorm3d) for norm in norms)
    assert bool(norms) == (name not in ("swin3d_t", "mvit_v2_s"))
    assert not any(isinstance(layer, nn.Dropout) and layer.p for layer in model.modules())


def test_s3d_says_which_of_its_layers_needs_more_frames(tiny: Callable[..., Recipe]) -> None:
    with pytest.raises(PlanError) as caught:
        check_shapes(tiny("model={name: s3d}"), [tiny().base.__class__(8, 2, 112)])
    for words in (
        "s3d does not accept clips of 2 frames of 112² pixels: layer features.",
        "MaxPool3d, has a kernel larger than its input",
        "8x112²",
    ):
        assert words in str(caught.value)


def test_normalization_keeps_its_own_constants_and_state() -> None:
    torch.manual_seed(0)
    layer = nn.BatchNorm3d(3, eps=1e-3, momentum=0.01)
    nn.init.normal_(layer.weight)
    layer.running_mean.normal_()
    (ours,) = group_batchnorm(nn.Sequential(layer))
    assert isinstance(ours, GroupBatchNorm3d)
    assert (ours.eps, ours.momentum) == (1e-3, 0.01)
    assert [group_batchnorm(nn.Sequential(nn.BatchNorm3d(3, momentum=m)))[0].momentum for m in (0.0, None)] == [0, 0.1]
    x = torch.randn(2, 3, 2, 4, 4)
    for mode in (True, False):
        torch.testing.assert_close(ours.train(mode)(x), layer.train(mode)(x))
    assert {k: v.tolist() for k, v in ours.state_dict().items()} == {
        k: v.tolist() for k, v in layer.state_dict().items()
    }


def test_a_layer_in_two_places_stays_one_layer() -> None:
    norm, mask = nn.BatchNorm3d(3), nn.Dropout(0.5)
    model = group_batchnorm(nn.Sequential(norm, mask, nn.Sequential(norm, mask)))
    assert isinstance(model[0], GroupBatchNorm3d)
    assert isinstance(model[1], Dropout)
    assert (model[2][0], model[2][1]) == (model[0], model[1])


def test_frozen_layers_stay_frozen_and_parameters_the_same() -> None:
    layer = nn.BatchNorm3d(3).requires_grad_(False).eval()
    (ours,) = group_batchnorm(nn.Sequential(layer))
    assert ours.weight is layer.weight
    assert ours.bias is layer.bias
    assert not ours.weight.requires_grad
    assert not ours.training


def test_dropout_takes_several_rows_of_each_clip() -> None:
    (layer,) = group_batchnorm(nn.Sequential(nn.Dropout(0.5)))
    x = torch.ones(24, 50)  # 8 clips of 3 frames
    whole = Part(0, 8, 8, 2, seed=3)
    set_part(layer, whole)
    both = layer(x)
    assert both.eq(0).double().mean().item() == pytest.approx(0.5, abs=0.05)
    for first in (0, 4):
        set_part(layer, replace(whole, first=first, clips=4))
        assert torch.equal(layer(x[3 * first : 3 * first + 12]), both[3 * first : 3 * first + 12])
    with pytest.raises(UsageError, match="dropout: 4 clips do not divide 7 rows"):
        layer(x[:7])


@pytest.mark.parametrize(
    "layer", [nn.BatchNorm2d(3), nn.BatchNorm1d(3), nn.SyncBatchNorm(3), nn.BatchNorm3d(3, affine=False)]
)
def test_normalization_over_a_ranks_clips_is_refused(layer: nn.Module) -> None:
    with pytest.raises(UsageError, match=f"a.0: {type(layer).__name__} normalizes over the clips of a rank"):
        group_batchnorm(nn.Sequential(nn.Identity(), nn.ModuleDict({"a": nn.Sequential(layer)}))[1])


def test_what_is_random_is_drawn_for_the_global_batch() -> None:
    model = group_batchnorm(
        nn.Sequential(nn.Dropout(0.5), nn.Dropout3d(0.5), StochasticDepth(0.5, "row"), nn.Dropout(0.0))
    )
    assert [type(layer) for layer in model] == [Dropout, DropFeatures, DropPath, nn.Dropout]
    whole, x = Part(0, 8, 8, 2, seed=3), torch.ones(8, 6, 2, 3, 3)
    set_part(model, whole)
    outputs = [layer(x) for layer in model]
    for rank in (0, 1):
        set_part(model, Part(4 * rank, 4, 8, 2, ranks=2, seed=3))
        for layer, output in zip(model, outputs, strict=True):
            assert torch.equal(layer(x[:4]), output[4 * rank : 4 * rank + 4])
    assert outputs[1].flatten(2).var(2).max() == 0  # whole channels
    assert outputs[2].flatten(1).var(1).max() == 0  # whole clips
    assert outputs[0].flatten(2).var(2).max() > 0
    assert {0.0, 2.0} == set(outputs[2].unique().tolist())
    assert not torch.equal(outputs[0][:, 0, 0, 0, 0], outputs[1][:, 0, 0, 0, 0])  # layers draw apart
    for layer in (StochasticDepth(0.5, "batch"),):
        with pytest.raises(UsageError, match="depends on the number of ranks; use mode 'row'"):
            group_batchnorm(nn.Sequential(layer))


@pytest.mark.parametrize(("name", "usual"), [("swin3d_t", 0.1), ("mvit_v2_s", 0.2)])
def test_paths_are_dropped_more_often_from_block_to_block(name: str, usual: float) -> None:
    def dropped(probability: float | None) -> list[float]:
        with torch.device("meta"):
            model = build_model(name, classes=5, drop_path=probability)
        assert not any(isinstance(layer, StochasticDepth) and layer.p for layer in model.modules())
        return [layer.p for layer in model.modules() if isinstance(layer, DropPath)]

    blocks = 11 if name == "swin3d_t" else 15  # after the first, whose paths are never dropped
    for probability in (0.3, usual):
        assert dropped(probability) == pytest.approx([probability * n / blocks for n in range(1, blocks + 1)])
    assert dropped(None) == pytest.approx(dropped(usual))
    assert dropped(0.0) == []


def test_swins_relative_positions_are_those_of_its_full_windows_at_every_size() -> None:
    torch.manual_seed(0)
    layer = WindowAttention(6, [8, 7, 7], [0, 0, 0], num_heads=2)
    nn.init.normal_(layer.relative_position_bias_table)
    full = layer.get_relative_position_bias([8, 7, 7])
    assert torch.equal(full, ShiftedWindowAttention3d.get_relative_position_bias(layer, [8, 7, 7]))
    full = full.view(2, 8, 7, 7, 8, 7, 7)
    for d, h, w in ((4, 7, 7), (8, 4, 4), (2, 5, 5), (1, 1, 1)):
        bias = layer.get_relative_position_bias([d, h, w])
        assert torch.equal(bias.view(2, d, h, w, d, h, w), full[:, :d, :h, :w, :d, :h, :w])
    theirs = ShiftedWindowAttention3d.get_relative_position_bias(layer, [8, 4, 4])
    assert not torch.equal(layer.get_relative_position_bias([8, 4, 4]), theirs)  # those of other pairs
    with torch.device("meta"):
        swin = build_model("swin3d_t", classes=5)
    assert sum(isinstance(module, WindowAttention) for module in swin.modules()) == 12


@pytest.mark.parametrize(("frames", "crop"), [(16, 224), (8, 112), (4, 158)])
def test_mvits_relative_positions_are_stretched_to_the_clip(
    frames: int, crop: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    add, seen = mvit._add_rel_pos, []

    def spied(attn: Tensor, q: Tensor, q_thw: tuple[int, ...], k_thw: tuple[int, ...], *tables: Tensor) -> Tensor:
        seen.append((q_thw, k_thw))
        made: Tensor = add(attn, q, q_thw, k_thw, *tables)
        return made

    monkeypatch.setattr(mvit, "_add_rel_pos", spied)
    with torch.device("meta"):
        model = copy.deepcopy(build_model("mvit_v2_s", classes=5))  # a copy has its own sizes
        model(torch.empty(1, 3, frames, crop, crop))
    first, last = seen[0][0], seen[-1][0]
    assert first == (frames // 2, -(-crop // 4), -(-crop // 4))
    assert last == (frames // 2, -(-crop // 32), -(-crop // 32))


@pytest.mark.parametrize("size", [7, 5, 4])
def test_an_offset_in_a_small_clip_has_the_relative_position_of_the_same_share_of_a_full_one(size: int) -> None:
    full = 7  # tokens a side of a clip of 224 pixels in the last blocks
    ramp, zeros = torch.arange(1.0 - full, full)[:, None], torch.zeros(2 * full - 1, 1)  # a table of its own offsets
    q = torch.ones(1, 1, size + 1, 1)  # the first is the class token
    bias = mvit._add_rel_pos(torch.zeros(1, 1, size + 1, size + 1), q, (1, 1, size), (1, 1, size), zeros, ramp, zeros)
    offsets = (torch.arange(size)[:, None] - torch.arange(size)[None]).float()
    expected = offsets * (2 * full - 1) / (2 * size - 1)
    torch.testing.assert_close(bias[0, 0, 1:, 1:], expected.clamp(1 - full, full - 1))
    assert not bias[0, 0, 0].any()


@pytest.mark.parametrize("name", ["r3d_18", "swin3d_t"])
@torch.no_grad()
def test_whole_and_micro_batches_give_the_same_logits(name: str) -> None:
    torch.manual_seed(0)
    model, x = build_model(name, classes=5).double().train(), torch.randn(8, 3, 4, 32, 32, dtype=torch.float64)
    set_part(model, Part(0, 8, 8, bn_groups=2, seed=3))
    whole = model(x)
    for first in (0, 4):
        set_part(model, Part(first, 4, 8, bn_groups=2, seed=3))
        torch.testing.assert_close(model(x[first : first + 4]), whole[first : first + 4])
    set_part(model, Part(0, 8, 8, bn_groups=1, seed=4))
    assert not torch.allclose(model(x), whole)


@pytest.mark.parametrize("name", TORCHVISION)
def test_inputs_are_normalized_as_for_torchvisions_weights(name: str, tiny: Callable[..., Recipe]) -> None:
    clips = torch.randint(0, 256, (2, 3, 2, 4, 4), dtype=torch.uint8)
    transform = get_model_weights(name).DEFAULT.transforms()
    mean, std = torch.tensor(transform.mean), torch.tensor(transform.std)
    ours = to_input(clips, tiny(f"model={{name: {name}}}"))
    expected = (clips.movedim(1, -1) / 255 - mean) / std
    torch.testing.assert_close(ours.movedim(1, -1), expected, rtol=1e-5, atol=1e-5)


def test_inputs_are_normalized_as_the_network_wants_them(tiny: Callable[..., Recipe]) -> None:
    clips = torch.randint(0, 256, (2, 3, 2, 4, 4), dtype=torch.uint8)
    assert torch.equal(to_input(clips, tiny()), normalize(clips, torch.channels_last_3d))
    own = to_input(clips, tiny("model={name: own, module: x, network: y, mean: [0.5, 0.45, 0], std: [1, 0.225, 0.5]}"))
    torch.testing.assert_close(own[:, 0], clips[:, 0] / 255 - 0.5, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(own[:, 2], clips[:, 2] / 255 / 0.5, rtol=1e-5, atol=1e-5)


def test_weights_of_torchvision_are_taken_by_their_names_and_another_classifier_starts_afresh(tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = video.r3d_18(num_classes=7)
    torch.save(theirs.state_dict(), tmp_path / "r3d.pth")
    same, other = build_model("r3d_18", classes=7), build_model("r3d_18", classes=5)
    weights = read_weights(tmp_path / "r3d.pth", common=False)
    report = load_weights(same, weights)
    assert (report.share, report.resized, report.unused) == (1, "", [])
    assert torch.equal(same.fc.weight, theirs.fc.weight)
    report = load_weights(other, weights)
    assert (report.share, set(report.missing)) == (1, {"fc.weight", "fc.bias"})
    assert "(7, 512) in the file and (5, 512) here" in report.resized
    freeze(other, Init(freeze="backbone"))
    assert [name for name, p in other.named_parameters() if p.requires_grad] == ["fc.weight", "fc.bias"]
    assert all(m.frozen for m in other.modules() if isinstance(m, GroupBatchNorm3d))
    with pytest.raises(UsageError, match=r"res2: only SlowFast and I3D have such stages; use none or backbone"):
        freeze(other, Init(freeze="res2"))


@pytest.mark.parametrize("network", ["recurrent", "wrapped"])
def test_weights_of_a_network_of_ones_own_come_back(own: Path, tiny: Callable[..., Recipe], network: str) -> None:
    one, same, other = (make_model(tiny(section(network), f"data.classes={n}")) for n in (4, 4, 3))
    save_weights(own / "w.safetensors", one, {})
    weights = read_weights(own / "w.safetensors", common=False)
    assert load_weights(same, weights).share == 1
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), same.state_dict().values(), strict=True))
    report = load_weights(other, weights)
    assert (report.share, len(report.missing)) == (1, 2)
    assert "(4, 8) in the file and (3, 8) here" in report.resized


def test_the_classifier_has_its_own_learning_rate_wherever_it_is(tiny: Callable[..., Recipe]) -> None:
    for name, layer in (("s3d", "classifier.1"), ("mvit_v2_s", "head.1"), ("i3d_r50", "head.linear")):
        with torch.device("meta"):
            model = build_model(name, classes=5)
        assert classifier_of(model) == layer
    model = build_model("swin3d_t", classes=5)
    _, undecayed, head = make_optimizer(model, tiny("optim.head_lr=10").optim).param_groups
    assert [p.shape[0] for p in head["params"]] == [5, 5]
    assert (head["lr_factor"], undecayed["weight_decay"]) == (10, 0)
    assert len(undecayed["params"]) == sum(2 for m in model.modules() if isinstance(m, nn.LayerNorm))


@pytest.mark.parametrize(
    ("network", "words"),
    [
        ("flattens", ("layer fc, Linear, expects 2048 features, but flattened features depend", "clips of 2x16² fit")),
        (
            "positions",
            ("the network itself, Positions, adds or joins a tensor of fixed size", "fit: choose clip", "8x16²"),
        ),
        ("windows", ("the network itself, Windows, splits its features into parts of a fixed size", "2x16²", "2x32²")),
        ("per_frame", ("for 2 such clips it returns (2, 4, ", "not logits (2, 4); found no other size that fits")),
    ],
)
def test_a_network_of_fixed_size_is_refused_with_the_layer_and_with_what_fits(
    own: Path, tiny: Callable[..., Recipe], network: str, words: tuple[str, ...]
) -> None:
    recipe = tiny(section(network))
    sizes = [(2, 16), (2, 23), (4, 23), (8, 32)]
    with pytest.raises(PlanError) as caught:
        check_shapes(recipe, [recipe.base.__class__(8, *size) for size in sizes])
    assert all(word in str(caught.value) for word in ("own does not accept clips of", *words)), str(caught.value)


def test_a_network_of_ones_own_is_trained_and_evaluated(own: Path, tiny_text: str, mgtrain: Start) -> None:
    (own / "own.yaml").write_text(tiny_text)
    words = ("--device", "cpu", "--procs", "2", section("recurrent", "{width: 16}"), "optim.stages=[2, 1]")
    result = mgtrain(own, "fit", "own.yaml", "--name", "run", *words)
    assert result.returncode == 0, result.stderr
    result = mgtrain(own, "eval", "runs/run", "--json", "--trust", "my_networks")
    assert json.loads(result.stdout)["videos"] == 12, result.stderr
    other = own / "elsewhere"
    other.mkdir()
    result = mgtrain(other, "eval", "../runs/run", "--trust", "my_networks")
    assert result.returncode == 2
    assert "model.module my_networks: no such Python module is installed or in" in result.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("network: recurent", "my_networks has no network 'recurent'; did you mean 'recurrent'?"),
        (
            "network: recurrent, options: {depth: 3}",
            "options: my_networks.MODELS['recurrent'](classes, **options): got an",
        ),
        ("network: number", "my_networks.MODELS['number'] returns int, which is not an nn.Module"),
        ("network: fails", "my_networks.MODELS['fails'](classes, **options) fails: KeyError: 'no key'"),
        ("network: frames2d", "norm: BatchNorm2d normalizes over the clips of a rank"),
    ],
)
def test_what_is_wrong_with_ones_own_network_is_said(
    own: Path, tiny: Callable[..., Recipe], words: str, message: str
) -> None:
    recipe = tiny(f"model={{name: own, module: my_networks, {words}}}")
    with pytest.raises(UsageError) as caught:
        check_shapes(recipe, [recipe.base])
    assert message in str(caught.value)


def test_a_module_that_cannot_be_imported_is_said_to_be(own: Path, tiny: Callable[..., Recipe]) -> None:
    (own / "broken_networks.py").write_text("import no_such_package_anywhere\n")
    (own / "empty_networks.py").write_text("")
    for module, message in (
        ("broken_networks", "needs no_such_package_anywhere, which is not installed"),
        ("empty_networks", "has no MODELS, a dict from names to functions"),
        ("no_networks", "no such Python module is installed or in"),
    ):
        recipe = tiny(f"model={{name: own, module: {module}, network: x}}")
        with pytest.raises(UsageError, match=message):
            check_shapes(recipe, [recipe.base])


def test_each_layer_draws_a_mask_of_its_own() -> None:
    from mgtrain.models.foreign import group_batchnorm
    from mgtrain.models.part import set_part

    model, x = group_batchnorm(nn.Sequential(nn.Dropout(0.5), nn.Dropout(0.5))), torch.ones(8, 100)
    set_part(model, Part(0, 8, 8, 8, seed=5))
    assert 0.4 < (model[0](x) == model[1](x)).double().mean() < 0.6
