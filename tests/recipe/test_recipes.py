"""Every shipped recipe: it plans, its model is built and takes all its shapes, and so do 1 to 64 GPUs."""

from __future__ import annotations

import pytest

from mgtrain.engine.checks import check_micro_batches, check_shapes
from mgtrain.grid import Shape
from mgtrain.recipe import load_recipe, shipped_recipes
from mgtrain.schedule import check_world, make_plan


def is_like_another(name: str) -> bool:
    """Whether another recipe has the same network and its shapes."""
    return name.endswith("_baseline") or not name.startswith(
        ("demo", "k400_slowfast_8x8", "k400_i3d", "ssv2_slowfast", "ssv2_swin3d", "ut6")
    )


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * is_like_another(name)) for name in shipped_recipes()]
)
def test_a_shipped_recipe_plans_and_its_model_takes_all_its_shapes(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.data.videos is not None
    plan = make_plan(recipe, recipe.data.videos)
    assert all(phase.steps > 0 for phase in plan.phases)
    evaluated = Shape(1, recipe.clip.frames, recipe.evaluation.crop)
    flops = check_shapes(recipe, [*plan.shapes(), evaluated])
    assert set(flops) == {*plan.shapes(), evaluated}
    assert min(flops.values()) > 0
    assert flops[plan.shapes()[0]] <= flops[evaluated]  # the coarsest clip costs least
    check_micro_batches(recipe, plan, ranks=1)


@pytest.mark.parametrize("name", [name for name in shipped_recipes() if name.startswith("k400")])
def test_kinetics_recipes_run_on_1_to_64_gpus(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.data.videos is not None
    plan = make_plan(recipe, recipe.data.videos)
    for gpus in (1, 2, 4, 8, 16, 32, 64):
        check_world(plan, gpus)
        check_micro_batches(recipe, plan, gpus)


@pytest.mark.parametrize("name", [name for name in shipped_recipes() if name.startswith("demo")])
def test_the_demo_runs_on_1_2_and_4_processes(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.data.videos is not None
    for processes in (1, 2, 4):
        check_world(make_plan(recipe, recipe.data.videos), processes)
