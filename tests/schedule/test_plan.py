"""The schedule against the paper and the reference, and the laws of a plan."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mgtrain.errors import PlanError
from mgtrain.grid import Shape
from mgtrain.recipe import Recipe, load_recipe
from mgtrain.schedule import Plan, baseline_recipe, check_world, make_plan

GOLDEN = json.loads((Path(__file__).parent.parent / "golden" / "plan.json").read_text())
EXPERIMENTS = [name for name in GOLDEN if name != "how"]


def multigrid(*overrides: str) -> Recipe:
    return load_recipe("k400_slowfast_8x8_r50_multigrid", overrides)


def golden_recipe(golden: dict[str, Any]) -> Recipe:
    return multigrid(
        f"clip.frames={golden['frames']}",
        f"clip.stride={golden['stride']}",
        f"clip.short_side={golden['short_side']}",
        f"batch.clips={golden['clips']}",
        f"optim.lr={golden['lr']}",
        f"optim.stages={golden['stages']}",
        "optim.warmup_epochs=0",
    )


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_phases_agree_with_the_reference(name: str) -> None:
    golden = GOLDEN[name]
    plan = make_plan(golden_recipe(golden), golden["videos"])
    *phases, last = plan.phases  # fine-tuning is one phase there and two here, at its drop of the learning rate
    assert len(phases) == len(golden["phases"])
    for phase, expected in zip(phases, golden["phases"], strict=True):
        where = f"phase {phase.index}"
        assert phase.stage == expected["stage"], where
        assert phase.shape == Shape(expected["batch_factor"] * golden["clips"], expected["frames"], expected["crop"]), (
            where
        )
        assert plan.phase_lr(phase) == pytest.approx(expected["lr"], rel=1e-12), where
        if steps := expected["steps"]:
            assert [shape.crop for shape in phase.shapes] == steps["crop"], where
            assert [shape.clips for shape in phase.shapes] == steps["clips"], where
            assert [shape.clips // phase.bn_groups for shape in phase.shapes] == steps["bn_clips"], where
            assert [list(grid.short_side) for grid in phase.grids] == steps["short_side"], where
            assert {grid.stride for grid in phase.grids} == {(golden["stride"], steps["longest_stride"])}, where
    ends = [phase.end_clip / plan.videos for phase in (*phases[:-1], last)]
    half_step = max(shape.clips for shape in plan.shapes()) / 2 / plan.videos  # steps are whole
    assert ends == pytest.approx([expected["end_epoch"] for expected in golden["phases"]], abs=max(0.01, half_step))
    assert last.steps == pytest.approx(phases[-1].steps, abs=1)
    assert plan.phase_lr(last) == pytest.approx(golden["last_lr"], rel=1e-12)


def test_learning_rates_of_kinetics() -> None:
    plan = make_plan(multigrid(), 240_000)
    assert [plan.phase_lr(phase) for phase in plan.phases] == pytest.approx(
        [0.8, 0.4, 0.2, 0.1, 0.08, 0.04, 0.02, 0.01, 0.008, 0.004, 0.002, 0.001, 0.001, 0.0001], rel=1e-12
    )


def test_headline_of_the_paper() -> None:
    """1.5x the epochs in 1/3.42 of the steps, and the baseline's own numbers."""
    plan, baseline = make_plan(multigrid(), 240_000), make_plan(baseline_recipe(multigrid()), 240_000)
    assert len(baseline) == 896_250
    assert baseline.totals().epochs == 239
    assert len(baseline) / len(plan) == pytest.approx(3.4235, rel=0.003)
    assert plan.totals().epochs == pytest.approx(358.5, abs=0.01)
    assert baseline.totals().voxels / plan.totals().voxels == pytest.approx(3.43, abs=0.01)


def test_short_cycle_alone_saves_what_its_mean_batch_gives() -> None:
    plan = make_plan(multigrid("schedule.long_cycle=[]"), 240_000)
    assert [phase.stage for phase in plan.phases] == [0, 1, 2, 3]
    assert [phase.end_clip / 240_000 for phase in plan.phases] == pytest.approx([141, 231, 294, 358.5], abs=0.01)
    assert 896_250 / len(plan) == pytest.approx((4 + 2 + 1) / 3 / 1.5, rel=1e-4)
    assert [plan.phase_lr(phase) for phase in plan.phases] == pytest.approx([0.1, 0.01, 0.001, 0.0001])


