"""The loader: the same clips whichever worker, rank or resumed process makes them; broken videos are replaced."""

from __future__ import annotations

import logging
import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mgtrain.clips.units as units
from mgtrain.clips.loader import (
    UNITS_PER_WORKER,
    BadVideos,
    recalibration_batches,
    train_batches,
    view_batches,
    worker_count,
)
from mgtrain.clips.order import ClipRequest, Order, step_requests
from mgtrain.clips.units import REPLACEMENTS, Loaded, RandomClips, Source, evaluation_grid
from mgtrain.data import open_videos
from mgtrain.data.videos import Videos
from mgtrain.errors import DataError
from mgtrain.grid import Grid
from mgtrain.processes.distributed import World
from mgtrain.recipe import Recipe
from mgtrain.rng import Draw, generator
from mgtrain.schedule import make_plan

Batch = tuple[Tensor, Tensor]
STEPS = 9  # reach into the fourth phase


class Units(BadVideos):
    """Keeps count of the clips of each unit that a worker sends."""

    def __init__(self) -> None:
        super().__init__(videos=1, max_fraction=0)
        self.clips: list[int] = []

    def add(self, loaded: Loaded) -> None:
        self.clips.append(len(loaded.clips))
        super().add(loaded)


@pytest.fixture
def broken(motions: Path, tmp_path: Path) -> Path:
    """The data set with one training and one validation video cut short to nonsense."""
    root = Path(shutil.copytree(motions, tmp_path / "broken"))
    for split in ("train", "val"):
        (root / "videos" / split / "right_1.mp4").write_bytes(b"no video at all" * 10)
    return root


@pytest.fixture
def uneven(motions: Path, tmp_path: Path) -> Path:
    """The data set with 6, 6, 2 and 1 training videos in the four classes; the last can be read, one of 2 cannot."""
    root = Path(shutil.copytree(motions, tmp_path / "uneven"))
    few = {"up": 2, "down": 1}
    lines = (root / "train.csv").read_text().splitlines()
    kept = [line for line in lines if int(re.findall(r"_(\d+)\.", line)[0]) < few.get(Path(line).name.split("_")[0], 6)]
    (root / "train.csv").write_text("\n".join(kept))
    (root / "videos/train/up_1.mp4").write_bytes(b"no video at all" * 10)
    return root


@pytest.fixture(scope="module")
def alone(tiny: Callable[..., Recipe]) -> list[Batch]:
    """The batches of the tiny recipe, loaded in one process. Not to be changed."""
    return trained_on(tiny())


def opened(recipe: Recipe, split: str = "train") -> Videos:
    return open_videos(recipe.data.format, recipe.data.root, f"{split}.csv")


def trained_on(recipe: Recipe, start: int = 0, world: World | None = None, bad: BadVideos | None = None) -> list[Batch]:
    """The batches of the steps from `start` up to `STEPS`."""
    videos = opened(recipe)
    plan = make_plan(recipe, len(videos))
    bad = bad or BadVideos(len(videos), recipe.data.max_bad_fraction)
    batches = train_batches(videos, recipe, plan.steps(start), world or World(), bad)
    return [batch for batch, _ in zip(batches, range(start, STEPS), strict=False)]


def assert_same(ours: list[Batch], theirs: list[Batch]) -> None:
    assert [clips.shape for clips, _ in ours] == [clips.shape for clips, _ in theirs]
    for (clips, labels), (other_clips, other_labels) in zip(ours, theirs, strict=True):
        assert torch.equal(clips, other_clips)
        assert torch.equal(labels, other_labels)


def joined(shares: list[list[Batch]]) -> list[Batch]:
    """The global batches, out of what each rank has."""
    return [
        (torch.cat([clips for clips, _ in step]), torch.cat([labels for _, labels in step]))
        for step in zip(*shares, strict=True)
    ]


def test_batches_have_the_shapes_of_the_plan_and_labels_are_those_of_the_videos(
    tiny: Callable[..., Recipe], alone: list[Batch]
) -> None:
    videos, plan = opened(tiny()), make_plan(tiny(), 24)
    for step, (clips, labels) in zip(plan, alone, strict=False):
        shape, requests = step.shape, step_requests(step, Order.of(videos, tiny()))
        assert (clips.dtype, labels.dtype) == (torch.uint8, torch.int64)
        assert clips.shape == (shape.clips, 3, shape.frames, shape.crop, shape.crop)
        assert labels.shape == (shape.clips,)
        assert clips.is_contiguous(memory_format=torch.channels_last_3d)
        assert labels.tolist() == [videos.label(request.video) for request in requests]


