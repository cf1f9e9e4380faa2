"""Augmentation of single clips: each does what it says, alike in all frames of a clip."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from operations import Operations
from torch import Tensor
from torchvision.transforms.v2 import functional

from mgtrain.clips.augment import (
    BLACK,
    GREY,
    WHITE,
    box_rows,
    colour_rows,
    erase,
    erase_rows,
    inside,
    jitter_colour,
    normalize,
    rand_augment,
    sent,
)
from mgtrain.recipe import Augment

TWO_OPS = Augment(rand_augment=2)
ALL_COLOURS = Augment(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1)


def still(frames: int = 3, size: int = 24, low: int = 0, high: int = 256) -> np.ndarray:
    """A clip uint8 (T, S, S, 3) whose frames are all the same noise."""
    frame = np.random.default_rng(0).integers(low, high, (size, size, 3), np.uint8)
    return np.repeat(frame[None], frames, axis=0)


def as_batch(*clips: np.ndarray) -> Tensor:
    """Normalized (B, 3, T, S, S), in the memory format of the loader's batches."""
    return normalize(torch.from_numpy(np.stack(clips)).permute(0, 4, 1, 2, 3), torch.channels_last_3d)


def as_pixels(x: Tensor) -> np.ndarray:
    """Back to 0..255, unrounded: (B, T, S, S, 3)."""
    return ((x - BLACK) / (WHITE - BLACK) * 255).permute(0, 2, 3, 4, 1).numpy()


def draws(**at: float) -> np.ndarray:
    """The draws (1, 4) of one clip: in the middle, which changes nothing, but for those given."""
    return np.array([[at.get(name, 0.5) for name in ("brightness", "contrast", "saturation", "hue")]])


def jittered(x: Tensor, draws: np.ndarray, augment: Augment) -> Tensor:
    return jitter_colour(x, sent({"colour": colour_rows(draws, augment)}, x.device)["colour"])


def boxed(x: Tensor, draws: np.ndarray, probability: float) -> Tensor:
    return erase(x, sent({"erase": erase_rows(draws, probability, x.shape[-1])}, x.device)["erase"])


def test_rand_augment_depends_on_seed_and_position_alone() -> None:
    clip = still()
    torch.manual_seed(1)
    one = [rand_augment(clip, TWO_OPS, 0, position) for position in range(20)]
    torch.manual_seed(2)
    again = [rand_augment(clip, TWO_OPS, 0, position) for position in reversed(range(20))][::-1]
    other = [rand_augment(clip, TWO_OPS, 1, position) for position in range(20)]
    assert all(np.array_equal(a, b) for a, b in zip(one, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))
    assert len({a.tobytes() for a in one}) > 10
    assert {(a.shape, a.dtype) for a in one} == {(clip.shape, clip.dtype)}


def test_rand_augment_changes_all_frames_alike() -> None:
    for position in range(40):
        clip = rand_augment(still(frames=10), TWO_OPS, 0, position)
        assert np.array_equal(clip, np.repeat(clip[:1], 10, axis=0))


def test_rand_augment_leaves_torchs_generator_as_it_was() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    rand_augment(still(), TWO_OPS, 0, 0)
    assert torch.equal(torch.rand(3), expected)


def test_rand_augment_is_the_same_with_any_number_of_threads() -> None:
    clip = np.random.default_rng(1).integers(0, 256, (8, 96, 96, 3), np.uint8)
    one = [rand_augment(clip, TWO_OPS, 0, position) for position in range(12)]
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        two = [rand_augment(clip, TWO_OPS, 0, position) for position in range(12)]
    finally:
        torch.set_num_threads(threads)
    assert all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))


def test_without_operations_a_clip_is_left_alone() -> None:
    clip = still()
    assert rand_augment(clip, Augment(), 0, 0) is clip


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("brightness", functional.adjust_brightness),
        ("contrast", functional.adjust_contrast),
        ("saturation", functional.adjust_saturation),
    ],
)
@pytest.mark.parametrize("draw", [0.0, 0.2, 0.9, 1.0])
def test_colours_change_as_torchvision_changes_them(name: str, change: object, draw: float) -> None:
    assert callable(change)
    clip = still(low=100, high=150)
    x = jittered(as_batch(clip), draws(**{name: draw}), Augment(**{name: 0.5}))
    expected = change(torch.from_numpy(clip).permute(0, 3, 1, 2), 1 + 0.5 * (2 * draw - 1)).permute(0, 2, 3, 1)
    assert np.abs(as_pixels(x)[0] - expected.numpy()).max() <= 1.5  # it rounds down, twice


