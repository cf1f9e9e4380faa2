from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from warm import Start

from mgtrain.clips.cut import Cut
from mgtrain.clips.decode import VideoFile
from mgtrain.clips.prepared import Settings
from mgtrain.clips.stages import Stages
from mgtrain.data import open_splits
from mgtrain.preflight.bench_data import bench_data, cost, render
from mgtrain.preflight.loading import IN_TRAINING_PROCESS, STAGES
from mgtrain.processes.distributed import World
from mgtrain.recipe import Recipe
from mgtrain.schedule import make_plan


def test_every_shape_is_measured_and_every_phase_is_judged(tiny: Callable[..., Recipe]) -> None:
    recipe = tiny()
    videos = open_splits(recipe.data)["train"]
    plan = make_plan(recipe, len(videos))
    seen: list[tuple[str, int, int]] = []
    result = bench_data(
        recipe, videos, World(), Settings((48, 36), 23, None), seconds=0.01, step_seconds=1e-6,
        progress=lambda *counts: seen.append(counts),
    )  # fmt: skip
    wanted = {*plan.shapes(), recipe.base}
    assert [found["name"] for found in result["sets"]] == ["originals", "prepared"]
    for found in result["sets"]:
        shapes = {(row["clips"], row["frames"], row["crop"]) for row in found["shapes"]}
        assert shapes == {(shape.clips, shape.frames, shape.crop) for shape in wanted}
        for row in found["shapes"]:
            assert row["needed_clips_per_second"] == pytest.approx(row["clips"] / 1e-6)
            spent = dict(row["milliseconds"])
            assert all(spent[stage] > 0 for stage in ("demux", "decode", "convert", "collate", "transfer"))
            del spent["collate"], spent["transfer"]  # are the training process's
            assert sum(spent.values()) == pytest.approx(1000 / row["clips_per_second_per_core"])
        assert [phase["waits"] for phase in found["plan"]["phases"]] == [True] * len(plan.phases)
        assert found["plan"]["seconds"] > found["plan"]["compute"]
    assert seen[-1] == ("measuring", 2 * len(wanted), 2 * len(wanted))
    assert "phases that wait for data: 1, 2, 3, 4, 5, 6;" in render(result)
    assert Stages._open is None  # measuring leaves nothing behind


def test_the_cost_of_the_average_step_weighs_shapes_by_their_steps(tiny: Callable[..., Recipe]) -> None:
    recipe = tiny()
    plan = make_plan(recipe, 24)
    by_clips = cost(plan, recipe.base, {shape: 3.0 * shape.clips for shape in {*plan.shapes(), recipe.base}})
    assert by_clips["finest_core_seconds"] == 3 * recipe.base.clips
    assert by_clips["coarsest"] == max(step.shape.clips for step in plan) / recipe.base.clips
    average = sum(step.shape.clips for step in plan) / len(plan) / recipe.base.clips
    assert by_clips["average"] == pytest.approx(average, rel=1e-9)


def test_the_stages_of_a_clip_add_up_to_no_more_than_its_time(motions: Path) -> None:
    stages, start = Stages(), time.perf_counter()
    with stages, VideoFile(motions / "videos/train/left_0.mp4") as video:
        video.read([Cut((0, 9, 20), (0, 0, 64, 48), 32, flip=False)])
    assert set(stages.seconds) == set(STAGES) - set(IN_TRAINING_PROCESS)
    assert all(seconds > 0 for seconds in stages.seconds.values())
    assert sum(stages.seconds.values()) <= time.perf_counter() - start


def test_data_is_prepared_verified_and_trained_on_from_the_command_line(
    tiny_text: str, tmp_path: Path, mgtrain: Start
) -> None:
    (tmp_path / "tiny.yaml").write_text(tiny_text)
    stopped = mgtrain(tmp_path, "data", "prepare", "tiny.yaml", "--to", "out", "--levels", "48,36", "--forecast")
    assert stopped.returncode == 0, stopped.stderr
    assert "36 videos: about" in stopped.stderr
    refused = mgtrain(tmp_path, "bench", "data", "tiny.yaml", "data.prepared=out", "--step-seconds", 1)
    assert (refused.returncode, refused.stderr.count("\n")) == (3, 1)
    assert "is incomplete; resume `mgtrain data prepare`" in refused.stderr
    done = mgtrain(tmp_path, "data", "prepare", "tiny.yaml", "--to", "out", "--levels", "36,48", "--json")
    result = json.loads(done.stdout)
    assert (result["schema"], result["videos"], result["broken"]) == ("mgtrain.prepare/1", 36, {})
    assert mgtrain(tmp_path, "data", "verify", "out").stdout == "out: every file is intact\n"
    trained = mgtrain(
        tmp_path, "fit", "tiny.yaml", "data.prepared=out", "optim.stages=[1, 1]", "evaluation.times=1", "--json"
    )
    assert trained.returncode == 0, trained.stderr
    assert json.loads(trained.stdout)["videos"] == 12
    next((tmp_path / "out" / "36").rglob("*.mp4")).unlink()
    broken = mgtrain(tmp_path, "data", "verify", "out")
    assert broken.returncode == 3
    assert "is missing" in broken.stdout
    assert mgtrain(tmp_path, "data", "prepare", "tiny.yaml", "--to", "out", "--levels", "wide").returncode == 2
