"""Multigrid in other loops: the page's programs train as `fit` does, and the public interface stays as it is."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import warm
from torch import nn

import mgtrain
from mgtrain.engine.loops import Batches
from mgtrain.errors import PlanError, UsageError
from mgtrain.models.norm import GroupBatchNorm3d
from mgtrain.processes import distributed
from mgtrain.processes.distributed import World
from mgtrain.recipe import Recipe
from mgtrain.runs.folder import RunDir

PAGE = (Path(__file__).parent.parent.parent / "docs/how-to/own-loop.md").read_text(encoding="utf-8")
PROGRAMS = dict(
    zip(("plain", "lightning", "accelerate"), re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL), strict=True)
)
ON_TWO_RANKS = {  # what the page says to change, and that both ranks print
    "plain": {},
    "lightning": {
        "lightning.Trainer(": "lightning.Trainer(accelerator='cpu', devices=2, "
        "strategy=DDPStrategy(broadcast_buffers=False),",
        "import lightning\n": "import lightning\nfrom lightning.pytorch.strategies import DDPStrategy\n",
    },
    "accelerate": {"accelerator.print": "print", "Accelerator(kwargs": "Accelerator(cpu=True, kwargs"},
}
# The public interface. A change here is one that users have to read about in CHANGELOG.md.
INTERFACE = {
    "MgtrainError": None,
    "Plan": "(recipe, videos, stretches)",
    "Recipe": None,
    "RunDir": "(path, writes=True)",
    "Shape": "clips, frames, crop",
    "Step": "index, phase, shape, grid, lr, epoch, first_clip, bn_groups",
    "World": "rank, size, device, cores, watchdog",
    "at_step": "(model, step, recipe, first=0, clips=None)",
    "evaluate": "(model, recipe, videos, views=(1, 1), device=None)",
    "fit": "(recipe, run, world, resume=False, baseline=None, allow_changes=False, began=None)",
    "group_batchnorm": "(model)",
    "load_recipe": "(path, overrides=(), saved=False)",
    "load_trained": "(path, recipe, overrides, world, trust=())",
    "loss": "(logits, targets, recipe)",
    "lr": "(step)",
    "make_model": "(recipe, device=None)",
    "make_optimizer": "(model, optim)",
    "make_plan": "(recipe, videos)",
    "open_data": "(recipe)",
    "recalibrate": "(model, recipe, plan, videos, steps, device=None)",
    "set_lr": "(optimizer, step)",
    "train_batches": "(recipe, plan, videos, start=0, device=None)",
}


def described(thing: object) -> str | None:
    """A class's fields, or a signature without its types."""
    if is_dataclass(thing):
        return ", ".join(field.name for field in fields(thing))
    if inspect.isclass(thing) and "__init__" not in vars(thing):
        return None
    parameters = inspect.signature(thing).parameters.values()  # type: ignore[arg-type]
    return str(inspect.Signature([p.replace(annotation=p.empty) for p in parameters]))


def test_the_public_interface_is_this() -> None:
    assert {name: described(getattr(mgtrain, name)) for name in mgtrain.__all__} == INTERFACE
    assert sorted(dir(mgtrain)) == sorted([*INTERFACE, "__version__"])


def test_every_public_name_is_typed_and_documented() -> None:
    for name in mgtrain.__all__:
        thing = getattr(mgtrain, name)
        assert (thing.__doc__ or "").strip(), name
        if inspect.isfunction(thing):
            hints = inspect.get_annotations(inspect.unwrap(thing))
            assert set(hints) == {*inspect.signature(thing).parameters, "return"}, name