def test_clips_of_one_step_are_cut_differently(alone: list[Batch]) -> None:
    clips, _ = alone[0]
    assert len({clip.numpy().tobytes() for clip in clips}) == len(clips)  # though videos come up to three times


@pytest.mark.parametrize(("start", "workers"), [(0, 2), (1, 0), (3, 0), (4, 2), (8, 0)])
def test_clips_are_the_same_from_any_step_on_with_any_number_of_workers(
    tiny: Callable[..., Recipe], alone: list[Batch], start: int, workers: int
) -> None:
    assert_same(trained_on(tiny(f"hardware.workers={workers}"), start), alone[start:])


@pytest.mark.parametrize(("ranks", "workers"), [(2, 0), (2, 2), (4, 0)])
def test_the_shares_of_all_ranks_are_the_batch_of_one(
    tiny: Callable[..., Recipe], alone: list[Batch], ranks: int, workers: int
) -> None:
    recipe = tiny(f"hardware.workers={workers}")
    assert_same(joined([trained_on(recipe, world=World(rank, ranks)) for rank in range(ranks)]), alone)


def test_augmented_clips_too_are_the_same_with_workers_and_on_ranks(
    tiny: Callable[..., Recipe], alone: list[Batch]
) -> None:
    words = ("augment.rand_augment=2", "data.mirrored=[[left, right]]")
    augmented = trained_on(tiny(*words))
    assert_same(trained_on(tiny(*words, "hardware.workers=2"), 4), augmented[4:])
    assert_same(joined([trained_on(tiny(*words), world=World(rank, 2)) for rank in range(2)]), augmented)
    changed = torch.cat([(x != y).flatten(1).any(1) for (x, _), (y, _) in zip(augmented, alone, strict=True)])
    assert changed.double().mean() > 0.9  # a few draw Identity twice


def rightward(clip: Tensor) -> float:
    """Pixels per frame by which a clip (3, T, S, S) moves to the right, by its gradients."""
    frames = clip.double().mean(0)  # (T, S, S)
    over_time, across = frames.diff(dim=0)[:, :, 1:-1], (frames[:-1, :, 2:] - frames[:-1, :, :-2]) / 2
    return float(-(over_time * across).sum() / across.square().sum())


def test_a_flipped_left_is_labelled_right(tiny: Callable[..., Recipe]) -> None:
    words = ("schedule.name=baseline", "clip.flip=0.5")
    mirrored, plain = trained_on(tiny(*words, "data.mirrored=[[left, 1]]")), trained_on(tiny(*words))
    turned = 0
    for (clips, labels), (_, videos_labels) in zip(mirrored, plain, strict=True):
        assert torch.equal(labels[videos_labels > 1], videos_labels[videos_labels > 1])  # up and down
        for clip, label in zip(clips[labels < 2], labels[labels < 2], strict=True):
            assert (rightward(clip) > 0) == (label == 1)
        turned += int((labels != videos_labels).sum())
    assert turned >= 3


def test_evaluations_and_recalibration_are_not_augmented(tiny: Callable[..., Recipe]) -> None:
    words = ("augment.rand_augment=2", "clip.flip=1", "data.mirrored=[[left, right]]")
    for make in (lambda r: views(r, 1, 1, World(), BadVideos(12, 0)), recalibrated_on):
        ours, theirs = make(tiny(*words)), make(tiny("clip.flip=1"))
        assert all(torch.equal(clips, others) for (clips, _), (others, _) in zip(ours, theirs, strict=True))
    (labels, others) = (torch.cat([y for _, y in views(tiny(w), 1, 1, World(), BadVideos(12, 0))]) for w in words[1:])
    assert torch.equal(labels, others)


