"""What a step's memory is reckoned to be, and the micro-batches and recomputed blocks that a limit leads to."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from typer.testing import CliRunner

from mgtrain.cli import app
from mgtrain.engine.checks import make_model, pass_clips
from mgtrain.engine.fit import fit
from mgtrain.engine.machine.memory import USABLE, Memory, fit_memory, lack_explained
from mgtrain.errors import LackError, PlanError
from mgtrain.grid import Shape
from mgtrain.models.norm import group_stats
from mgtrain.models.part import Part, set_part
from mgtrain.preflight.costs import costs
from mgtrain.processes.distributed import World
from mgtrain.recipe import Recipe
from mgtrain.runs.folder import RunDir
from mgtrain.runs.report.figures import save_schedule
from mgtrain.schedule import baseline_recipe, make_plan
from mgtrain.schedule.totals import schedule_drawing, steps_of_shapes


@contextmanager
def kept_bytes(of: torch.nn.Module) -> Iterator[list[int]]:
    """What autograd keeps in a pass, but parameters: one number, once it is over."""
    parameters = {parameter.data_ptr() for parameter in of.parameters()}
    kept: dict[int, int] = {}
    alive: list[torch.UntypedStorage] = []
    total: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        alive.append(storage)
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        yield total
    total.append(sum(kept.values()))


@pytest.mark.parametrize("model", ["i3d_r50", "i3d_nln_r50", "slowfast_r50"])
def test_activations_are_what_autograd_keeps(model: str, tiny: Callable[..., Recipe]) -> None:
    recipe = tiny(f"model={{name: {model}, width: 16}}")
    shape = Shape(3, 8, 48)
    network = make_model(recipe).train()
    set_part(network, Part(0, 3, 3, 1))
    with kept_bytes(network) as real:
        network(torch.zeros(3, 3, 8, 48, 48).to(memory_format=torch.channels_last_3d))
    assert Memory(recipe, [shape]).per_clip(shape) * 3 == pytest.approx(real[0], rel=0.05)


@pytest.mark.parametrize(
    ("model", "groups"),
    [
        ("{name: slowfast_r50, width: 16, depth: [1, 2, 1, 1]}", 3),
        ("{name: i3d_nln_r50, width: 16, depth: [1, 2, 2, 1]}", 3),
        ("{name: r2plus1d_18}", 3),
        ("{name: swin3d_t}", 3),
        pytest.param("{name: mvit_v2_s}", 3, marks=pytest.mark.slow),
        *(
            pytest.param(f"{{name: {model}}}", 1, marks=pytest.mark.slow)
            for model in (
                "slowfast_r50, width: 16, depth: [1, 2, 1, 1]",
                "i3d_nln_r50, width: 16, depth: [1, 2, 2, 1]",
                "r2plus1d_18",
                "swin3d_t",
                "mvit_v2_s",
            )
        ),
    ],
)
def test_recomputed_blocks_change_nothing_but_memory(groups: int, model: str, tiny: Callable[..., Recipe]) -> None:
    clips = torch.randn(6, 3, 4, 32, 32).to(memory_format=torch.channels_last_3d)
    found, kept = [], []
    for recompute in ("false", "true"):
        torch.manual_seed(0)
        network = make_model(tiny(f"hardware.recompute={recompute}", f"model={model}")).train()
        for step in range(2):
            set_part(network, Part(0, 6, 6, groups, seed=step))
            with kept_bytes(network) as real:
                loss = network(clips).square().mean()
            loss.backward()
        kept.append(real[0])
        gradients = {name: parameter.grad for name, parameter in network.named_parameters()}
        found.append((loss, gradients, group_stats(network), dict(network.named_buffers())))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert kept[1] < 0.8 * kept[0]


def test_a_copy_of_a_network_is_recomputed_with_its_own_weights(tiny: Callable[..., Recipe]) -> None:
    network = make_model(tiny("hardware.recompute=true")).train()
    copy = deepcopy(network)
    for parameter in copy.parameters():
        parameter.data.zero_()
    copy(torch.randn(2, 3, 8, 32, 32)).sum().backward()
    assert all(parameter.grad is None for parameter in network.parameters())
    assert all(parameter.grad is not None for parameter in copy.parameters())


def test_a_group_over_two_ranks_is_tracked_once(tiny: Callable[..., Recipe]) -> None:
    def gather(tensor: Tensor, ranks: int) -> Tensor:  # the other rank has the same clips
        return torch.stack([tensor.detach()] * ranks)

    clips, found = torch.randn(2, 3, 8, 32, 32), []
    for recompute in ("false", "true"):
        torch.manual_seed(0)
        network = make_model(tiny(f"hardware.recompute={recompute}")).train()
        set_part(network, Part(0, 2, 4, 1, ranks=2, gather=gather))
        network(clips).square().mean().backward()
        found.append(group_stats(network))
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_recomputing_keeps_less(tiny: Callable[..., Recipe]) -> None:
    shape, model = Shape(2, 8, 64), "model={name: i3d_r50, width: 16, depth: 50}"
    kept = [Memory(tiny(model, f"hardware.recompute={on}"), [shape]).per_clip(shape) for on in ("false", "true")]
    assert kept[1] < 0.7 * kept[0]


def test_the_estimate_does_not_depend_on_where_recomputing_is_asked_for(tiny: Callable[..., Recipe]) -> None:
    shape, model = Shape(2, 8, 64), "model={name: i3d_r50, width: 16, depth: 50}"
    found = [Memory(tiny(model, f"hardware.recompute={on}"), [shape])._kept for on in ("false", "true")]
    assert found[0] == found[1]


def test_a_limit_takes_the_largest_passes_that_fit(tiny: Callable[..., Recipe]) -> None:
    recipe = tiny("batch.clips=16", "batch.bn_clips=4")
    plan = make_plan(recipe, 24)
    memory = Memory(recipe, plan.shapes())
    everything = memory.most(plan, 1)[0] / USABLE / 2**30
    assert memory.limit(plan, 1, 1.001 * everything) == recipe
    seen = []
    for gib in (0.9 * everything, 0.5 * everything, 0.35 * everything):
        memory = Memory(recipe, plan.shapes())
        limited = memory.limit(plan, 1, gib)
        assert memory.most(plan, 1)[0] <= USABLE * gib * 2**30
        seen.append((limited.hardware.micro_clips, limited.hardware.recompute))
        changed = {"hardware"}
        assert {key for key in Recipe.model_fields if getattr(limited, key) != getattr(recipe, key)} == changed
    passes = [clips or 16 for clips, _ in seen]
    assert passes == sorted(passes, reverse=True)
    assert len(set(passes)) == 3
    with pytest.raises(PlanError, match=r"one BatchNorm group of clips of .* needs .* lower batch.bn_clips"):
        Memory(recipe, plan.shapes()).limit(plan, 1, 0.001)


def test_recomputing_is_the_last_resort(tiny: Callable[..., Recipe]) -> None:
    recipe = tiny("model={name: i3d_r50, width: 8, depth: 50}", "batch.clips=16")
    plan = make_plan(recipe, 24)
    everything = Memory(recipe, plan.shapes()).most(plan, 1)[0] / USABLE / 2**30
    chosen = [Memory(recipe, plan.shapes()).limit(plan, 1, share * everything).hardware for share in (0.9, 0.6, 0.3)]
    assert [hardware.recompute for hardware in chosen] == [False, False, True]


def test_a_network_that_repeats_nothing_refuses(
    tiny: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "from torch import nn\nMODELS = {'plain': lambda classes: nn.Sequential(nn.Conv3d(3, classes, 3))}\n"
    (tmp_path / "plain_networks.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    words = ("model={name: own, module: plain_networks, network: plain}", "hardware.recompute=true")
    with pytest.raises(PlanError, match=r"hardware.recompute: own has no repeated blocks to recompute"):
        make_model(tiny(*words))


def test_training_within_a_limit_is_the_same_training(tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    short = ("batch.clips=16", "schedule={name: baseline}", "optim.stages=[2]", "evaluation.times=1")
    recipe = tiny(*short)
    plan = make_plan(recipe, 24)
    memory = Memory(recipe, plan.shapes())
    gib = 0.7 * memory.most(plan, 1)[0] / USABLE / 2**30
    runs = []
    for name, changes in (("free", ()), ("limited", (f"hardware.memory_gib={gib}",))):
        run = RunDir(tmp_path / name)
        fit(tiny(*short, *changes), run, World())
        runs.append(run)
    hardware = runs[1].recipe().hardware
    assert hardware.micro_clips is not None
    losses = [[row["loss"] for row in run.rows("steps.jsonl")] for run in runs]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_all_ranks_take_the_micro_batches_of_the_one_with_the_least_memory(
    tiny: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, ranks = tiny("batch.clips=16"), 2
    plan = make_plan(recipe, 24)
    most = Memory(recipe, plan.shapes()).most(plan, ranks)[0] / USABLE
    free = [int(2 * most), int(0.7 * most)]
    monkeypatch.setattr(World, "gather", lambda self, tensor: torch.tensor(free))
    chosen = []
    for given in (recipe, recipe.changed("hardware", memory_gib=1000)):  # more than there is
        for rank, there in enumerate(free):
            monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, there=there: (there, 1 << 40))
            chosen.append(fit_memory(given, plan, World(rank, ranks, torch.device("cuda"))).hardware.micro_clips)
    assert chosen[0] is not None
    assert set(chosen) == {chosen[0]}


def test_a_lack_of_memory_names_the_step_and_what_to_set(tiny: Callable[..., Recipe]) -> None:
    recipe = tiny()
    step = make_plan(recipe, 24)[0]
    said = (
        r"rank 1: step 1 of 64x2x16², 32 clips at a time in fp32, does not fit .* GiB\); set hardware.memory_gib=.*"
        " for smaller micro-batches, or hardware.recompute=true, or stop"
    )
    with pytest.raises(LackError, match=said), lack_explained(step, recipe, World(1, 2)):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")


def test_costs_add_up(tiny: Callable[..., Recipe]) -> None:
    recipe = tiny()
    plan, baseline = make_plan(recipe, 24), make_plan(baseline_recipe(recipe), 24)
    counts = steps_of_shapes(plan)
    walked = [step.shape for step in plan]
    assert counts == {shape: walked.count(shape) for shape in set(walked)}
    found = costs(recipe, plan, baseline, 2, None)
    assert sum(row["steps"] * row["multiply_adds"] for row in found["shapes"]) == found["multiply_adds"]
    assert found["multiply_adds"] < found["baseline_multiply_adds"]
    by_shape = {Shape(**row["shape"]): row for row in found["shapes"]}
    for phase in plan.phases:
        for shape in phase.shapes[: phase.steps]:
            assert by_shape[shape]["pass_clips"] == pass_clips(recipe, shape, phase.bn_groups, 2)
    one_rank = costs(recipe, plan, baseline, 1, None)
    assert one_rank["shapes"][0]["memory_bytes"] > found["shapes"][0]["memory_bytes"]


def test_plan_tells_costs_draws_and_limits(tiny_text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(tiny_text)
    words = ["plan", "tiny.yaml", "--gpus", "2", "--memory", "8", "--picture", "s.svg"]
    shown = CliRunner().invoke(app, words)
    for words in ("multiply-adds", "memory per GPU of 2", "hardware.recompute=false", "clips  █"):
        assert words in shown.stdout
    assert "<svg" in (tmp_path / "s.svg").read_text()
    said = json.loads(CliRunner().invoke(app, ["plan", "tiny.yaml", "--json", "--costs"]).stdout)
    assert said["costs"]["multiply_adds"] < said["costs"]["baseline_multiply_adds"]
    assert said["costs"]["gpus"] == 1
    assert "costs" not in json.loads(CliRunner().invoke(app, ["plan", "tiny.yaml", "--json"]).stdout)
    limit = "hardware.memory_gib=0.5"  # of the recipe: costs are of what `fit` runs, but nobody has asked for them
    assert "costs" not in json.loads(CliRunner().invoke(app, ["plan", "tiny.yaml", limit, "--json"]).stdout)
    assert f"chooses with {limit}" in " ".join(CliRunner().invoke(app, ["plan", "tiny.yaml", limit]).stdout.split())


def test_the_schedule_is_printed_before_its_costs_are_estimated(
    tiny_text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(tiny_text)

    def failing(*_: object) -> None:
        raise PlanError("no costs")

    monkeypatch.setattr("mgtrain.preflight.costs.costs", failing)
    shown = CliRunner().invoke(app, ["plan", "tiny.yaml"])
    assert isinstance(shown.exception, PlanError)
    assert "clips  █" in shown.stdout
    assert "the baseline's 54" in shown.stdout


def test_a_drawing_shows_learning_rates_that_start_at_nothing(tiny: Callable[..., Recipe]) -> None:
    drawn = schedule_drawing(make_plan(tiny("optim.curve=cosine", "optim.warmup_lr=0", "optim.warmup_epochs=2"), 24))
    (bars,) = (line.split()[1] for line in drawn.splitlines() if line.startswith("lr"))
    assert bars[0] == "▁"
    assert len(set(bars)) > 4, bars


def test_a_schedule_is_drawn_into_files_of_three_kinds(tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    plan = make_plan(tiny("optim.curve=cosine", "optim.warmup_lr=0"), 24)
    for name, start in (("a/s.svg", b"<?xml"), ("s.png", b"\x89PNG"), ("s.pdf", b"%PDF")):
        save_schedule(plan, tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(start)


def test_state_is_weights_gradients_and_what_the_optimizer_keeps(tiny: Callable[..., Recipe]) -> None:
    weights = 4 * sum(p.numel() for p in make_model(tiny()).parameters())
    for words, copies in (((), 3), (("optim.name=adamw",), 4), (("optim.name=adamw", "optim.ema=0.9"), 6)):
        assert Memory(tiny(*words), []).state == copies * weights


def test_half_precision_keeps_half_of_the_activations(tiny: Callable[..., Recipe]) -> None:
    shape = Shape(2, 8, 64)
    whole, half = (Memory(tiny(f"hardware.precision={p}"), [shape]).per_clip(shape) for p in ("fp32", "bf16"))
    assert half < 0.6 * whole


def test_a_gpu_keeps_to_a_limit_below_its_free_memory(
    tiny: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny("batch.clips=16")
    plan = make_plan(recipe, 24)
    most = Memory(recipe, plan.shapes()).most(plan, 1)[0] / USABLE
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (int(2 * most), 1 << 40))
    world = World(device=torch.device("cuda"))
    assert fit_memory(recipe, plan, world) == recipe
    assert (
        fit_memory(recipe.changed("hardware", memory_gib=0.7 * most / 2**30), plan, world).hardware.micro_clips
        is not None
    )