def test_recipes_and_plans_need_no_torch() -> None:
    program = (
        "import sys, mgtrain\n"
        "plan = mgtrain.make_plan(mgtrain.load_recipe('demo_multigrid'), 160)\n"
        "for step in plan: assert mgtrain.lr(step) == step.lr >= 0\n"
        "assert isinstance(step, mgtrain.Step) and isinstance(step.shape, mgtrain.Shape)\n"
        "print(len(plan), step.shape.clips, step.shape.frames, step.shape.height, step.shape.width, step.bn_groups)\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    plan = mgtrain.make_plan(mgtrain.load_recipe("demo_multigrid"), 160)
    last = plan[-1].shape
    expected = len(plan), last.clips, last.frames, last.crop, last.crop, plan[-1].bn_groups
    assert done.stdout.split() == [str(number) for number in expected]


def run(folder: Path, program: str, text: str, ranks: int = 1) -> tuple[list[tuple[int, str, float]], list[float]]:
    """The steps that a program prints, (number, shape, loss), and the accuracies; ranks may print into one another."""
    source = PROGRAMS[program]
    for old, new in ON_TWO_RANKS[program].items() if ranks > 1 else ():
        assert old in source
        source = source.replace(old, new)
    (folder / "loop.py").write_text(source)
    (folder / "tiny.yaml").write_text(text)
    workers = int(program == "plain" and ranks == 1)  # loader processes import the program
    words = [str(folder / "loop.py"), "tiny.yaml", f"hardware.workers={workers}"]
    if ranks > 1:  # with torchrun's variables
        command = [sys.executable, *words]
        words = ["-c", f"import sys, mgtrain.processes.distributed as d; sys.exit(d.launch({command}, {ranks}))"]
    done = warm.run(words, folder)
    assert done.returncode == 0, done.stderr[-3000:]
    steps = re.findall(r"step (\d+) of (\S+): loss ([\d.]+)", done.stdout)
    tops = re.findall(r"top-1 ([\d.]+)", done.stdout)
    return [(int(number), shape, float(loss)) for number, shape, loss in steps], [*map(float, tops)]


@pytest.mark.parametrize(
    "program", [pytest.param(name, marks=[pytest.mark.slow] * (name == "lightning")) for name in PROGRAMS]
)
def test_the_programs_of_the_page_train_as_fit_does(
    program: str, tiny_text: str, straight: Path, tmp_path: Path
) -> None:
    steps, (top1,) = run(tmp_path, program, tiny_text)
    rows = RunDir(straight).rows("steps.jsonl")
    assert steps == [(row["step"], "{clips}x{frames}x{crop}²".format(**row), row["loss"]) for row in rows]
    assert top1 == RunDir(straight).rows("evals.jsonl")[-1]["top1"]


def test_the_plain_loop_is_short() -> None:
    assert len(PROGRAMS["plain"].splitlines()) <= 40


@pytest.mark.parametrize(
    "program", [pytest.param(name, marks=[pytest.mark.slow] * (name != "plain")) for name in PROGRAMS]
)
def test_the_programs_on_two_ranks_have_the_losses_of_one(
    program: str, tiny_text: str, straight: Path, tmp_path: Path
) -> None:
    steps, tops = run(tmp_path, program, tiny_text, ranks=2)
    for row in RunDir(straight).rows("steps.jsonl"):
        losses = [loss for number, _, loss in steps if number == row["step"]]
        assert len(losses) == 2
        assert sum(losses) / 2 == pytest.approx(row["loss"], rel=2e-4)
    assert len(tops) == 2
    assert tops[0] == tops[1]


def batches_of(recipe: Recipe, start: int = 0) -> tuple[mgtrain.Plan, Batches]:
    train, _ = mgtrain.open_data(recipe)
    plan = mgtrain.make_plan(recipe, len(train))
    return plan, mgtrain.train_batches(recipe, plan, train, start)


def test_batches_may_start_anywhere_and_be_iterated_again(tiny: Callable[..., Recipe]) -> None:
    plan, batches = batches_of(tiny())
    whole = list(batches)
    assert len(whole) == len(batches) == len(plan) == 17
    for step, (clips, labels) in zip(plan, whole, strict=True):
        shape = step.shape
        assert clips.shape == (shape.clips, 3, shape.frames, shape.height, shape.width)
        assert (clips.dtype, labels.dtype, len(labels)) == (torch.float32, torch.int64, shape.clips)
    _, later = batches_of(tiny(), start=14)
    assert len(later) == 3
    for (clips, labels), (same, alike) in zip(later, whole[14:], strict=True):
        assert torch.equal(clips, same)
        assert torch.equal(labels, alike)


def test_mixed_clips_have_shares_of_classes(tiny: Callable[..., Recipe]) -> None:
    _, batches = batches_of(tiny("augment.mixup=0.8"), start=16)
    ((_, targets),) = batches
    assert targets.shape == (4, 4)
    torch.testing.assert_close(targets.sum(1), torch.ones(4))


def test_ranks_that_cannot_share_the_steps_are_refused(
    tiny: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mgtrain.engine.loops.joined", lambda *_, **__: World(0, 3))
    with pytest.raises(PlanError, match="3 GPUs cannot share equally"):
        next(iter(batches_of(tiny())[1]))


class Small(nn.Module):
    """A network with one BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv3d(3, 8, 3, padding=1), nn.BatchNorm3d(8)
        self.drop, self.head = nn.Dropout(0.0), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.drop(self.bn(self.conv(x)).relu().mean((2, 3, 4))))


def small(tiny: Callable[..., Recipe]) -> tuple[nn.Module, mgtrain.Step, Recipe, torch.Tensor]:
    """A network, the first step of the tiny recipe (64 clips in 8 groups), and clips for it."""
    torch.manual_seed(0)
    model, recipe = Small(), tiny()
    step = mgtrain.make_plan(recipe, 24)[0]
    assert (step.shape.clips, step.bn_groups) == (64, 8)
    return model, step, recipe, torch.randn(64, 3, 2, 4, 4)


def test_a_network_of_ones_own_normalizes_each_group_by_itself(tiny: Callable[..., Recipe]) -> None:
    model, step, recipe, x = small(tiny)
    with torch.no_grad():
        by_groups = torch.cat([model(clips) for clips in x.chunk(8)])
        together = model(x)
        names = list(model.state_dict())
        assert mgtrain.group_batchnorm(model) is model
        assert isinstance(model.bn, GroupBatchNorm3d)
        assert list(model.state_dict()) == names
        with mgtrain.at_step(model, step, recipe):
            torch.testing.assert_close(model(x), by_groups)
        torch.testing.assert_close(model(x), together)
    assert not torch.allclose(by_groups, together, atol=1e-3)


def test_accumulated_gradients_are_those_of_one_pass(tiny: Callable[..., Recipe]) -> None:
    model, step, recipe, x = small(tiny)
    mgtrain.group_batchnorm(model)
    labels = torch.arange(64) % 4
    with mgtrain.at_step(model, step, recipe):
        F.cross_entropy(model(x), labels).backward()
    whole = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    for first in (0, 16, 32, 48):
        mine = slice(first, first + 16)
        with mgtrain.at_step(model, step, recipe, first, 16):
            (F.cross_entropy(model(x[mine]), labels[mine], reduction="sum") / 64).backward()
    for parameter, gradient in zip(model.parameters(), whole, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


@pytest.mark.parametrize(("first", "clips"), [(0, 12), (4, 8), (0, 0), (56, 16), (-8, 8)])
def test_passes_that_cut_groups_are_refused(tiny: Callable[..., Recipe], first: int, clips: int) -> None:
    model, step, recipe, _ = small(tiny)
    with (
        pytest.raises(UsageError, match=f"clips {first} to {first + clips} of the 64 .*; use multiples of 8"),
        mgtrain.at_step(mgtrain.group_batchnorm(model), step, recipe, first, clips),
    ):
        pass


def test_a_batchnorm_without_groups_is_named(tiny: Callable[..., Recipe]) -> None:
    model, step, recipe, _ = small(tiny)
    with (
        pytest.raises(UsageError, match=r"bn: this BatchNorm3d has no groups; use mgtrain.group_batchnorm\(model\)"),
        mgtrain.at_step(model, step, recipe),
    ):
        pass
    with mgtrain.at_step(model.eval(), step, recipe):  # it normalizes by its running statistics, in any shape
        pass
    with pytest.raises(UsageError, match="bn: SyncBatchNorm normalizes over the clips of a rank"):
        mgtrain.group_batchnorm(nn.ModuleDict({"bn": nn.SyncBatchNorm(8)}))


def test_an_evaluation_leaves_each_layer_in_its_mode(tiny: Callable[..., Recipe]) -> None:
    recipe = tiny()
    train, val = mgtrain.open_data(recipe)
    model = mgtrain.make_model(recipe).train()
    next(iter(model.children())).eval()
    before = [layer.training for layer in model.modules()]
    assert {True, False} == set(before)
    statistics = {name: values.clone() for name, values in model.named_buffers() if "running" in name}
    mgtrain.recalibrate(model, recipe, mgtrain.make_plan(recipe, len(train)), train, steps=17)
    assert any(not torch.equal(values, statistics[n]) for n, values in model.named_buffers() if n in statistics)
    scores = mgtrain.evaluate(model, recipe, val, views=(2, 1))
    assert (scores.videos, scores.counts) == (12, (3, 3, 3, 3))
    assert [layer.training for layer in model.modules()] == before


def test_a_learning_rate_counts_in_each_groups_measure(tiny: Callable[..., Recipe]) -> None:
    step = mgtrain.make_plan(tiny(), 24)[3]
    weights = [{"params": [nn.Parameter(torch.zeros(1))]}, {"params": [nn.Parameter(torch.zeros(1))], "lr_factor": 10}]
    optimizer = torch.optim.AdamW(weights, lr=1.0)
    mgtrain.set_lr(optimizer, step)
    assert [group["lr"] for group in optimizer.param_groups] == [step.lr, 10 * step.lr]


def test_the_optimizer_takes_a_closure(tiny: Callable[..., Recipe]) -> None:
    model, _, recipe, x = small(tiny)
    optimizer = mgtrain.make_optimizer(model, recipe.optim)
    before = model.head.weight.clone()

    def closure() -> float:
        loss = model(x).square().mean()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) > 0
    assert not torch.equal(model.head.weight, before)


def test_a_process_group_of_somebody_elses_is_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (distributed.joined("cpu").rank, distributed.joined("cpu").size) == (0, 1)
    monkeypatch.setattr(distributed.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed.dist, "get_rank", lambda: 3)
    monkeypatch.setattr(distributed.dist, "get_world_size", lambda: 8)
    world = distributed.joined("cpu")
    assert (world.rank, world.size, world.device.type) == (3, 8, "cpu")

    def gather(everyone: list[object], mine: tuple[str, set[int], str]) -> None:
        everyone[:] = [mine] * 4 + [("another machine", *mine[1:])] * 4

    monkeypatch.setattr(distributed.dist, "all_gather_object", gather)
    monkeypatch.setattr(distributed, "which_cores", lambda: set(range(12)))
    assert distributed.joined("cpu", together=True).cores == 3


def test_statistics_that_the_user_holds_constant_are_not_recalibrated(tiny: Callable[..., Recipe]) -> None:
    recipe = tiny()
    train, _ = mgtrain.open_data(recipe)
    plan = mgtrain.make_plan(recipe, len(train))
    model = mgtrain.make_model(recipe)
    first, second, *_ = (layer for layer in model.modules() if isinstance(layer, GroupBatchNorm3d))
    model.train()
    first.eval()
    before = [norm.running_mean.clone() for norm in (first, second)]
    mgtrain.recalibrate(model, recipe, plan, train, steps=len(plan))
    assert torch.equal(first.running_mean, before[0])
    assert not torch.equal(second.running_mean, before[1])
    assert (first.training, second.training, first.frozen) == (False, True, False)


@pytest.mark.parametrize("start", [-1, 18])
def test_a_start_outside_of_the_plan_is_refused(tiny: Callable[..., Recipe], start: int) -> None:
    with pytest.raises(UsageError, match=f"start={start} is not a number of finished steps; the plan has 17"):
        batches_of(tiny(), start)


def test_without_recalibration_the_statistics_of_training_are_the_models(tiny: Callable[..., Recipe]) -> None:
    recipe = tiny("evaluation.recalibration_batches=0")
    train, _ = mgtrain.open_data(recipe)
    plan = mgtrain.make_plan(recipe, len(train))
    model = mgtrain.make_model(recipe)
    norm = next(layer for layer in model.modules() if isinstance(layer, GroupBatchNorm3d))
    before = norm.running_mean.clone()
    for step, (clips, _) in zip(plan, mgtrain.train_batches(recipe, plan, train), strict=False):
        with mgtrain.at_step(model.train(), step, recipe):
            model(clips)
        break
    mgtrain.recalibrate(model, recipe, plan, train, steps=1)
    assert not torch.equal(norm.running_mean, before)


def test_the_loss_is_the_recipes(tiny: Callable[..., Recipe]) -> None:
    logits, classes = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 0, 1])
    smooth = mgtrain.loss(logits, classes, tiny("augment.label_smoothing=0.2"))
    torch.testing.assert_close(smooth, F.cross_entropy(logits, classes, label_smoothing=0.2))
    several = F.one_hot(classes, 4).float() + F.one_hot(classes.flip(0), 4)
    found = mgtrain.loss(logits, several, tiny("data.multi_label=true"))
    torch.testing.assert_close(found, F.binary_cross_entropy_with_logits(logits, several))
