"""The endless numbered stream of clips: epochs are permutations, steps are intervals, ranks have contiguous shares."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain

import pytest

from mgtrain.clips.order import ClipRequest, epoch_order, step_requests, video_at
from mgtrain.recipe import Recipe
from mgtrain.schedule import Plan, make_plan

VIDEOS = 24
SEED = 3


@pytest.fixture
def plan(tiny: Callable[..., Recipe]) -> Plan:
    return make_plan(tiny(), VIDEOS)


def test_every_epoch_is_a_permutation_of_the_videos() -> None:
    epochs = [[video_at(c, VIDEOS, SEED) for c in range(e * VIDEOS, (e + 1) * VIDEOS)] for e in range(5)]
    assert all(sorted(epoch) == list(range(VIDEOS)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 5
    assert epochs[2] == epoch_order(SEED, 2, VIDEOS).tolist()


def test_another_seed_is_another_order() -> None:
    assert epoch_order(0, 0, VIDEOS).tolist() != epoch_order(1, 0, VIDEOS).tolist()


def test_the_order_is_the_same_on_every_machine() -> None:
    # Written down on 2026-11-24 with numpy 2: resuming elsewhere must not change it.
    assert epoch_order(0, 0, 8).tolist() == [3, 6, 4, 0, 7, 5, 2, 1]
    assert epoch_order(0, 1, 8).tolist() == [0, 7, 6, 3, 2, 5, 4, 1]


def test_the_steps_cover_the_stream_without_gap_or_overlap(plan: Plan) -> None:
    positions = [request.position for step in plan for request in step_requests(step, VIDEOS, SEED)]
    assert positions == list(range(plan.totals().clips))


def test_a_step_may_straddle_epochs(plan: Plan) -> None:
    first = step_requests(plan[0], VIDEOS, SEED)  # 64 clips of 24 videos: epochs 0, 1 and a part of 2
    assert len(first) == 64
    assert [request.video for request in first] == [
        *epoch_order(SEED, 0, VIDEOS), *epoch_order(SEED, 1, VIDEOS), *epoch_order(SEED, 2, VIDEOS)[:16]
    ]  # fmt: skip
    second = step_requests(plan[1], VIDEOS, SEED)
    assert [request.video for request in second][:8] == epoch_order(SEED, 2, VIDEOS)[16:].tolist()


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_shares_of_all_ranks_are_the_step_of_one_rank(plan: Plan, ranks: int) -> None:
    for step in plan:
        shares = [step_requests(step, VIDEOS, SEED, rank, ranks) for rank in range(ranks)]
        assert {len(share) for share in shares} == {step.shape.clips // ranks}
        assert [*chain.from_iterable(shares)] == step_requests(step, VIDEOS, SEED)


def test_a_request_carries_the_grid_of_its_step(plan: Plan) -> None:
    last = plan[len(plan) - 1]
    assert step_requests(last, VIDEOS, SEED)[0] == ClipRequest(
        video_at(last.first_clip, VIDEOS, SEED), last.first_clip, last.grid
    )
    assert (last.grid.frames, last.grid.crop) == (8, 32)