def test_long_cycle_alone_saves_what_its_mean_batch_gives() -> None:
    plan = make_plan(multigrid("schedule.short_cycle=[]"), 240_000)
    assert {len(phase.shapes) for phase in plan.phases} == {1}
    mean, long_epochs, last = (8 + 4 + 2 + 1) / 4, 94 + 60 + 42, 43
    assert 896_250 / len(plan) == pytest.approx(239 / (1.5 * 239 / (mean * long_epochs + last) * 239), rel=1e-4)
    assert plan.totals().epochs == pytest.approx(358.5, abs=0.01)


def test_short_cycle_can_be_off_in_fine_tuning() -> None:
    plan = make_plan(multigrid("schedule.fine_tune_short_cycle=false"), 240_000)
    assert [len(phase.shapes) for phase in plan.phases] == [3] * 12 + [1, 1]
    assert plan.totals().epochs == pytest.approx(358.5, abs=0.01)


def test_warm_up_rises_in_a_straight_line_to_the_scaled_learning_rate() -> None:
    plan = make_plan(multigrid(), 240_000)
    first, *_ = warm = [step for step in map(plan.__getitem__, range(0, 13_000, 500)) if step.epoch < 34]
    assert first.lr == 0.01
    assert [step.lr for step in warm] == pytest.approx([0.01 + (0.8 - 0.01) * step.epoch / 34 for step in warm])
    after = next(step for step in plan.steps(11_000) if step.epoch >= 34)
    assert plan[after.index - 1].lr == pytest.approx(0.8, abs=1e-3)
    assert after.lr == 0.8


def test_warm_up_that_ends_in_a_later_phase_aims_at_the_learning_rate_in_force_there() -> None:
    plan = make_plan(multigrid("optim.warmup_epochs=100"), 24_000)
    in_second = next(step for step in plan.steps() if step.epoch >= 99.9)
    assert in_second.phase.index == 1
    assert in_second.lr == pytest.approx(0.4, rel=0.01)


def test_cosine_falls_along_the_baselines_curve_times_the_batch_factor() -> None:
    overrides = ("optim.curve=cosine", "optim.warmup_epochs=0", "optim.end_lr=0.001")
    plan = make_plan(multigrid(*overrides), 24_000)
    assert len(plan.phases) == 13  # no drop to split the last one at
    baseline = make_plan(baseline_recipe(multigrid(*overrides)), 24_000)
    for part in (0, 0.2, 0.5, 0.9):
        step, there = plan[int(part * len(plan))], baseline[int(part * len(baseline))]
        assert step.lr == pytest.approx(there.lr * step.phase.shape.clips / 64, rel=0.01)
    assert baseline[0].lr == 0.1
    assert baseline[-1].lr == pytest.approx(0.001, abs=1e-5)


def test_the_short_cycle_never_changes_the_learning_rate() -> None:
    plan = make_plan(multigrid("optim.warmup_epochs=0"), 3_000)
    for phase in plan.phases:
        assert len({plan[i].lr for i in range(phase.first_step, phase.end_step)}) == 1


def test_lookup_agrees_with_walking() -> None:
    """Walk the phases with a counter of clips, as a loop over epochs would."""
    plan = make_plan(multigrid(), 1_000)
    clips = index = 0
    for phase in plan.phases:
        assert (phase.first_step, phase.first_clip) == (index, clips)
        for offset in range(phase.steps):
            step = plan[index]
            turn = offset % len(phase.shapes)
            assert (step.index, step.phase, step.shape, step.grid) == (
                index,
                phase,
                phase.shapes[turn],
                phase.grids[turn],
            )
            assert (step.first_clip, step.epoch) == (clips, clips / 1_000)
            clips, index = clips + step.shape.clips, index + 1
    assert (len(plan), plan.totals().clips) == (index, clips)
    assert plan.totals().voxels == sum(step.shape.voxels for step in plan)
    assert [step.index for step in plan.steps(index - 3)] == [index - 3, index - 2, index - 1]


