"""The endless numbered stream of clips: epochs are permutations, steps are intervals, ranks have contiguous shares."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mgtrain.clips.order import ClipRequest, Order, step_requests
from mgtrain.data.videos import Videos
from mgtrain.errors import RecipeError
from mgtrain.recipe import Recipe
from mgtrain.rng import Draw, generator
from mgtrain.schedule import Plan, make_plan

VIDEOS = 24
SEED = 3
ORDER = Order(SEED, VIDEOS)


@pytest.fixture
def plan(tiny: Callable[..., Recipe]) -> Plan:
    return make_plan(tiny(), VIDEOS)


def test_every_epoch_is_a_permutation_of_the_videos() -> None:
    epochs = [[ORDER.at(c) for c in range(e * VIDEOS, (e + 1) * VIDEOS)] for e in range(5)]
    assert all(sorted(epoch) == list(range(VIDEOS)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 5
    assert epochs[2] == ORDER.epoch(2).tolist()


def test_another_seed_is_another_order() -> None:
    assert Order(0, VIDEOS).epoch(0).tolist() != Order(1, VIDEOS).epoch(0).tolist()


def test_the_order_is_the_same_on_every_machine() -> None:
    # Written down on 2026-11-24 with numpy 2: resuming elsewhere must not change it.
    assert Order(0, 8).epoch(0).tolist() == [3, 6, 4, 0, 7, 5, 2, 1]
    assert Order(0, 8).epoch(1).tolist() == [0, 7, 6, 3, 2, 5, 4, 1]


def test_the_steps_cover_the_stream_without_gap_or_overlap(plan: Plan) -> None:
    positions = [request.position for step in plan for request in step_requests(step, ORDER)]
    assert positions == list(range(plan.totals().clips))


def test_a_step_may_straddle_epochs(plan: Plan) -> None:
    first = step_requests(plan[0], ORDER)  # 64 clips of 24 videos: epochs 0, 1 and a part of 2
    assert len(first) == 64
    assert [request.video for request in first] == [
        *ORDER.epoch(0), *ORDER.epoch(1), *ORDER.epoch(2)[:16]
    ]  # fmt: skip
    second = step_requests(plan[1], ORDER)
    assert [request.video for request in second][:8] == ORDER.epoch(2)[16:].tolist()


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_shares_of_all_ranks_are_the_step_of_one_rank(plan: Plan, ranks: int) -> None:
    for step in plan:
        shares = [step_requests(step, ORDER, rank, ranks) for rank in range(ranks)]
        assert {len(share) for share in shares} == {step.shape.clips // ranks}
        assert [*chain.from_iterable(shares)] == step_requests(step, ORDER)


def test_a_request_carries_the_grid_of_its_step(plan: Plan) -> None:
    last = plan[len(plan) - 1]
    assert step_requests(last, ORDER)[0] == ClipRequest(ORDER.at(last.first_clip), last.first_clip, last.grid)
    assert (last.grid.frames, last.grid.crop) == (8, 32)


def counted(order: Order, labels: np.ndarray, epoch: int) -> np.ndarray:
    """Places of each class in an epoch."""
    return np.bincount(labels[order.epoch(epoch)], minlength=labels.max() + 1)


LABELS = np.repeat([0, 1, 3], [36, 9, 4])[generator(0, Draw.CHOICE).permutation(49)]  # class 2 has no videos


def test_balanced_classes_have_the_shares_that_the_documentation_states() -> None:
    # 49 places by the square roots 6, 3, 2 (of 11); and equally among the 3 classes that have videos.
    for balance, parts in {"sqrt": [6 / 11, 3 / 11, 0, 2 / 11], "full": [1 / 3, 1 / 3, 0, 1 / 3]}.items():
        order, total, shares = Order(SEED, 49, balance, LABELS), np.zeros(4), 49 * np.array(parts)
        for epoch in range(200):
            counts = counted(order, LABELS, epoch)
            total += counts
            assert counts.sum() == 49
            assert (abs(counts - shares) < 2).all()
            assert (abs(total - (epoch + 1) * shares) < 1).all()


def test_classes_of_equal_shares_in_whole_numbers_have_exactly_these() -> None:
    labels = np.repeat([0, 1, 2, 3], [25, 1, 4, 10])
    order = Order(SEED, 40, "full", labels)
    assert all(counted(order, labels, epoch).tolist() == [10] * 4 for epoch in range(20))
    epoch = order.epoch(0).tolist()
    assert epoch.count(25) == 10  # the only video of its class
    assert all(epoch.count(video) in (2, 3, 4) for video in range(26, 30))


@given(
    st.lists(st.integers(0, 60), min_size=1, max_size=12).filter(any),
    st.sampled_from(["sqrt", "full"]),
    st.integers(0, 10**6),
)
def test_whatever_the_classes_an_epoch_keeps_its_length_and_the_law(sizes: list[int], balance: str, epoch: int) -> None:
    labels = np.repeat(np.arange(len(sizes)), sizes)
    shares = np.sqrt(sizes) if balance == "sqrt" else np.array(sizes) > 0
    counts = counted(Order(0, len(labels), balance, labels), labels, epoch)
    assert counts.sum() == len(labels)
    assert (abs(counts - len(labels) * shares[: len(counts)] / shares.sum()) < 2).all()


@pytest.mark.parametrize("balance", ["sqrt", "full"])
def test_no_video_of_a_class_comes_again_before_all_have_come(balance: str) -> None:
    order = Order(SEED, 49, balance, LABELS)
    seen = np.zeros(49, int)
    for epoch in range(30):
        seen += np.bincount(order.epoch(epoch), minlength=49)
        for label in (0, 1, 3):
            assert np.ptp(seen[label == LABELS]) <= 1
    assert seen.min() > 0
    # Which videos of a class are ahead after an epoch is drawn: it differs between epochs and seeds.
    firsts = (Order(seed, 49, balance, LABELS).epoch(0) for seed in range(5))
    assert len({tuple(sorted(first[LABELS[first] == 0].tolist())) for first in firsts}) == 5


def test_balanced_clips_are_mixed_within_an_epoch() -> None:
    # Of 400 places, 200 of either class: any stretch of 100 has about 50 of the rare one (hypergeometric, sd 4.3).
    labels = np.repeat([0, 1], [390, 10])
    order = Order(SEED, 400, "full", labels)
    counts = np.array([labels[order.epoch(epoch)].reshape(4, 100).sum(1) for epoch in range(25)])
    assert abs(counts - 50).max() < 25
    assert counts.std() == pytest.approx(4.34, rel=0.25)


def test_a_balanced_order_is_the_same_on_every_machine_and_in_any_order_of_asking() -> None:
    # Written down on 2026-11-28 with numpy 2: resuming elsewhere must not change it.
    order = Order(0, 8, "full", np.array([0, 0, 0, 0, 0, 0, 1, 1]))
    later = order.at(8 * 1000 + 3)
    assert order.epoch(0).tolist() == [3, 6, 6, 5, 7, 7, 0, 1]
    assert order.epoch(1).tolist() == [2, 7, 6, 2, 3, 7, 6, 4]
    assert Order(0, 8, "full", np.array([0, 0, 0, 0, 0, 0, 1, 1])).at(8 * 1000 + 3) == later


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_share_balanced_steps(plan: Plan, ranks: int) -> None:
    order = Order(SEED, VIDEOS, "full", np.repeat([0, 1], [20, 4]))
    for step in plan:
        shares = [step_requests(step, order, rank, ranks) for rank in range(ranks)]
        assert [*chain.from_iterable(shares)] == step_requests(step, order)


def test_a_recipe_without_balance_has_the_order_it_always_had(tiny: Callable[..., Recipe]) -> None:
    videos = Videos.of("", [(f"{n}.mp4", int(n > 5)) for n in range(8)], ("a", "b"))
    assert Order.of(videos, tiny("seed=0")).epoch(0).tolist() == [3, 6, 4, 0, 7, 5, 2, 1]
    balanced = Order.of(videos, tiny("seed=0", "data.balance=full")).epoch(0)
    assert np.bincount((balanced > 5).astype(int)).tolist() == [4, 4]


def test_balance_takes_one_label_per_video(tiny: Callable[..., Recipe]) -> None:
    with pytest.raises(RecipeError, match=r"data: balance needs one label per video; set it to none with multi_label"):
        tiny("data.balance=sqrt", "data.multi_label=true")
