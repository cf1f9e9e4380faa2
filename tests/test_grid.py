"""Shapes and grids: the paper's own numbers."""

from __future__ import annotations

import pytest

from mgtrain.grid import Grid, Shape, coarsen, short_cycle, train_grid

BASE = Shape(clips=64, frames=32, crop=224)
PAPER_LONG_CYCLE = [(0.25, 0.7071), (0.5, 0.7071), (0.5, 1), (1, 1)]
PAPER_SHORT_CYCLE = (0.5, 0.7071)


def test_long_cycle_shapes_of_the_paper() -> None:
    assert [coarsen(BASE, t, s) for t, s in PAPER_LONG_CYCLE] == [
        Shape(512, 8, 158),
        Shape(256, 16, 158),
        Shape(128, 16, 224),
        Shape(64, 32, 224),
    ]


def test_short_cycle_shapes_of_the_papers_figure() -> None:
    """Factors of B in the authors' figure: 16/8/8, 8/4/4, 8/4/2, 4/2/1."""
    cycles = [short_cycle(coarsen(BASE, t, s), BASE, PAPER_SHORT_CYCLE) for t, s in PAPER_LONG_CYCLE]
    assert [[shape.clips // 64 for shape in cycle] for cycle in cycles] == [[16, 8, 8], [8, 4, 4], [8, 4, 2], [4, 2, 1]]
    assert [[shape.crop for shape in cycle] for cycle in cycles] == [[112, 158, 158]] * 2 + [[112, 158, 224]] * 2


def test_short_cycle_ends_on_the_long_cycle_shape() -> None:
    for time, space in PAPER_LONG_CYCLE:
        shape = coarsen(BASE, time, space)
        assert short_cycle(shape, BASE, PAPER_SHORT_CYCLE)[-1] == shape
        assert short_cycle(shape, BASE, ()) == (shape,)


def test_short_cycle_is_never_finer_than_its_long_cycle_shape() -> None:
    half = coarsen(BASE, 1, 0.4)
    assert {shape.crop for shape in short_cycle(half, BASE, (0.5, 0.7071))} == {half.crop}


@pytest.mark.parametrize("base", [BASE, Shape(16, 64, 224), Shape(8, 8, 112), Shape(24, 20, 100)])
def test_volume_is_constant_up_to_rounding(base: Shape) -> None:
    for time, space in PAPER_LONG_CYCLE:
        for shape in short_cycle(coarsen(base, time, space), base, PAPER_SHORT_CYCLE):
            assert shape.voxels == pytest.approx(base.voxels, rel=0.06), f"{shape} of {base}"
            assert shape.clips % base.clips == 0


def test_grids_of_the_paper() -> None:
    strides = [train_grid(Shape(1, frames, 224), BASE, 2, (256, 320)).stride for frames in (8, 16, 32)]
    assert strides == [(2, 8), (2, 4), (2, 2)]
    sides = [train_grid(Shape(1, 32, crop), BASE, 2, (256, 320)).short_side for crop in (112, 158, 224)]
    assert sides == [(128, 320), (181, 320), (256, 320)]
    assert train_grid(BASE, BASE, 2, (256, 320)) == Grid(32, 224, (2, 2), (256, 320))