def test_no_phase_is_lost_however_few_the_videos() -> None:
    """The reference rounds to whole epochs and runs zero steps of its coarsest phases with 1,000 videos."""
    for videos in (1, 10, 100, 1_000):
        plan = make_plan(multigrid(), videos)
        assert len(plan.phases) == 14
        assert all(phase.steps >= 1 for phase in plan.phases)


def test_milestones_are_equal_shares_whatever_the_phases() -> None:
    plan, rival = make_plan(multigrid(), 1_000), make_plan(multigrid("schedule={name: baseline}"), 1_000)
    assert plan.milestones(1) == (len(plan),)
    assert plan.milestones(4) == (271, 542, 814, 1085)
    assert len(rival.milestones(4)) == 4
    assert plan.milestones(10_000) == tuple(range(1, len(plan) + 1))  # at most one after each step


def test_shapes_are_those_that_steps_have() -> None:
    plan = make_plan(multigrid(), 1_000)
    assert list(plan.shapes()) == list(dict.fromkeys(step.shape for step in plan))
    assert len(plan.shapes()) == 8


def test_fingerprints_tell_plans_apart() -> None:
    plans = [make_plan(multigrid(*o), 1_000) for o in ((), ("optim.lr=0.2",), ("clip.stride=4",), ("optim.gamma=0.2",))]
    assert len({plan.fingerprint() for plan in plans}) == 4
    assert (
        make_plan(multigrid(), 1_000).fingerprint()
        == plans[0].fingerprint()
        != make_plan(multigrid(), 999).fingerprint()
    )
    # That of the first checkpoints: whoever adds a key must not change it, or they could not be resumed.
    recipe = load_recipe("k400_slowfast_8x8_r50_multigrid")
    assert make_plan(recipe, 240_000).fingerprint() == "2a03cd4b2dd3a50c"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["batch.clips=12"], r"batches of 12 clips cannot be split into BatchNorm groups of 8 clips; make batch.clips"),
        (["optim.stages=[10]"], r"a long cycle needs at least two learning-rate stages"),
        (
            ["optim.stages=[10, 5, 4, 3]"],
            r"warmup_epochs 34 is not less than the run's 33 epochs; lower it, too",
        ),
    ],
)
def test_schedules_that_cannot_be_carried_out_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        make_plan(multigrid(*overrides), 1_000)


def test_numbers_of_gpus_that_cannot_share_a_step_are_refused() -> None:
    plan = make_plan(multigrid(), 1_000)
    for ranks in (1, 2, 4, 8, 16, 32, 64):
        check_world(plan, ranks)
    with pytest.raises(
        PlanError, match="phase 1 has steps of 1024 clips, which 3 GPUs cannot share equally; use a number"
    ):
        check_world(plan, 3)
    odd = make_plan(multigrid("batch.clips=24", "batch.bn_clips=8"), 1_000)
    with pytest.raises(PlanError, match="phase 3 has steps of 6 BatchNorm groups, which 4 GPUs cannot share"):
        check_world(odd, 4)


@pytest.mark.parametrize("mix", ["mixup", "cutmix"])
def test_numbers_of_gpus_that_part_pairs_to_be_mixed_are_refused(mix: str) -> None:
    plan = make_plan(multigrid(f"augment.{mix}=0.2"), 1_000)
    for ranks in (1, 2, 4, 8, 16, 32):
        check_world(plan, ranks)
    with pytest.raises(PlanError, match=r"phase 4 has steps of 64 clips, 1 on each of 64 GPUs, but augment\.mixup"):
        check_world(plan, 64)
    alone = make_plan(multigrid(f"augment.{mix}=0.2", "batch.clips=7", "batch.bn_clips=7"), 1_000)
    with pytest.raises(PlanError, match=r"7 clips, 7 on each of 1 GPUs, but .* pairs; choose batch\.clips and"):
        check_world(alone, 1)


