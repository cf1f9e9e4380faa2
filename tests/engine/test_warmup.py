"""Meeting every shape before the first step, and compiling those that pay."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch

from mgtrain.engine import warmup
from mgtrain.engine.checks import make_model
from mgtrain.engine.fit import fit
from mgtrain.engine.warmup import _steps_left, pays, warm_up
from mgtrain.models.norm import GroupBatchNorm3d
from mgtrain.models.part import Part, set_part
from mgtrain.processes.distributed import World
from mgtrain.recipe import Recipe
from mgtrain.runs.folder import RunDir
from mgtrain.schedule import make_plan


@pytest.mark.parametrize("start", [0, 1, 5, 16])
def test_the_steps_that_are_left_are_those_of_the_plan(start: int, tiny: Callable[..., Recipe]) -> None:
    plan = make_plan(tiny(), 24)
    walked = list(plan.steps(start))
    found = _steps_left(plan, start)
    assert {shape: count for shape, (_, count) in found.items()} == {
        shape: sum(step.shape == shape for step in walked) for shape in {step.shape for step in walked}
    }
    for shape, (step, _) in found.items():
        assert step == next(one for one in walked if one.shape == shape)


def _state(model: torch.nn.Module) -> dict[str, object]:
    return copy.deepcopy(
        {**dict(model.named_parameters()), **dict(model.named_buffers())}
        | {name: (m.groups, m.everyones) for name, m in model.named_modules() if isinstance(m, GroupBatchNorm3d)}
    )


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.compile` compiles nothing."""
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **_: None)


def test_warming_up_changes_nothing(tiny: Callable[..., Recipe], uncompiled: None) -> None:
    recipe = tiny("hardware.compile=default")
    model, plan = make_model(recipe).train(), make_plan(recipe, 24)
    set_part(model, Part(0, 32, 32, 8))
    model(torch.randn(32, 3, 2, 16, 16))  # so that there are statistics of groups to disturb
    before = _state(model)
    warm_up(model, recipe, plan, 0, World())
    after = _state(model)
    assert before.keys() == after.keys()
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=0, atol=0)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("eager", "compiled", "cost", "expected"),
    [
        (1000.0, 500.0, 10.0, {0, 1, 2, 3, 4, 5, 6}),  # all pay
        (1000.0, 1500.0, 10.0, set()),  # the first one is slower, so that none is tried after it
        (0.001, 0.0005, 10.0, set()),  # too short a run to compile anything
    ],
)
def test_a_shape_is_compiled_where_its_steps_win_back_the_time(
    eager: float, compiled: float, cost: float, expected: set[int], tiny: Callable[..., Recipe],
    monkeypatch: pytest.MonkeyPatch, uncompiled: None,
) -> None:  # fmt: skip
    now, tried = [0.0], []

    def timed(model: torch.nn.Module, recipe: object, step: object, world: object) -> float:
        if not within:
            return eager
        tried.append(step)
        now[0] += cost + warmup.PASSES * compiled
        return compiled

    @contextmanager
    def inside(*_: object) -> Iterator[None]:
        within.append(True)
        yield
        within.clear()

    within: list[bool] = []
    monkeypatch.setattr(warmup, "compiled", inside)
    monkeypatch.setattr(warmup, "_timed", timed)
    monkeypatch.setattr(warmup.time, "perf_counter", lambda: now[0])
    recipe = tiny("hardware.compile=default")
    plan = make_plan(recipe, 24)
    mode = warm_up(make_model(recipe), recipe, plan, 0, World())
    shapes = plan.shapes()
    assert {n for n, shape in enumerate(shapes) if not isinstance(mode(shape), nullcontext)} == expected
    assert len(tried) == (len(shapes) if expected else 1 if eager > 1 else 0)


def test_pays() -> None:
    assert pays(1000, 0.5, 0.2, 99)
    assert not pays(1000, 0.5, 0.2, 101)
    assert not pays(10**9, 1.0, -0.1, 0.5)


def test_without_compiling_a_cpu_has_nothing_to_warm(tiny: Callable[..., Recipe]) -> None:
    model = make_model(tiny())
    model.register_forward_hook(lambda *_: pytest.fail("a pass was made"))
    mode = warm_up(model, tiny(), make_plan(tiny(), 24), 0, World())
    assert isinstance(mode(make_plan(tiny(), 24)[0].shape), nullcontext)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch._dynamo's own
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler on a CPU")
def test_a_compiled_run_is_the_same_run(
    tiny: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(warmup, "pays", lambda steps, *_: steps >= 3)  # some shapes, not all
    chosen = []
    compiled = warmup._compiled
    monkeypatch.setattr(
        warmup, "_compiled", lambda *args: chosen.append(args[2].keys() and compiled(*args)) or chosen[-1]
    )
    losses = []
    for compile in ("no", "default"):
        run = RunDir(tmp_path / compile)
        fit(tiny(f"hardware.compile={compile}"), run, World())
        losses.append([row["loss"] for row in run.rows("steps.jsonl")])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
