"""What the optimizer does with each parameter, clipping, and the average of the weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import mgtrain.engine.step
from mgtrain.engine.evaluate import evaluate
from mgtrain.engine.fit import fit
from mgtrain.engine.start import open_data
from mgtrain.engine.step import clipped
from mgtrain.engine.trained import load_trained
from mgtrain.engine.trained.export import export
from mgtrain.engine.update.average import Average, kept
from mgtrain.engine.update.optim import layers, make_optimizer
from mgtrain.errors import UsageError
from mgtrain.models import build_model
from mgtrain.models.weights.load import load_weights, read_weights
from mgtrain.processes.distributed import World
from mgtrain.recipe import Optim, Recipe, load_recipe
from mgtrain.runs.folder import RunDir
from mgtrain.runs.scores import Predictions
from mgtrain.schedule import baseline_recipe, make_plan

ADAMW = Optim(name="adamw", lr=0.001, stages=(1.0,), weight_decay=0.05)


class Block(nn.Module):
    """A block of a transformer, as far as its parameters go."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp, self.gamma = nn.LayerNorm(4), nn.Linear(4, 4), nn.Parameter(torch.ones(4))


class Small(nn.Module):
    """A stem, a table of positions, two blocks with something between, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 4))
        self.stem, self.pos_embed = nn.Conv3d(3, 4, 1), nn.Parameter(torch.zeros(1, 8, 4))
        self.first, self.between, self.second = Block(), nn.Linear(4, 4), Block()
        self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, 3)
        self.queries = nn.Parameter(torch.zeros(2, 4))

    def no_weight_decay(self) -> set[str]:
        return {"queries"}


def of_each(model: nn.Module, optim: Optim, key: str) -> dict[str, float]:
    """What the groups of the optimizer say of each parameter; each is in one of them."""
    groups = make_optimizer(model, optim).param_groups
    found = [(id(p), group[key]) for group in groups for p in group["params"]]
    assert len(found) == len(dict(found)) == len(list(model.parameters()))
    return {name: dict(found)[id(p)] for name, p in model.named_parameters()}


def test_adamw_decays_matrices_and_kernels_but_no_vectors_tables_and_tokens() -> None:
    decayed = {name for name, decay in of_each(Small(), ADAMW, "weight_decay").items() if decay}
    assert decayed == {
        "stem.weight", "first.mlp.weight", "between.weight", "second.mlp.weight", "head.weight"
    }  # fmt: skip
    plain = of_each(Small(), Optim(lr=0.1, stages=(1.0,)), "weight_decay")
    assert {name for name, decay in plain.items() if not decay} == {
        f"{norm}.{kind}" for norm in ("first.norm", "second.norm", "norm") for kind in ("weight", "bias")
    }


@pytest.mark.parametrize(("name", "tables"), [("swin3d_t", 12), ("mvit_v2_s", 48)])
def test_torchvisions_tables_of_relative_positions_are_not_decayed(name: str, tables: int) -> None:
    with torch.device("meta"):
        model = build_model(name, classes=5)
    undecayed = [key for key, decay in of_each(model, ADAMW, "weight_decay").items() if not decay]
    assert sum(model.get_parameter(key).ndim > 1 for key in undecayed) == tables
    assert sum("rel" in key for key in undecayed) == tables
    assert not any(key.endswith(("qkv.weight", "mlp.0.weight", "proj.weight")) for key in undecayed)


def test_the_learning_rate_decays_from_layer_to_layer() -> None:
    optim = ADAMW.model_copy(update={"layer_decay": 0.5, "head_lr": 10})
    factors = of_each(Small(), optim, "lr_factor")
    expected = {"stem": 1 / 8, "pos_embed": 1 / 8, "cls_token": 1 / 8, "first": 1 / 4, "between": 1 / 4,
                "second": 1 / 2, "norm": 1, "head": 10, "queries": 1 / 8}  # fmt: skip
    assert factors == {name: expected[name.partition(".")[0]] for name in factors}


@pytest.mark.parametrize(("name", "blocks"), [("swin3d_t", 12 + 3), ("mvit_v2_s", 16), ("r3d_18", 8)])
def test_the_layers_of_torchvisions_networks_are_their_blocks(name: str, blocks: int) -> None:
    with torch.device("meta"):
        found, last = layers(build_model(name, classes=5))
    order = [*found.values()]
    assert order == sorted(order)
    assert {*order} == {*range(last + 1)} == {*range(blocks + 2)}


def test_the_layers_of_slowfast_are_the_stages_of_both_pathways() -> None:
    with torch.device("meta"):
        found, last = layers(build_model("slowfast_r50", classes=5))
    assert last == 5
    assert {name: found[name] for name in ("slow.0.conv.weight", "fast.0.conv.weight", "head.linear.weight")} == {
        "slow.0.conv.weight": 0, "fast.0.conv.weight": 0, "head.linear.weight": 5
    }  # fmt: skip
    for pathway in ("slow", "fast"):
        assert [found[f"{pathway}.{n}.0.conv1.weight"] for n in range(1, 5)] == [1, 2, 3, 4]


def test_a_network_without_blocks_has_no_layers_to_decay_over() -> None:
    with pytest.raises(UsageError, match=r"optim.layer_decay: the network repeats no block .*; set it to 1"):
        make_optimizer(nn.Sequential(nn.Linear(2, 2)), ADAMW.model_copy(update={"layer_decay": 0.9}))


def test_blocks_without_parameters_are_no_layers() -> None:
    class Pool(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pool = nn.AvgPool3d(2)

    model = Small()
    before = layers(model)
    model.pools = nn.Sequential(Pool(), Pool())
    assert layers(model) == before


@pytest.mark.parametrize("norm", [nn.RMSNorm(4), nn.InstanceNorm3d(4, affine=True), nn.GroupNorm(2, 4)])
def test_scales_of_normalizations_do_not_decay(norm: nn.Module) -> None:
    sgd = ADAMW.model_copy(update={"name": "sgd"})
    assert not any(of_each(nn.Sequential(norm), sgd, "weight_decay").values())


def test_a_gradient_is_scaled_as_a_whole_and_only_if_it_is_too_large() -> None:
    model = nn.Linear(2, 2)
    gradients = [torch.tensor([[3.0, 0.0], [0.0, 0.0]]), torch.tensor([0.0, 4.0])]
    for most, factor in ((2.5, 0.5), (10.0, 1.0), (None, 1.0)):
        model.weight.grad, model.bias.grad = (gradient.clone() for gradient in gradients)
        assert clipped(model, most).item() == pytest.approx(5)
        torch.testing.assert_close([model.weight.grad, model.bias.grad], [factor * g for g in gradients])


def test_a_step_of_more_clips_keeps_of_the_average_what_as_many_steps_of_the_base_would() -> None:
    recipe = load_recipe("demo_multigrid")
    plan, base = make_plan(recipe, 10_000), recipe.batch.clips
    late = [plan[-k] for k in (1, 2, 3)] + [plan[len(plan) // 3]]
    assert len({step.shape.clips for step in late}) > 2
    for step in late:
        assert kept(0.9, base, step) == pytest.approx(0.9 ** (step.shape.clips / base))
    both = [make_plan(r, 10_000) for r in (recipe, baseline_recipe(recipe))]
    for one in both:  # at the start it spans a tenth of the clips so far, of each schedule
        step = one[len(one) // 50]
        assert kept(0.99999, base, step) == pytest.approx(
            (1 - 9 / (10 + step.first_clip / base)) ** (step.shape.clips / base)
        )


def test_the_average_follows_the_weights_and_not_a_step_that_was_skipped(tiny: Callable[..., Recipe]) -> None:
    model, plan = nn.Linear(2, 2), make_plan(tiny(), 24)
    model.bias.requires_grad_(False)  # frozen: nothing to average
    average, first = Average(model, 0.5, 4), model.weight.detach().clone()
    assert [*average.weights] == ["weight"]
    nn.init.constant_(model.weight, 3.0)
    average.update(plan[16], torch.tensor(1.0))
    assert torch.equal(average.weights["weight"], first)
    average.update(plan[16], torch.tensor(0.0))
    share = kept(0.5, 4, plan[16])
    torch.testing.assert_close(average.weights["weight"], share * first + (1 - share) * 3)
    with average.in_place():
        assert torch.equal(model.weight, average.weights["weight"])
    assert torch.equal(model.weight, torch.full((2, 2), 3.0))


@pytest.fixture(scope="module")
def averaged(tiny: Callable[..., Recipe], tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """The tiny run with AdamW and an average of its weights."""
    run = RunDir(tmp_path_factory.mktemp("runs") / "averaged")
    fit(tiny("optim.name=adamw", "optim.ema=0.9", "evaluation.times=2"), run, World())
    return run


def test_the_average_is_what_is_evaluated_exported_and_started_from(averaged: RunDir, tmp_path: Path) -> None:
    path = averaged.checkpoints()[-1]
    tensors = load_file(path)
    trained = load_trained(path, None, (), World())
    assert trained.averaged
    for name, parameter in trained.model.named_parameters():
        assert torch.equal(parameter, tensors[f"ema.{name}"])
        assert not torch.equal(parameter, tensors[f"model.{name}"])

    def scores(of: Predictions) -> tuple[float, float]:
        return of.scores().top1, pytest.approx(of.scores().loss)

    predictions = evaluate(trained.model, open_data(trained.recipe)[1], trained.recipe, World())
    last = averaged.rows("evals.jsonl")[-1]
    assert scores(predictions) == (last["top1"], last["loss"])
    assert last["weights"] == "ema"

    export(trained, tmp_path / "out.safetensors")
    for file in (path, tmp_path / "out.safetensors"):  # `init.weights` of another run
        model = build_model("i3d_r50", classes=4, width=8, depth=(1, 1, 1, 1))
        report = load_weights(model, read_weights(file))
        assert report.share == 1
        assert not [name for name in report.unused if "ema" in name]
        assert torch.equal(model.head.linear.weight, tensors["ema.head.linear.weight"])


def test_a_step_left_out_leaves_adamw_and_the_average_as_they_were(
    tiny: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    augmented = mgtrain.engine.step.augmented

    def spoilt(*arguments: object) -> object:
        x, targets = augmented(*arguments)  # type: ignore[arg-type]
        if arguments[3].index == 4:  # type: ignore[attr-defined]
            x[0] = float("nan")
        return x, targets

    monkeypatch.setattr(mgtrain.engine.step, "augmented", spoilt)
    words = ("optim.name=adamw", "optim.ema=0.9", "optim.clip_norm=1", "faults.non_finite=skip")
    run = RunDir(tmp_path / "run")
    every = ("logging.checkpoint_steps=1", "logging.keep_checkpoints=100", "evaluation.times=1")
    fit(tiny(*words, *every), run, World())
    states = {
        step: {
            name: tensor
            for name, tensor in load_file(run.checkpoint_path(step)).items()
            if name.startswith(("ema.", "optimizer.")) or name.endswith(("weight", "bias"))
        }
        for step in (4, 5, 6)
    }
    assert all(torch.equal(states[5][name], tensor) for name, tensor in states[4].items())
    assert not any(torch.equal(states[6][name], tensor) for name, tensor in states[5].items() if "ema." in name)
    assert {states[6][name].item() for name in states[6] if name.startswith("optimizer.step.")} == {5.0}


def test_the_optimizer_has_the_settings_of_the_recipe() -> None:
    sgd = Optim(lr=0.1, stages=(1.0,), momentum=0.8, nesterov=False)
    adamw = Optim(name="adamw", lr=0.1, stages=(1.0,), betas=(0.8, 0.95), eps=1e-4)
    for optim, keys in (
        (sgd, ("momentum", "nesterov")),
        (sgd.model_copy(update={"nesterov": True}), ("nesterov",)),
        (adamw, ("betas", "eps")),
    ):
        for key in keys:
            assert set(of_each(Small(), optim, key).values()) == {getattr(optim, key)}