@settings(deadline=None, max_examples=60)
@given(
    clips=st.integers(1, 40).map(lambda n: 8 * n),
    frames=st.integers(4, 64),
    crop=st.integers(16, 320),
    stages=st.lists(st.floats(0.5, 60), min_size=2, max_size=5),
    factor=st.floats(0.25, 3),
    long=st.lists(st.tuples(st.floats(0.1, 1), st.floats(0.2, 1)), min_size=1, max_size=5),
    short=st.lists(st.floats(0.2, 1), max_size=3),
    videos=st.integers(500, 300_000),
)
def test_any_recipe_plans(
    clips: int,
    frames: int,
    crop: int,
    stages: list[float],
    factor: float,
    long: list[tuple[float, float]],
    short: list[float],
    videos: int,
) -> None:
    recipe = multigrid(
        f"clip={{frames: {frames}, stride: 2, crop: {crop}, short_side: [{crop}, {crop + 50}]}}",
        f"batch.clips={clips}",
        f"optim.stages={stages}",
        f"schedule.epoch_factor={factor}",
        f"schedule.long_cycle={[list(pair) for pair in sorted(long, key=lambda pair: pair[0] * pair[1] ** 2)]}",
        f"schedule.short_cycle={short}",
        "optim.warmup_epochs=0",
    )
    plan: Plan = make_plan(recipe, videos)
    assert len(plan.phases) == (len(stages) - 1) * len(long) + 2
    assert all(a.end_step == b.first_step and a.end_clip == b.first_clip for a, b in pairwise(plan.phases))
    epochs, largest = plan.totals().epochs, max(shape.clips for shape in plan.shapes())
    # Off by less than the largest step for the rounding of each end, and for phases raised to one step. The number of
    # steps follows a cycle's mean, so a phase shorter than its cycle may lack the larger steps of the cycle's end.
    short_phases = [phase for phase in plan.phases if phase.steps < len(phase.shapes)]
    lacking = sum(max(0, max(shape.clips for shape in phase.shapes) - largest) for phase in short_phases)
    assert abs(epochs - factor * sum(stages)) <= ((len(plan.phases) + 1) * largest + lacking) / videos
    step = plan[len(plan) // 2]
    assert 1 <= step.grid.stride[0] <= step.grid.stride[1]
    assert step.grid.crop <= step.grid.short_side[0] + 1 <= step.grid.short_side[1] + 1


@pytest.mark.parametrize(
    ("scaling", "first_phase", "fourth_phase"),
    [
        ("long", [0.8, 0.8, 0.8], [0.1, 0.1, 0.1]),
        ("both", [1.6, 0.8, 0.8], [0.4, 0.2, 0.1]),
        ("none", [0.1, 0.1, 0.1], [0.1, 0.1, 0.1]),
    ],
)
def test_the_learning_rate_follows_the_cycles_that_are_named(
    scaling: str, first_phase: list[float], fourth_phase: list[float]
) -> None:
    plan = make_plan(multigrid(f"schedule.lr_scaling={scaling}", "optim.warmup_epochs=0"), 240_000)
    for phase, expected in ((plan.phases[0], first_phase), (plan.phases[3], fourth_phase)):
        first = phase.first_step
        assert [plan[step].lr for step in range(first, first + 3)] == pytest.approx(expected)
    usual = make_plan(multigrid("optim.warmup_epochs=0"), 240_000)
    assert (plan.fingerprint() == usual.fingerprint()) is (scaling == "long")
    assert plan.totals() == usual.totals()
    warm = make_plan(multigrid(f"schedule.lr_scaling={scaling}"), 240_000)
    end = next(step for step in range(len(warm)) if warm[step].epoch >= 34)
    assert warm[end - 3].lr == pytest.approx(plan[end - 3].lr, rel=0.01)  # it rises to the rate in force


def test_batchnorm_groups_may_keep_their_size_within_the_short_cycle() -> None:
    usual, equal = (make_plan(multigrid(f"schedule.bn_groups={groups}"), 240_000) for groups in ("long", "both"))
    for phase, same in zip(usual.phases, equal.phases, strict=True):
        assert {shape.clips // groups for shape, groups in same.batches()} == {8}
        assert [shape.clips // groups for shape, groups in phase.batches()] == [
            8 * shape.clips // phase.shape.clips for shape in phase.shapes
        ]
        for offset, (shape, groups) in enumerate(same.batches()):
            assert equal[same.first_step + offset].bn_groups == groups == shape.clips // 8
    assert equal.fingerprint() != usual.fingerprint()
    assert equal.totals() == usual.totals()
    for plan in (usual, equal):
        fewest = plan.fewest_groups()
        assert fewest.keys() == set(plan.shapes())
        steps = [step for phase in plan.phases for step in plan[phase.first_step : phase.first_step + 3]]
        assert all(min(s.bn_groups for s in steps if s.shape == shape) == groups for shape, groups in fewest.items())
    with pytest.raises(PlanError, match="6 clips cannot be split into BatchNorm groups of 4 clips"):
        make_plan(
            multigrid("schedule={name: multigrid, bn_groups: both, long_cycle: []}", "batch={clips: 3, bn_clips: 4}"),
            999,
        )


def test_the_learning_rate_may_grow_as_the_root_of_the_batch() -> None:
    linear, root = (
        make_plan(multigrid("optim.warmup_epochs=0", f"optim.scaling={scaling}"), 240_000)
        for scaling in ("linear", "sqrt")
    )
    factors = [root.phase_lr(b) / linear.phase_lr(a) for a, b in zip(linear.phases, root.phases, strict=True)]
    assert factors[:4] == pytest.approx([8**-0.5, 4**-0.5, 2**-0.5, 1])
    assert root.fingerprint() != linear.fingerprint()


def test_without_fine_tuning_every_stage_has_a_long_cycle() -> None:
    plan = make_plan(multigrid("schedule.fine_tune=false"), 240_000)
    assert [phase.shape for phase in plan.phases] == [phase.shape for phase in plan.phases[:4]] * 4
    assert [phase.lr_stage for phase in plan.phases] == [stage for stage in range(4) for _ in range(4)]
    assert plan.totals().epochs == pytest.approx(358.5, abs=0.01)
    short = multigrid("schedule.fine_tune=false", "optim.stages=[10]", "optim.warmup_epochs=0")
    assert len(make_plan(short, 1000).phases) == 4


@pytest.mark.parametrize("start", [0, 1, 5, 16])
def test_the_kinds_of_steps_that_are_left_are_those_of_the_steps(start: int, tiny: Callable[..., Recipe]) -> None:
    plan = make_plan(tiny(), 24)
    walked = list(plan.steps(start))
    found = plan.kinds(start)
    assert {kind: count for kind, (_, count) in found.items()} == Counter((s.shape, s.bn_groups) for s in walked)
    for kind, (step, _) in found.items():
        assert step == next(one for one in walked if (one.shape, one.bn_groups) == kind)


def test_a_cosine_may_grow_as_the_root_of_the_batch_and_warms_up_to_its_own_curve() -> None:
    words = ("optim.curve=cosine", "optim.scaling=sqrt", "optim.warmup_epochs=34")
    plan, unwarmed = (
        make_plan(multigrid(*words), 24_000),
        make_plan(multigrid(*words[:2], "optim.warmup_epochs=0"), 24_000),
    )
    assert unwarmed[0].lr == pytest.approx(0.1 * 8**0.5)
    end = next(step for step in plan.steps() if step.epoch >= 34)
    assert end.lr == unwarmed[end.index].lr < unwarmed[0].lr
    last = plan[end.index - 1]
    assert last.lr == pytest.approx(0.01 + (end.lr - 0.01) * last.epoch / 34, rel=1e-4)


def test_the_root_holds_for_the_short_cycle_too() -> None:
    plan = make_plan(multigrid("schedule.lr_scaling=both", "optim.scaling=sqrt", "optim.warmup_epochs=0"), 240_000)
    assert [plan[n].lr for n in range(3)] == pytest.approx([0.1 * 16**0.5, 0.1 * 8**0.5, 0.1 * 8**0.5])


def test_ranks_must_share_the_batches_of_recalibration() -> None:
    coarse = make_plan(multigrid("schedule.long_cycle=[[0.25, 1.0]]", "schedule.short_cycle=[]"), 1_000)
    with pytest.raises(PlanError, match="recalibration has batches of 64 clips, which 128 GPUs cannot share"):
        check_world(coarse, 128)
