"""The models: published figures, any shape, and what training relies on."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from mgtrain.engine.checks import check_shapes
from mgtrain.grid import Shape
from mgtrain.models import MODELS, TORCHVISION, build_model
from mgtrain.models.i3d import NonLocal3d, _tokens
from mgtrain.models.norm import GroupBatchNorm3d, merge_group_stats
from mgtrain.models.part import Part, set_part
from mgtrain.models.resnet3d import Bottleneck, max_pool, pool_pictures
from mgtrain.models.slowfast import Lateral, slow_frames, take_frames
from mgtrain.recipe import parse_recipe
from mgtrain.recipe.model import I3DNonLocalOptions, I3DOptions, ModelOptions, SlowFastOptions

torch.set_num_threads(1)
GOLDEN = json.loads((Path(__file__).parent.parent / "golden/flops.json").read_text())
NAMES = ("slowfast_r50", "i3d_r50", "i3d_nln_r50")
OPTIONS = {"slowfast_r50": SlowFastOptions, "i3d_r50": I3DOptions, "i3d_nln_r50": I3DNonLocalOptions}


def tiny(name: str, **options) -> nn.Module:
    """Five classes, few channels, and non-local blocks in res3 and res4."""
    torch.manual_seed(0)
    return build_model(name, classes=5, width=8, depth=[1, 2, 2, 1], **options)


def awake(model: nn.Module) -> nn.Module:
    """The model with no normalization that is zero, as it is after some training."""
    for module in model.modules():
        if isinstance(module, GroupBatchNorm3d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.2, 0.2)
    return model


def clips(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("name", "millions"),
    [("slowfast_r50", 34.57), ("i3d_r50", 28.04), ("i3d_nln_r50", 35.40)],  # the last one is ours, for want of another
)
def test_parameter_counts_are_the_published_ones(name: str, millions: float):
    with torch.device("meta"):
        model = build_model(name, classes=400)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == millions


@pytest.mark.parametrize("name", NAMES)
def test_flops_are_those_of_the_authors_models(name: str, tiny_text: str):
    recipe = parse_recipe(tiny_text, "tiny.yaml", [f"model={{name: {name}}}", "data.classes=400"])
    with torch.device("meta"):
        model = build_model(name, classes=400).eval()
    normalized: list[int] = []
    for module in model.modules():
        if isinstance(module, GroupBatchNorm3d):
            module.register_forward_hook(lambda module, inputs, output: normalized.append(output.numel()))
    for golden_name, frames, crop, flops in GOLDEN["per_clip"]:
        if golden_name == name:
            normalized.clear()
            model(torch.empty(1, 3, frames, crop, crop, device="meta"))
            (ours,) = check_shapes(recipe, [Shape(1, frames, crop)]).values()
            # fvcore counts 2 for each value that BatchNorm normalizes; we count convolutions and matrix products only.
            assert ours + 2 * sum(normalized) == flops, (frames, crop)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "shape", [(1, 8, 32), (2, 1, 32), (1, 2, 33), (3, 3, 47), (1, 5, 16), (2, 7, 31), (1, 11, 1), (1, 16, 64)]
)
def test_any_shape_gives_logits(name: str, shape: tuple[int, int, int]):
    size, frames, crop = shape
    logits = tiny(name).eval()(clips(size, 3, frames, crop, crop))
    assert logits.shape == (size, 5)
    assert logits.isfinite().all()
    assert tiny(name).to("meta")(torch.empty(2, 3, frames, crop + 32, crop + 32, device="meta")).shape == (2, 5)


@pytest.mark.parametrize("name", NAMES)
def test_options_are_the_keyword_arguments_of_the_factories(name: str):
    fields = OPTIONS[name].model_fields
    keywords = {
        key: parameter.default
        for key, parameter in inspect.signature(MODELS[name]).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }
    assert keywords == {key: field.default for key, field in fields.items() if key != "name"}
    assert all(field.description for key, field in fields.items() if key != "name")
    assert set(MODELS) == {*OPTIONS, *TORCHVISION, "own"}


def test_options_that_make_no_sense_are_refused():
    check = TypeAdapter(ModelOptions).validate_python
    assert check({"name": "i3d_r50", "depth": [1, 1, 2, 1]}) == I3DOptions(name="i3d_r50", depth=(1, 1, 2, 1))
    for wrong in [
        {"name": "c3d"},
        {"name": "i3d_r50", "alpha": 4},
        {"name": "i3d_r50", "width": 12},
        {"name": "i3d_r50", "depth": 34},
        {"name": "i3d_r50", "depth": [1, 1, 1]},
        {"name": "i3d_r50", "depth": [1, 1, 0, 1]},
        {"name": "i3d_r50", "dropout": 1.0},
        {"name": "slowfast_r50", "beta_inv": 7},
        {"name": "slowfast_r50", "fusion_kernel": 4},
    ]:
        with pytest.raises(ValidationError):
            check(wrong)


def test_slow_frames_of_the_authors_code():
    assert slow_frames(8, alpha=4) == (0, 7)
    assert slow_frames(16, alpha=4) == (0, 5, 10, 15)
    assert slow_frames(32, alpha=4) == (0, 4, 8, 13, 17, 22, 26, 31)
    assert slow_frames(64, alpha=4) == (0, 4, 8, 12, 16, 21, 25, 29, 33, 37, 42, 46, 50, 54, 58, 63)


def test_slow_frames_of_clips_that_alpha_does_not_divide():
    assert [slow_frames(frames, alpha=4) for frames in (1, 2, 3, 7, 9, 11)] == [(0,), (0,), (0,), (0,), (0, 8), (0, 10)]
    assert slow_frames(3, alpha=1) == (0, 1, 2)


@pytest.mark.parametrize("frames", range(1, 40))
def test_lateral_features_belong_to_the_slow_frames(frames: int):
    lateral = Lateral(1, alpha=4, kernel=7).eval()
    nn.init.zeros_(lateral.conv.weight)
    lateral.conv.weight.data[:, 0, 3] = 1.0  # hands the middle frame of its kernel through
    time = torch.arange(frames, dtype=torch.float32).view(1, 1, frames, 1, 1)
    seen = lateral(time).detach()[0, 0].flatten()  # the fast frame that each slow frame gets
    wanted = torch.tensor(slow_frames(frames, 4), dtype=torch.float32)
    assert len(seen) == len(wanted)
    assert ((wanted - seen >= 0) & (wanted - seen < 4 + 1e-3)).all()
    if frames % 4 == 0:
        torch.testing.assert_close(seen, torch.arange(0.0, frames, 4), rtol=1e-4, atol=1e-4)  # the authors' rule


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
def test_taken_frames_are_those_asked_for_in_the_same_format(layout: torch.memory_format):
    x = clips(2, 3, 5, 4, 4).to(memory_format=layout)
    taken = take_frames(x, (0, 4, 4))
    assert torch.equal(taken, x[:, :, [0, 4, 4]])
    assert taken.is_contiguous(memory_format=layout)
    assert take_frames(x, range(5)) is x


def test_nonlocal_block_is_the_papers_formula():
    block = awake(NonLocal3d(6)).double().eval()
    x = clips(2, 6, 2, 5, 4).double()
    pooled = nn.functional.max_pool3d(x, (1, 2, 2))
    theta, phi, g = block.query(x).flatten(2), block.key(pooled).flatten(2), block.value(pooled).flatten(2)
    weights = (torch.einsum("bct,bcp->btp", theta, phi) * 3**-0.5).softmax(dim=2)
    y = torch.einsum("btp,bcp->bct", weights, g).reshape(2, 3, 2, 5, 4)
    torch.testing.assert_close(block(x), x + block.norm(block.out(y)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(2, 8, 4, 6, 6), (2, 64, 1, 2, 2)], ids=["many places", "many channels"])
def test_dot_product_attention_is_the_papers_formula_in_either_order(shape: tuple[int, ...]):
    torch.manual_seed(0)
    block, x = NonLocal3d(shape[1], "dot_product").double().eval(), torch.randn(shape, dtype=torch.float64)
    nn.init.ones_(block.norm.weight)
    pooled = torch.nn.functional.max_pool3d(x, (1, 2, 2))
    theta, phi, g = block.query(x).flatten(2), block.key(pooled).flatten(2), block.value(pooled).flatten(2)
    y = torch.einsum("bcn,bcm,bdm->bdn", theta, phi, g) / phi.shape[2]
    expected = x + block.norm(block.out(y.view(shape[0], -1, *shape[2:])))
    torch.testing.assert_close(block(x), expected)


def test_nonlocal_blocks_follow_every_second_block_of_res3_and_res4():
    with torch.device("meta"):
        model, plain = build_model("i3d_nln_r50", classes=5), build_model("i3d_r50", classes=5)
    names = [name for name, module in model.named_modules() if isinstance(module, NonLocal3d)]
    assert names == ["res3.nonlocal1", "res3.nonlocal3", "res4.nonlocal1", "res4.nonlocal3", "res4.nonlocal5"]
    assert set(plain.state_dict()) <= set(model.state_dict())  # weights of I3D can start it


@pytest.mark.parametrize("name", NAMES)
def test_every_block_starts_as_the_identity(name: str):
    model = tiny(name).eval()
    blocks = [module for module in model.modules() if isinstance(module, Bottleneck | NonLocal3d)]
    for block in blocks:
        final = block.norm3 if isinstance(block, Bottleneck) else block.norm
        assert not final.weight.any()
        if isinstance(block, NonLocal3d) or isinstance(block.shortcut, nn.Identity):
            x = clips(2, final.num_features, 3, 4, 4).relu()
            assert torch.equal(block(x), x)
    zeros = [module for module in model.modules() if isinstance(module, GroupBatchNorm3d) and not module.weight.any()]
    assert len(zeros) == len(blocks)


def test_weights_start_from_the_published_distributions():
    torch.manual_seed(0)
    model = build_model("i3d_r50", classes=400, depth=[1, 1, 1, 1])
    assert model.head.linear.weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert not model.head.linear.bias.any()
    fan_out = 128 * 3 * 3
    assert model.res3[0].conv2.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.02)
    assert (model.stem.norm.eps, model.stem.norm.momentum) == (1e-5, 0.1)


@pytest.mark.parametrize("name", NAMES)
def test_channels_last_gives_the_same_logits_and_is_kept(name: str):
    model, x = awake(tiny(name)).double(), clips(4, 3, 9, 40, 40).double()
    set_part(model, Part(0, 4, 4, bn_groups=2))
    model.eval()
    expected = model(x)
    model.to(memory_format=torch.channels_last_3d)

    def check(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if output.dim() == 5 and inputs[0].is_contiguous(memory_format=torch.channels_last_3d):
            assert output.is_contiguous(memory_format=torch.channels_last_3d), module

    for module in model.modules():
        if not list(module.children()) and not isinstance(
            module, nn.Conv3d
        ):  # torch may lay a convolution's out as it likes
            module.register_forward_hook(check)
    x = x.to(memory_format=torch.channels_last_3d)
    torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-9)
    model.train()(x).sum().backward()


@pytest.mark.parametrize("name", NAMES)
def test_autocast_to_bf16_is_close(name: str):
    # Long clips: for 1 < T < kernel, oneDNN 3.12 leaves the bf16 gradients of temporal kernels partly unwritten.
    model, x = awake(tiny(name)).eval(), clips(4, 3, 32, 32, 32)
    expected = model(x).detach()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(x).float(), expected, rtol=0.1, atol=0.05)
        set_part(model, Part(0, 4, 4, bn_groups=2))
        loss = model.train()(x).float().square().mean()
    loss.backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_all_parameters(name: str):
    model = awake(tiny(name)).train()
    set_part(model, Part(0, 4, 4, bn_groups=2))
    nn.functional.cross_entropy(model(clips(4, 3, 8, 64, 64)), torch.tensor([0, 1, 2, 3])).backward()
    # A softmax does not care for what is added to all its terms: the key's bias has no say.
    silent = {key for key, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert {key for key in silent if not key.endswith("key.bias")} == set()


@pytest.mark.parametrize("name", NAMES)
def test_micro_batches_along_groups_are_the_whole_step(name: str):
    whole, cut = awake(tiny(name)).double().train(), awake(tiny(name)).double().train()
    cut.load_state_dict(whole.state_dict())
    x = clips(6, 3, 4, 48, 48).double()
    set_part(whole, Part(0, 6, 6, bn_groups=3, seed=7))
    logits = whole(x)
    logits.square().sum().backward()
    pieces = []
    for first in (0, 2, 4):
        set_part(cut, Part(first, 2, 6, bn_groups=3, seed=7))
        pieces.append(cut(x[first : first + 2]))
        pieces[-1].square().sum().backward()
    torch.testing.assert_close(torch.cat(pieces), logits, rtol=1e-10, atol=1e-10)
    for ours, theirs in zip(cut.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-8, atol=1e-8)
    merge_group_stats(whole)
    merge_group_stats(cut)
    for ours, theirs in zip(cut.buffers(), whole.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_the_whole_model_is_one_graph_to_the_compiler():
    model, x = awake(tiny("i3d_nln_r50", dropout=0.0)).train(), clips(4, 3, 4, 32, 32)
    set_part(model, Part(0, 4, 4, bn_groups=2))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize("layout", [torch.channels_last_3d, torch.contiguous_format], ids=["last", "first"])
def test_attention_over_one_place_is_given_no_gaps(layout: torch.memory_format) -> None:
    """Kernels of attention on GPUs want each stride to be a multiple of 8 numbers; a view of one place has 1."""
    for size in (1, 2):
        tokens = _tokens(torch.randn(3, 16, 1, 1, size).to(memory_format=layout))
        assert tokens.shape == (3, 1, size, 16)
        if size == 1:
            assert tokens.stride() == (16, 16, 16, 1)


def test_pictures_are_pooled_as_clips_are() -> None:
    x = torch.randn(2, 8, 3, 9, 10).round(decimals=1).contiguous(memory_format=torch.channels_last_3d)  # with ties
    ours, theirs = (x.clone(memory_format=torch.preserve_format).requires_grad_() for _ in range(2))
    y, expected = pool_pictures(ours), max_pool(theirs)
    assert torch.equal(y, expected)
    assert y.is_contiguous(memory_format=torch.channels_last_3d)
    for pooled in (y, expected):
        pooled.backward(torch.arange(pooled.numel()).view(pooled.shape).float())
    assert torch.equal(ours.grad, theirs.grad)  # type: ignore[arg-type]