def recalibrated_on(recipe: Recipe) -> list[Batch]:
    return list(recalibration_batches(opened(recipe), 2, recipe, World(), BadVideos(24, 0)))


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_no_worker_holds_more_than_its_part_of_a_step(tiny: Callable[..., Recipe], workers: int) -> None:
    recipe = tiny(f"hardware.workers={workers}")
    units = Units()
    batches = train_batches(opened(recipe), recipe, make_plan(recipe, 24), World(), units)
    sent = []
    for (clips, _), _ in zip(batches, range(STEPS), strict=False):
        sent.append((len(clips), units.clips))
        units.clips = []
    pieces = UNITS_PER_WORKER * max(1, workers)
    for total, sizes in sent:
        assert sum(sizes) == total
        assert max(sizes) <= -(-total // pieces)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_video_is_replaced_by_the_same_one_anywhere(
    tiny: Callable[..., Recipe], broken: Path, workers: int
) -> None:
    recipe = tiny(f"data.root={broken}", "data.max_bad_fraction=0.1", f"hardware.workers={workers}")
    videos = opened(recipe)
    plan = make_plan(recipe, len(videos))
    (bad,) = [video for video in range(len(videos)) if videos.path(video).endswith("train/right_1.mp4")]
    whole = RandomClips(videos, recipe)
    replaced = 0
    for step, (clips, labels) in zip(plan, trained_on(recipe), strict=False):
        for i, request in enumerate(step_requests(step, Order.of(videos, recipe))):
            if request.video == bad:
                draws = (generator(recipe.seed, Draw.REPLACEMENT, request.position, a) for a in range(REPLACEMENTS))
                stand_in = next(video for rng in draws if (video := int(rng.integers(len(videos)))) != bad)
                expected = whole[[ClipRequest(stand_in, request.position, request.grid)]]
                assert torch.equal(clips[i], expected.clips[0].permute(3, 0, 1, 2))
                assert labels[i] == videos.label(stand_in)
                replaced += 1
    assert replaced >= 5
    assert_same(joined([trained_on(recipe, world=World(rank, 2)) for rank in range(2)]), trained_on(recipe))


def test_balanced_clips_are_the_same_from_any_step_with_workers_and_on_ranks(
    tiny: Callable[..., Recipe], uneven: Path
) -> None:
    words = (f"data.root={uneven}", "data.balance=full", "data.max_bad_fraction=0.1")
    alone = trained_on(tiny(*words))
    counts = torch.cat([labels for _, labels in alone]).bincount()
    # The broken video's clips are replaced by ones of its class.
    assert (counts - counts.sum() / 4).abs().max() < 4
    assert_same(trained_on(tiny(*words, "hardware.workers=2"), 4), alone[4:])
    assert_same(joined([trained_on(tiny(*words), world=World(rank, 2)) for rank in range(2)]), alone)


def test_a_class_without_any_readable_video_is_replaced_by_others(tiny: Callable[..., Recipe], uneven: Path) -> None:
    (uneven / "videos/train/down_0.mp4").write_bytes(b"no video at all" * 10)
    words = (f"data.root={uneven}", "data.balance=sqrt", "data.max_bad_fraction=0.2")
    labels = torch.cat([labels for _, labels in trained_on(tiny(*words))])
    assert set(labels.tolist()) == {0, 1, 2, 3} - {opened(tiny(*words)).classes.index("down")}


def test_a_broken_video_changes_no_other_clip(tiny: Callable[..., Recipe], broken: Path, alone: list[Batch]) -> None:
    damaged = tiny(f"data.root={broken}", "data.max_bad_fraction=0.1")
    videos, plan = opened(damaged), make_plan(damaged, 24)
    for step, (clips, _), (whole, _) in zip(plan, trained_on(damaged), alone, strict=False):
        for i, request in enumerate(step_requests(step, Order.of(videos, damaged))):
            same = not videos.path(request.video).endswith("right_1.mp4")
            assert torch.equal(clips[i], whole[i]) == same