def test_hue_turns_at_constant_luma_and_leaves_greys() -> None:
    clip = still(low=100, high=150)
    x = as_batch(clip)
    turned = jittered(x, draws(hue=1.0), Augment(hue=0.25))
    assert as_pixels(turned) @ GREY == pytest.approx(as_pixels(x) @ GREY, abs=0.01)
    assert (turned - x).abs().max() > 0.1
    assert jittered(turned, draws(hue=0.0), Augment(hue=0.25)) == pytest.approx(x, abs=1e-4)
    grey = as_batch(np.repeat(clip[..., :1], 3, axis=-1))
    assert jittered(grey, draws(hue=1.0), Augment(hue=0.25)) == pytest.approx(grey, abs=1e-5)


def test_colours_change_alike_in_all_frames_and_by_each_clips_draws() -> None:
    x = as_batch(*[still()] * 4)
    changed = jittered(x, np.random.default_rng(0).random((4, 4)), ALL_COLOURS)
    assert torch.equal(changed, changed[:, :, :1].expand_as(changed))
    assert len({clip.numpy().tobytes() for clip in changed}) == 4
    assert changed.is_contiguous(memory_format=torch.channels_last_3d)
    assert BLACK <= changed.min() <= changed.max() <= WHITE


def test_draws_in_the_middle_change_nothing() -> None:
    x = as_batch(still())
    assert jittered(x, draws(), ALL_COLOURS) == pytest.approx(x, abs=1e-5)


def test_the_same_box_is_erased_in_all_frames() -> None:
    x = as_batch(*[still(size=40, high=100)] * 50)
    erased = boxed(x.clone(), np.random.default_rng(0).random((50, 5)), probability=0.6)
    gone = (erased == 0).numpy()  # (B, 3, T, S, S); no pixel of the clips is
    assert np.array_equal(gone, np.broadcast_to(gone[:, :1, :1], gone.shape))
    assert torch.equal(erased[~gone], x[~gone])
    shares = gone.mean((1, 2, 3, 4))
    assert 20 <= np.count_nonzero(shares) <= 40
    for mask, share in zip(gone[:, 0, 0], shares, strict=True):
        rows, columns = mask.any(1), mask.any(0)
        assert np.array_equal(mask, rows[:, None] & columns)
        assert share == 0 or 0.01 < share < 0.36  # 0.02 to 0.33 of the frame, in whole pixels


def test_nothing_or_all_is_erased_at_the_ends_of_the_probability() -> None:
    numbers = np.random.default_rng(0).random((9, 5))
    clips = [still(high=100)] * 9
    assert torch.equal(boxed(as_batch(*clips), numbers, probability=0), as_batch(*clips))
    assert (boxed(as_batch(*clips), numbers, probability=1) == 0).any((1, 2, 3, 4)).all()


def test_a_box_is_cut_off_at_the_frame() -> None:
    first, last = np.array([[-0.5, 0.25]]), np.array([[0.5, 0.8]])
    assert (
        inside(torch.from_numpy(box_rows(first, last, 4)), size=4)[0, 0, 0].int().tolist()
        == [[0, 1, 1, 0]] * 2 + [[0, 0, 0, 0]] * 2
    )


def test_all_rows_go_to_the_device_together() -> None:
    given = {"one": np.random.default_rng(0).random((5, 4)), "two": np.arange(10.0).reshape(5, 2)}
    with Operations() as operations:
        there = sent(given, torch.device("meta"))
    assert [tuple(rows.shape) for rows in there.values()] == [(5, 4), (5, 2)]
    assert operations.names.count("_to_copy") == 1
    for name, rows in sent(given, torch.device("cpu")).items():
        assert np.array_equal(rows.numpy(), given[name].astype(np.float32))
    assert sent({}, torch.device("meta")) == {}


def test_a_larger_magnitude_changes_more() -> None:
    from mgtrain.clips.augment import rand_augment

    clip = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    weak, strong = (
        np.mean(
            [
                np.abs(rand_augment(clip, Augment(rand_augment=1, magnitude=m), 0, n) - clip.astype(int)).mean()
                for n in range(40)
            ]
        )
        for m in (1, 30)
    )
    assert weak < 0.8 * strong