def test_a_broken_video_is_named_once_and_counted(
    tiny: Callable[..., Recipe], broken: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bad = BadVideos(videos=24, max_fraction=0.1)
    with caplog.at_level(logging.WARNING, logger="mgtrain"):
        trained_on(tiny(f"data.root={broken}"), bad=bad)
    path = str(broken / "videos/train/right_1.mp4")
    assert list(bad.causes) == [path]
    (message,) = caplog.messages
    assert message.startswith(f"video left out: {path}: ")
    assert message.endswith("; replace this video or remove it from the list")


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_broken_videos_stop_the_run(tiny: Callable[..., Recipe], broken: Path, workers: int) -> None:
    recipe = tiny(
        f"data.root={broken}", "data.max_bad_fraction=0.04", f"hardware.workers={workers}"
    )  # 1 of 24 is 0.042
    with pytest.raises(DataError) as caught:
        trained_on(recipe)
    message = str(caught.value)
    assert message.startswith("1 of 24 videos cannot be decoded, more than data.max_bad_fraction 0.04 allows; fix ")
    assert str(broken / "videos/train/right_1.mp4") in message
    assert "\n" not in message
    assert caught.value.exit_code == 3


def test_a_data_set_of_broken_videos_stops_the_run_whatever_is_allowed(
    tiny: Callable[..., Recipe], broken: Path
) -> None:
    for video in (broken / "videos/train").glob("*.mp4"):
        video.write_bytes(b"nothing")
    with pytest.raises(DataError, match="cannot be decoded"):
        trained_on(tiny(f"data.root={broken}", "data.max_bad_fraction=1"))


class KillingSource(Source):
    """Kills the process that opens one of the videos, as a fault in FFmpeg might."""

    def open(self, video: int) -> Any:
        if self.videos.name(video).endswith("right_1.mp4"):
            self._reading[0, 0], self._reading[0, 1] = os.getpid(), video + 1
            os.kill(os.getpid(), signal.SIGKILL)
        return super().open(video)


def test_a_video_that_kills_a_loader_process_is_named(
    tiny: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mgtrain.clips.units.Source", KillingSource)
    before = signal.getsignal(signal.SIGCHLD)
    with pytest.raises(DataError) as caught:
        trained_on(tiny("hardware.workers=1"))
    message = str(caught.value)
    assert re.match(
        r"a loader process died while it read \S+/train/right_1\.mp4; find .* with `mgtrain data check`", message
    )
    assert signal.getsignal(signal.SIGCHLD) == before


def test_missing_videos_are_broken_videos(tiny: Callable[..., Recipe], broken: Path) -> None:
    (broken / "videos/train/right_1.mp4").unlink()
    bad = BadVideos(videos=24, max_fraction=0.1)
    trained_on(tiny(f"data.root={broken}"), bad=bad)
    assert len(bad.causes) == 1


def views(recipe: Recipe, times: int, crops: int, world: World, bad: BadVideos) -> list[Batch]:
    videos = opened(recipe, "val")
    return list(view_batches(videos, range(world.rank, len(videos), world.size), recipe, times, crops, world, bad))


@pytest.mark.parametrize(("ranks", "workers"), [(1, 0), (1, 2), (2, 0), (5, 0)])
def test_an_evaluation_sees_every_video_once(tiny: Callable[..., Recipe], ranks: int, workers: int) -> None:
    recipe = tiny(f"hardware.workers={workers}")
    ours = [batch for rank in range(ranks) for batch in views(recipe, 1, 1, World(rank, ranks), BadVideos(12, 0))]
    clips = sorted(clip.numpy().tobytes() for batch, _ in ours for clip in batch)
    numbers = sorted(number for _, batch in ours for number in batch.tolist())
    ((one, one_numbers),) = [tuple(map(torch.cat, zip(*views(recipe, 1, 1, World(), BadVideos(12, 0)), strict=True)))]
    assert clips == sorted(clip.numpy().tobytes() for clip in one)
    assert one.shape == (12, 3, 8, 32, 32)
    assert numbers == one_numbers.tolist() == list(range(12))


def test_views_of_a_video_come_together(tiny: Callable[..., Recipe]) -> None:
    recipe = tiny()
    batches = views(recipe, 2, 3, World(), BadVideos(12, 0))
    assert [tuple(clips.shape) for clips, _ in batches] == [(6, 3, 8, 32, 32)] * 12
    assert [numbers.tolist() for _, numbers in batches] == [[n] for n in range(12)]


def test_a_broken_video_is_left_out_of_an_evaluation(tiny: Callable[..., Recipe], broken: Path) -> None:
    bad = BadVideos(videos=12, max_fraction=0.1)
    batches = views(tiny(f"data.root={broken}"), 1, 1, World(), bad)
    assert sum(len(numbers) for _, numbers in batches) == sum(len(clips) for clips, _ in batches) == 11
    assert list(bad.causes) == [str(broken / "videos/val/right_1.mp4")]
    with pytest.raises(DataError, match="1 of 12 videos cannot be decoded"):
        views(tiny(f"data.root={broken}"), 1, 1, World(), BadVideos(videos=12, max_fraction=0.01))


def test_recalibration_sees_random_clips_of_the_evaluation_grid(tiny: Callable[..., Recipe]) -> None:
    recipe = tiny()
    videos, grid = opened(recipe), evaluation_grid(recipe)
    assert grid == Grid(frames=8, crop=32, stride=(2, 2), short_side=(36, 36))

    def batches(world: World) -> Iterator[Batch]:
        return recalibration_batches(videos, 3, recipe, world, BadVideos(24, 0))

    ours = list(batches(World()))
    assert [tuple(clips.shape) for clips, _ in ours] == [(4, 3, 8, 32, 32)] * 3
    assert torch.cat([labels for _, labels in ours]).tolist() == [
        videos.label(Order.of(videos, recipe).at(position)) for position in range(12)
    ]
    assert_same(list(batches(World())), ours)
    assert_same(joined([list(batches(World(rank, 4))) for rank in range(4)]), ours)


def test_each_clip_is_cut_as_the_recipe_says(tiny: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    for name in ("cut_random", "cut_views"):
        cut = getattr(units, name)
        monkeypatch.setattr(units, name, lambda *given, cut=cut, **said: (asked.append(said), cut(*given, **said))[1])
    recipe = tiny("clip.fps=15", "clip.flip=0", "clip.inverse_uniform=true", "clip.sampling=segments")
    RandomClips(opened(recipe), recipe)[[*Order(0, 24).requests([0], Grid(4, 32, (2, 2), (32, 40)))]]
    views(recipe, 1, 1, World(), BadVideos(12, 0))
    of_views = {"fps": 15, "segments": True}
    assert (asked[0], asked[-1]) == ({**of_views, "flip": 0, "inverse_uniform": True}, of_views)


@pytest.mark.parametrize("flip", [0, 1])
def test_sure_flips_swap_all_labels_or_none(tiny: Callable[..., Recipe], flip: int) -> None:
    recipe = tiny("schedule.name=baseline", f"clip.flip={flip}", "data.mirrored=[[left, right]]")
    (_, labels), *_ = trained_on(recipe, start=8)
    videos = opened(recipe)
    expected = torch.tensor([videos.label(Order.of(videos, recipe).at(n)) for n in range(32, 36)])
    assert torch.equal(labels, torch.tensor([1, 0, 2, 3])[expected] if flip else expected)


def test_a_clip_has_the_labels_of_its_own_seconds_mirrored_if_it_is(tiny: Callable[..., Recipe], motions: Path) -> None:
    # 24 frames, 30 a second; clips span 16: none shows both the first and the last tenth of a second.
    grid, spans = Grid(8, 32, (2, 2), (32, 40)), [(0.0, 0.1), (0.7, 0.8)]
    videos = Videos.of(str(motions), [("videos/train/left_0.mp4", [0, 1])], ("a", "b", "c"), spans=spans)
    seen = []
    for flip in (0, 1):
        recipe = tiny("data.multi_label=true", "data.classes=3", f"clip.flip={flip}", "data.mirrored=[[1, 2]]")
        seen.append(RandomClips(videos, recipe)[[*Order(0, 1).requests(range(30), grid)]].labels)
    assert {tuple(row) for row in seen[0].tolist()} == {(1, 0, 0), (0, 1, 0), (0, 0, 0)}
    assert torch.equal(seen[1], seen[0][:, [0, 2, 1]])


def test_the_loader_has_a_rank_s_cores_or_half_of_them_on_a_cpu(tiny: Callable[..., Recipe]) -> None:
    def workers(kind: str, cores: int, given: str = "null") -> int:
        return worker_count(tiny(f"hardware.workers={given}"), World(device=torch.device(kind), cores=cores))

    assert [workers("cpu", 1), workers("cpu", 8), workers("cuda", 8), workers("cuda", 99)] == [1, 4, 8, 16]
    assert workers("cuda", 99, "0") == 0
