"""A run: cut anywhere and resumed, it is bit for bit the run that was never cut."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_sources import lossless
from videos import write_frames

import mgtrain.engine.fit
import mgtrain.engine.resume
from mgtrain.engine.checks import make_model
from mgtrain.engine.examples import examples
from mgtrain.engine.fit import fit
from mgtrain.engine.record import Clock, Record
from mgtrain.engine.resume import PLACES, Learner, restore, save
from mgtrain.engine.start import open_data
from mgtrain.engine.update.optim import make_optimizer
from mgtrain.errors import CheckpointError, DataError, NonFiniteError, PlanError
from mgtrain.processes.distributed import World
from mgtrain.recipe import Recipe, changed_keys
from mgtrain.runs.checkpoint import CheckpointInfo, read_info
from mgtrain.runs.compare import compare
from mgtrain.runs.folder import RunDir
from mgtrain.runs.scores import Scores
from mgtrain.schedule import make_plan

EVERY_STEP = ("logging.checkpoint_steps=1", "logging.keep_checkpoints=100")
AUGMENTED = (
    "augment.brightness=0.4", "augment.hue=0.1", "augment.erase=0.5", "augment.rand_augment=2", "augment.mixup=0.8",
    "augment.cutmix=1", "data.mirrored=[[left, right]]",
)  # fmt: skip
ADAMW = ("optim.name=adamw", "optim.weight_decay=0.05", "optim.clip_norm=0.5", "optim.ema=0.9", "optim.layer_decay=0.9")
STEPS = 17
PHASE_ENDS = [3, 6, 8, 11, 14, 17]
TIMES = ("train_seconds", "data_seconds", "eval_seconds", "clock_seconds")


def run_to_end(recipe: Recipe, folder: Path, resume: bool = False) -> Scores:
    return fit(recipe, RunDir(folder), World(), resume)


def untimed(folder: Path, name: str) -> list[dict[str, object]]:
    """The lines of a log without what a clock has measured."""
    return [{key: value for key, value in row.items() if key not in TIMES} for row in RunDir(folder).rows(name)]


def cut(straight: Path, folder: Path, step: int) -> None:
    """Copy a run as it was when it was killed a little after its checkpoint of `step`."""
    shutil.copytree(straight, folder)
    for path in RunDir(folder).checkpoints():
        if int(path.stem.removeprefix("step_")) > step:
            path.unlink()
    for name in ("steps.jsonl", "evals.jsonl"):  # a killed run has logged more than it has saved, the last line by half
        rows = [row for row in RunDir(folder).rows(name) if row["step"] <= step + 1]
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": ')


def assert_same_end(ours: Path, theirs: Path, steps: int = STEPS) -> None:
    one, other = (load_file(folder / f"checkpoints/step_{steps:08d}.safetensors") for folder in (ours, theirs))
    assert one.keys() == other.keys()
    assert any(name.startswith(("optimizer.momentum_buffer.", "optimizer.exp_avg_sq.")) for name in one)
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
    for name in ("steps.jsonl", "evals.jsonl"):
        assert untimed(ours, name) == untimed(theirs, name)


def test_the_tiny_recipe_has_the_phases_that_these_tests_rely_on(tiny: Callable[..., Recipe]) -> None:
    plan = make_plan(tiny(), 24)
    assert [phase.end_step for phase in plan.phases] == PHASE_ENDS
    assert [phase.bn_groups for phase in plan.phases] == [8, 4, 2, 1, 1, 1]


def test_a_run_writes_down_what_it_is_and_did(straight: Path) -> None:
    run = RunDir(straight)
    names = {path.name for path in straight.iterdir()}
    assert {"recipe.yaml", "plan.json", "env.json", "data.json", "steps.jsonl", "evals.jsonl", "checkpoints"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert [row["step"] for row in run.rows("steps.jsonl")] == list(range(1, STEPS + 1))
    assert [row["step"] for row in run.rows("evals.jsonl")] == PHASE_ENDS
    evals = run.rows("evals.jsonl")
    assert [row["counts"] for row in evals] == [[3, 3, 3, 3]] * 6
    assert [row["mean_class"] for row in evals] == [pytest.approx(np.mean(row["correct"]) / 3) for row in evals]
    plan = make_plan(run.recipe(), 24)
    clips = np.cumsum([step.shape.clips for step in plan])
    assert [row["epoch"] for row in evals] == [pytest.approx(clips[end - 1] / 24) for end in PHASE_ENDS]
    assert [row["lr"] for row in run.rows("steps.jsonl")] == [step.lr for step in plan]
    seconds = [row["train_seconds"] for row in run.rows("steps.jsonl")]
    assert seconds == sorted(seconds)
    assert run.read("plan.json")["steps"] == STEPS
    assert run.read("data.json")["train"]["videos"] == 24
    assert run.read("env.json")["ranks"] == 1


QUICK = {3, 7, 16}  # at the end of a phase of the first stage, within one, within fine-tuning


@pytest.mark.parametrize(
    "step", [pytest.param(step, marks=[] if step in QUICK else pytest.mark.slow) for step in range(1, STEPS)]
)
def test_a_run_cut_at_any_step_and_resumed_is_the_run_that_was_not_cut(
    tiny: Callable[..., Recipe], straight: Path, tmp_path: Path, step: int
) -> None:
    folder = tmp_path / "cut"
    cut(straight, folder, step)
    run_to_end(tiny(*EVERY_STEP), folder, resume=True)
    assert_same_end(folder, straight)


@pytest.mark.parametrize("logged", [False, True])
def test_a_run_killed_around_an_evaluation_logs_it_once(
    tiny: Callable[..., Recipe], straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logged: bool
) -> None:
    folder, save = tmp_path / "cut", mgtrain.engine.fit.save
    cut(straight, folder, step=12)

    def killed(run: RunDir, state: CheckpointInfo, *rest: Any) -> None:
        if state.step == PHASE_ENDS[4] and state.evaluated == logged:
            if not logged:
                save(run, state, *rest)
            run.close()
            raise KeyboardInterrupt
        save(run, state, *rest)

    monkeypatch.setattr(mgtrain.engine.fit, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        run_to_end(tiny(*EVERY_STEP), folder, resume=True)
    assert [row["step"] for row in RunDir(folder).rows("evals.jsonl")] == PHASE_ENDS[: 4 + logged]
    monkeypatch.setattr(mgtrain.engine.fit, "save", save)
    run_to_end(tiny(*EVERY_STEP), folder, resume=True)
    assert_same_end(folder, straight)
    board = EventAccumulator(str(folder), {"scalars": 0}).Reload()
    for tag in ("val/top1", "val/mean_class"):
        assert [event.step for event in board.Scalars(tag)] == PHASE_ENDS
    assert [event.step for event in board.Scalars("train/loss")] == list(range(1, STEPS + 1))


@pytest.mark.slow  # the quick tests resume the loader on these
@pytest.mark.parametrize("kind", ["frames", "stretches"])
def test_a_run_on_other_sources_too_is_the_one_that_was_not_cut(
    tiny: Callable[..., Recipe], motions: Path, tmp_path: Path, kind: str
) -> None:
    root = tmp_path / "all"
    lossless(motions, root)
    sets = (f"data.root={root}", f"data.train={kind}/train.csv", f"data.val={kind}/train.csv", "data.fps=25")
    recipe = tiny(*EVERY_STEP, *sets)
    run_to_end(recipe, tmp_path / "straight")
    cut(tmp_path / "straight", tmp_path / "cut", step=7)
    run_to_end(tiny(*EVERY_STEP, *sets, "hardware.workers=2"), tmp_path / "cut", resume=True)
    assert_same_end(tmp_path / "straight", tmp_path / "cut")
    files = tiny(f"data.root={root}", "data.train=files/train.csv", "data.val=files/train.csv")
    losses = [row["loss"] for row in RunDir(tmp_path / "straight").rows("steps.jsonl")]
    run_to_end(files, tmp_path / "files")
    assert [row["loss"] for row in RunDir(tmp_path / "files").rows("steps.jsonl")] == losses


def test_frames_without_their_rate_are_refused_before_anything_is_computed(
    tiny: Callable[..., Recipe], tmp_path: Path
) -> None:
    (tmp_path / "train.csv").write_text(
        "\n".join(f"{write_frames(tmp_path / f'f{n}', 2).name} 2 {n}" for n in range(4))
    )
    recipe = tiny(f"data.root={tmp_path}", "data.val=train.csv")
    with pytest.raises(DataError, match=r"is a folder of frames, so set data\.fps"):
        open_data(recipe)


def test_without_recalibration_too(tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = tiny(*EVERY_STEP, "evaluation.recalibration_batches=0")
    run_to_end(recipe, tmp_path / "straight")
    cut(tmp_path / "straight", tmp_path / "cut", step=4)
    run_to_end(recipe, tmp_path / "cut", resume=True)
    assert_same_end(tmp_path / "cut", tmp_path / "straight")


def test_an_augmented_run_too_is_the_one_that_was_not_cut(tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = tiny(*EVERY_STEP, *AUGMENTED)
    run_to_end(recipe, tmp_path / "straight")
    cut(tmp_path / "straight", tmp_path / "cut", step=12)
    run_to_end(tiny(*EVERY_STEP, *AUGMENTED, "hardware.workers=1"), tmp_path / "cut", resume=True)
    assert_same_end(tmp_path / "cut", tmp_path / "straight")


def test_a_balanced_run_too_is_the_one_that_was_not_cut(
    tiny: Callable[..., Recipe], motions: Path, tmp_path: Path
) -> None:
    root = Path(shutil.copytree(motions, tmp_path / "uneven"))
    lines = (root / "train.csv").read_text().splitlines()
    (root / "train.csv").write_text("\n".join(lines[:15]))
    recipe = tiny(*EVERY_STEP, f"data.root={root}", "data.balance=full", "evaluation.recalibration_batches=0")
    run_to_end(recipe, tmp_path / "straight")
    last = len(make_plan(recipe, 15))
    cut(tmp_path / "straight", tmp_path / "cut", step=last // 2)
    run_to_end(recipe, tmp_path / "cut", resume=True)
    assert_same_end(tmp_path / "cut", tmp_path / "straight", last)


def test_a_run_with_adamw_clipping_and_an_average_too(tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = tiny(*EVERY_STEP, *ADAMW)
    run_to_end(recipe, tmp_path / "straight")
    for step in (6, 12):  # at the end of a phase and within one
        cut(tmp_path / "straight", tmp_path / f"cut_{step}", step)
        run_to_end(recipe, tmp_path / f"cut_{step}", resume=True)
        assert_same_end(tmp_path / f"cut_{step}", tmp_path / "straight")
    tensors = load_file(RunDir(tmp_path / "straight").checkpoints()[-1])
    averaged = [name for name in tensors if name.startswith("ema.")]
    assert len(averaged) == sum(name.startswith("optimizer.exp_avg.") for name in tensors) > 10
    assert not any(torch.equal(tensors[name], tensors[f"model.{name[4:]}"]) for name in averaged)
    assert {row["weights"] for row in RunDir(tmp_path / "straight").rows("evals.jsonl")} == {"ema"}


def test_an_average_that_a_run_is_told_to_begin_later_starts_from_its_weights(
    tiny: Callable[..., Recipe], straight: Path, tmp_path: Path
) -> None:
    cut(straight, tmp_path / "cut", step=16)
    with pytest.raises(CheckpointError, match=r"optim.ema None -> 0.5; "):
        run_to_end(tiny("optim.ema=0.5"), tmp_path / "cut", resume=True)
    fit(tiny("optim.ema=0.5"), RunDir(tmp_path / "cut"), World(), resume=True, allow_changes=True)
    before, after = (load_file(tmp_path / f"cut/checkpoints/step_{step:08d}.safetensors") for step in (16, 17))
    for name in (name for name in after if name.startswith("ema.")):
        weights = name.replace("ema.", "model.")
        share = 0.5 ** (make_plan(tiny(), 24)[16].shape.clips / 4)
        torch.testing.assert_close(after[name], share * before[weights] + (1 - share) * after[weights])


def test_an_average_without_statistics_of_its_own_is_refused(tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    words = ("optim.ema=0.5", "evaluation.recalibration_batches=0")
    with pytest.raises(PlanError, match=r"optim\.ema: BatchNorm's running statistics .*; set evaluation\.recalib"):
        run_to_end(tiny(*words), tmp_path / "run")
    assert not (tmp_path / "run/recipe.yaml").exists()


def test_a_mirrored_class_that_does_not_exist_stops_the_run_before_it_begins(
    tiny: Callable[..., Recipe], tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"data.mirrored: 'rigth' is not one of the 4 classes; did you mean 'right'\?"):
        run_to_end(tiny("data.mirrored=[[left, rigth]]"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_resuming_a_finished_run_gives_its_scores(tiny: Callable[..., Recipe], straight: Path, tmp_path: Path) -> None:
    shutil.copytree(straight, tmp_path / "copy")
    scores = run_to_end(tiny(*EVERY_STEP), tmp_path / "copy", resume=True)
    last = RunDir(straight).rows("evals.jsonl")[-1]
    assert (scores.top1, scores.loss, list(scores.correct)) == (last["top1"], last["loss"], last["correct"])
    assert_same_end(tmp_path / "copy", straight)


def test_resuming_without_a_checkpoint_starts_and_a_run_of_the_same_recipe_is_the_same(
    tiny: Callable[..., Recipe], straight: Path, tmp_path: Path
) -> None:
    cut(straight, tmp_path / "cut", step=0)
    run_to_end(tiny(*EVERY_STEP), tmp_path / "cut", resume=True)
    assert_same_end(tmp_path / "cut", straight)


def test_times_go_on_from_where_they_were_and_that_by_the_clock_has_all_that_one_waits_for(
    tiny: Callable[..., Recipe], straight: Path, tmp_path: Path
) -> None:
    rows = RunDir(straight).rows("evals.jsonl")
    evaluating = 0.0
    for row in rows:
        evaluating += row["eval_seconds"]
        assert row["clock_seconds"] > row["train_seconds"] + evaluating
    cut(straight, tmp_path / "cut", step=11)
    fit(tiny(*EVERY_STEP), RunDir(tmp_path / "cut"), World(), resume=True, began=time.perf_counter() - 1000)
    resumed = RunDir(tmp_path / "cut").rows("evals.jsonl")
    assert 1000 < resumed[-1]["clock_seconds"] - rows[3]["clock_seconds"] < 1100
    seconds = [row["train_seconds"] for row in RunDir(tmp_path / "cut").rows("steps.jsonl")]
    assert seconds == sorted(seconds)
    assert seconds[11] > RunDir(straight).rows("steps.jsonl")[10]["train_seconds"]


def test_time_by_the_clock_has_the_steps_that_a_killed_run_lost(
    tiny: Callable[..., Recipe], straight: Path, tmp_path: Path
) -> None:
    cut(straight, tmp_path / "cut", step=12)
    run = RunDir(tmp_path / "cut")
    before = read_info(run.checkpoint_path(12)).clock_seconds
    lost = {**run.rows("steps.jsonl")[-1], "step": 16, "clock_seconds": before + 1000}
    run.write("steps.jsonl", "".join(json.dumps(row) + "\n" for row in [*run.rows("steps.jsonl"), lost]))
    run_to_end(tiny(*EVERY_STEP), tmp_path / "cut", resume=True)
    row = run.rows("evals.jsonl")[-1]
    assert row["clock_seconds"] > before + 1000
    assert row["train_seconds"] < before + 1000


def test_a_run_says_which_devices_it_has_had(tiny: Callable[..., Recipe], straight: Path, tmp_path: Path) -> None:
    cut(straight, tmp_path / "cut", step=12)
    run = RunDir(tmp_path / "cut")
    env = run.read("env.json")
    assert env["devices"] == [[env["device"], 1, env["threads"]]]
    run.write("env.json", {**env, "devices": [["Another CPU", 1, 64]]})
    run_to_end(tiny(*EVERY_STEP), tmp_path / "cut", resume=True)
    assert run.read("env.json")["devices"] == [["Another CPU", 1, 64], [env["device"], 1, env["threads"]]]


def test_a_run_without_its_description_is_resumed(tiny: Callable[..., Recipe], straight: Path, tmp_path: Path) -> None:
    cut(straight, tmp_path / "cut", step=16)
    (tmp_path / "cut/env.json").unlink()
    run_to_end(tiny(*EVERY_STEP), tmp_path / "cut", resume=True)
    assert len(RunDir(tmp_path / "cut").read("env.json")["devices"]) == 1


def test_a_new_run_in_an_old_folder_has_its_own_time(
    tiny: Callable[..., Recipe], straight: Path, tmp_path: Path
) -> None:
    cut(straight, tmp_path / "again", step=16)
    run = RunDir(tmp_path / "again")
    row = {**run.rows("steps.jsonl")[-1], "clock_seconds": 10_000.0}
    run.write("steps.jsonl", json.dumps(row) + "\n")
    run_to_end(tiny(*EVERY_STEP), run.path)
    assert run.rows("evals.jsonl")[-1]["clock_seconds"] < 10_000


def test_a_run_of_an_earlier_version_is_resumed(
    tiny: Callable[..., Recipe], straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_old(path: Path) -> CheckpointInfo:
        info = read_info(path)
        assert "times: 6" in info.recipe
        return replace(info, clock_seconds=0.0, recipe=info.recipe.replace("times: 6", "per_phase: 1"))

    monkeypatch.setattr(mgtrain.engine.resume, "read_info", read_old)
    cut(straight, tmp_path / "cut", step=15)
    run_to_end(tiny(*EVERY_STEP), tmp_path / "cut", resume=True)
    assert_same_end(tmp_path / "cut", straight)
    last = RunDir(tmp_path / "cut").rows("evals.jsonl")[-1]
    assert last["clock_seconds"] > last["train_seconds"]


def test_resuming_another_recipe_is_refused_with_the_difference(
    tiny: Callable[..., Recipe], straight: Path, tmp_path: Path
) -> None:
    for override, change in (
        ("schedule.epoch_factor=1.4", "schedule.epoch_factor 1.5 -> 1.4"),
        ("optim.stages=[6, 4]", "optim.stages [6.0, 3.0] -> [6.0, 4.0]"),
        ("batch.bn_clips=2", "batch.bn_clips 4 -> 2"),
        ("schedule.name=baseline", "schedule.name multigrid -> baseline"),
        ("clip.flip=0.25", "clip.flip 0.5 -> 0.25"),
        ("augment.erase=0.5", "augment.erase 0.0 -> 0.5"),
        ("hardware.precision=bf16", "hardware.precision fp32 -> bf16"),
    ):
        assert changed_keys(tiny().flat(), tiny(override).flat(), PLACES)[0] == change
    cut(straight, tmp_path / "cut", step=5)
    before = contents(tmp_path / "cut")
    with pytest.raises(CheckpointError, match=r"has changed since: optim\.lr 0\.002 -> 0\.03; ") as caught:
        run_to_end(tiny("optim.lr=0.03"), tmp_path / "cut", resume=True)
    assert caught.value.exit_code == 4
    assert contents(tmp_path / "cut") == before


def test_resuming_with_other_videos_is_refused(
    tiny: Callable[..., Recipe], motions: Path, straight: Path, tmp_path: Path
) -> None:
    root = Path(shutil.copytree(motions, tmp_path / "data"))
    lines = (root / "train.csv").read_text().splitlines()
    (root / "train.csv").write_text("\n".join(reversed(lines)))
    cut(straight, tmp_path / "cut", step=5)
    changed = r"training videos 24 \(\w{16}\) -> 24 \(\w{16}\); undo the changes, resume with --allow-changes"
    with pytest.raises(CheckpointError, match=changed):
        run_to_end(tiny(f"data.root={root}"), tmp_path / "cut", resume=True)


def test_a_checkpoint_past_the_end_of_the_recipe_is_refused(
    tiny: Callable[..., Recipe], straight: Path, tmp_path: Path
) -> None:
    cut(straight, tmp_path / "cut", step=15)
    with pytest.raises(CheckpointError, match=r"newest checkpoint is after step 15, and this recipe has \d+ steps"):
        fit(tiny("optim.stages=[1, 1]"), RunDir(tmp_path / "cut"), World(), resume=True, allow_changes=True)


def test_a_run_may_go_on_in_half_precision(tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    model = make_model(tiny())
    learner = Learner(model, make_optimizer(model, tiny().optim), torch.amp.GradScaler("cpu", enabled=False))
    save(run, CheckpointInfo(3, tiny().to_yaml(), [], "", ""), learner, 1, World())
    scaler = torch.amp.GradScaler("cpu", enabled=True, init_scale=8.0)
    restore(run.checkpoint_path(3), replace(learner, scaler=scaler))
    assert scaler.get_scale() == 8.0


def test_an_evaluation_that_is_lost_from_the_log_is_repeated(
    tiny: Callable[..., Recipe], straight: Path, tmp_path: Path
) -> None:
    run = RunDir(Path(shutil.copytree(straight, tmp_path / "run")))
    log = run.path / "evals.jsonl"
    before = run.rows("evals.jsonl")
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:-1]))  # as after a copy that was cut short
    fit(tiny(*EVERY_STEP), run, World(), resume=True)
    after = run.rows("evals.jsonl")
    assert [(row["step"], row["top1"]) for row in after] == [(row["step"], row["top1"]) for row in before]


def test_a_run_that_goes_on_with_another_schedule_says_so(
    tiny: Callable[..., Recipe], straight: Path, tmp_path: Path
) -> None:
    cut(straight, tmp_path / "cut", step=5)
    run, recipe = RunDir(tmp_path / "cut"), tiny("schedule={name: baseline}", "optim.stages=[2, 1]")
    for _ in range(2):  # the second one has nothing to do
        fit(recipe, run, World(), resume=True, allow_changes=True)
    said = run.read("env.json")["changed"]
    assert [what.partition(":")[0] for what in said] == ["after step 5"] * len(said)
    assert any("schedule.name multigrid -> baseline" in what for what in said)
    warnings = compare(RunDir(straight), run)["warnings"]
    assert any(what.startswith("cut changed after step 5: schedule.name") for what in warnings)


def test_told_so_a_run_goes_on_with_another_recipe(tiny: Callable[..., Recipe], straight: Path, tmp_path: Path) -> None:
    cut(straight, tmp_path / "cut", step=15)
    run = RunDir(tmp_path / "cut")
    fit(tiny("optim.lr=0.001"), run, World(), resume=True, allow_changes=True)
    ours, theirs = run.rows("steps.jsonl"), RunDir(straight).rows("steps.jsonl")
    assert [row["lr"] for row in ours[:15]] == [row["lr"] for row in theirs[:15]]
    assert ours[-1]["lr"] == theirs[-1]["lr"] / 2
    assert "lr: 0.001" in read_info(run.checkpoints()[-1]).recipe


def test_resuming_may_change_hardware_and_logging(tiny: Callable[..., Recipe], straight: Path, tmp_path: Path) -> None:
    cut(straight, tmp_path / "cut", step=12)
    run_to_end(tiny("hardware.workers=1", "logging.checkpoint_steps=5"), tmp_path / "cut", resume=True)
    assert_same_end(tmp_path / "cut", straight)


def test_old_checkpoints_go_but_the_best_and_the_newest_stay(
    tiny: Callable[..., Recipe], straight: Path, tmp_path: Path
) -> None:
    cut(straight, tmp_path / "run", step=14)
    run_to_end(tiny("logging.checkpoint_steps=2", "logging.keep_checkpoints=2"), tmp_path / "run", resume=True)
    run = RunDir(tmp_path / "run")
    best = max(run.rows("evals.jsonl"), key=lambda row: row["top1"])["step"]
    assert [path.stem for path in run.checkpoints()] == [f"step_{step:08d}" for step in sorted({best, 16, 17})]


def test_a_loss_that_is_no_number_stops_the_run(tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError) as caught:
        run_to_end(tiny("optim.lr=1e30", "optim.warmup_epochs=0"), tmp_path / "run")
    assert caught.value.exit_code == 5
    assert "lower optim.lr or lengthen optim.warmup_epochs" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_shape_that_the_model_refuses_stops_the_run_before_it_begins(
    tiny: Callable[..., Recipe], tmp_path: Path
) -> None:
    with pytest.raises(PlanError, match=r"hardware.micro_clips 1 allows"):
        run_to_end(tiny("hardware.micro_clips=1"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_videos_with_several_labels_are_trained_and_judged_by_mean_average_precision(
    tiny: Callable[..., Recipe], motions: Path, tmp_path: Path
) -> None:
    for name in ("train", "val"):  # left and right, up and down, and either of them as a class more
        rows = [line.rsplit(maxsplit=1) for line in (motions / f"{name}.csv").read_text().splitlines()]
        lines = [f"{path} {label};{4 + (label in ('2', '3'))}" for path, label in rows]
        (tmp_path / f"{name}.csv").write_text("\n".join(lines) + "\n")
    (tmp_path / "classes.txt").write_text("left\nright\nup\ndown\nsideways\nupright\n")
    recipe = tiny(
        *(f"data.{name}={tmp_path}/{name}.csv" for name in ("train", "val")), "data.classes=6", "data.multi_label=true",
        "clip.sampling=segments", "evaluation.views=max", "data.mirrored=[[left, right]]", *EVERY_STEP,
    )  # fmt: skip
    scores = run_to_end(recipe, tmp_path / "straight")
    rows = RunDir(tmp_path / "straight").rows("evals.jsonl")
    assert [row["mean_ap"] for row in rows] == [pytest.approx(np.mean(row["precision"])) for row in rows]
    assert (scores.mean_ap, scores.counts) == (rows[-1]["mean_ap"], (3, 3, 3, 3, 6, 6))
    assert 0 < rows[-1]["mean_ap"] <= 1
    cut(tmp_path / "straight", tmp_path / "cut", 8)
    run_to_end(recipe, tmp_path / "cut", resume=True)
    assert_same_end(tmp_path / "cut", tmp_path / "straight")
    scalars = EventAccumulator(str(tmp_path / "straight")).Reload().Tags()["scalars"]
    assert "val/mean_ap" in scalars
    assert "val/mean_class" not in scalars


def test_videos_with_several_labels_are_refused_before_the_run_begins(
    tiny: Callable[..., Recipe], tmp_path: Path
) -> None:
    (tmp_path / "train.csv").write_text("a.mp4 0;1\nb.mp4 3\n")
    with pytest.raises(DataError, match=r"the train videos have several labels each; set data.multi_label=true to"):
        run_to_end(tiny(f"data.train={tmp_path}/train.csv"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_tensorboard_shows_what_the_network_sees_and_how_the_baseline_did(
    tiny: Callable[..., Recipe], straight: Path, tmp_path: Path
) -> None:
    baseline, recipe = RunDir(straight), tiny("augment.erase=0.5", "augment.mixup=0.4")
    fit(recipe, RunDir(tmp_path / "run"), World(), baseline=baseline)
    board = EventAccumulator(str(tmp_path / "run"), {"scalars": 0, "images": 0}).Reload()
    plan = make_plan(recipe, 24)
    assert board.Tags()["images"] == [f"clips/{shape}" for shape in plan.shapes()]
    for shape in plan.shapes():
        picture = board.Images(f"clips/{shape}")[0]
        assert (picture.height, picture.width) == (shape.crop, shape.crop * min(4, shape.frames))
    timed = {tag for tag in board.Tags()["scalars"] if tag.startswith("step_seconds/")}
    assert timed == {f"step_seconds/{shape}" for shape in plan.shapes()}
    assert all(event.value > 0 for tag in timed for event in board.Scalars(tag))
    rows, theirs = RunDir(tmp_path / "run").rows("evals.jsonl"), baseline.rows("evals.jsonl")
    for event in board.Scalars("compare/baseline_at_same_step"):
        assert event.value == pytest.approx(max(row["top1"] for row in theirs if row["step"] <= event.step))
    assert len(board.Scalars("compare/baseline_at_same_step")) == sum(row["step"] >= theirs[0]["step"] for row in rows)
    assert board.PluginTagToContent("hparams").keys() >= {"_hparams_/experiment", "_hparams_/session_start_info"}


def test_on_a_gpu_steps_take_the_time_between_their_events(
    tiny: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host is done with a step long before the GPU is; what it does between steps is not a step's time."""
    now = iter((0.0, 1.0, 3.0, 50.0, 54.0))  # seconds on the GPU, with an evaluation before the last but one

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = next(now)

        def elapsed_time(self, end: Event) -> float:
            return 1000 * (end.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    plan = make_plan(tiny(), 24)
    clock = Clock(CheckpointInfo(0, "", (), "", ""), time.perf_counter())
    record = Record(RunDir(tmp_path), plan, 0, clock, 12, World(device=torch.device("cuda")), None)
    step = plan[len(plan) - 1]
    for _ in range(3):
        record.lap(step)
    with clock.paused():
        pass
    for _ in range(2):
        record.lap(step)
    record._read_marks()
    assert record._times == {step.shape: [1, 2, 4]}


def test_the_same_video_is_shown_at_every_shape(tiny: Callable[..., Recipe], motions: Path) -> None:
    recipe = tiny("clip.flip=0.0", "clip.short_side=[32, 32]")
    train = open_data(recipe)[0]
    for shape, strip in examples(train, recipe, make_plan(recipe, len(train))):
        assert strip.dtype == torch.uint8
        assert strip.shape == (shape.crop, shape.crop * min(4, shape.frames), 3)
        assert strip.float().std() > 5  # pixels, not normalized ones


def test_resuming_with_other_validation_videos_is_refused(
    tiny: Callable[..., Recipe], motions: Path, straight: Path, tmp_path: Path
) -> None:
    root = Path(shutil.copytree(motions, tmp_path / "data"))
    lines = (root / "val.csv").read_text().splitlines()
    (root / "val.csv").write_text("\n".join(lines[:-1]))
    cut(straight, tmp_path / "cut", step=5)
    with pytest.raises(CheckpointError, match=r"since: validation videos 12 \(\w{16}\) -> 11 \(\w{16}\); undo"):
        run_to_end(tiny(f"data.root={root}"), tmp_path / "cut", resume=True)


def test_a_run_recalibrates_on_training_videos(
    tiny: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(mgtrain.engine.fit, "recalibrate", lambda model, videos, *rest: asked.append(videos.identity))
    recipe = tiny("optim.stages=[1, 1]", "evaluation.times=1", "evaluation.recalibration_batches=1")
    fit(recipe, RunDir(tmp_path / "run"), World())
    assert asked == [open_data(recipe)[0].identity]


def test_times_of_a_resumed_run_go_on(tiny: Callable[..., Recipe], straight: Path, tmp_path: Path) -> None:
    cut(straight, tmp_path / "cut", step=16)
    run_to_end(tiny(*EVERY_STEP), tmp_path / "cut", resume=True)
    before, after = RunDir(straight).rows("steps.jsonl")[15], RunDir(tmp_path / "cut").rows("steps.jsonl")[16]
    assert 0 < before["data_seconds"] < after["data_seconds"] < after["train_seconds"]
    assert after["epoch"] == 13.5


def test_evaluations_and_checkpoints_are_not_training_and_waiting_for_data_is(
    tiny: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("evaluate", "save"):
        work = getattr(mgtrain.engine.fit, name)
        monkeypatch.setattr(mgtrain.engine.fit, name, lambda *given, work=work: (time.sleep(0.4), work(*given))[1])
    batches = mgtrain.engine.fit.train_batches
    monkeypatch.setattr(
        mgtrain.engine.fit, "train_batches", lambda *given: ((time.sleep(0.05), batch)[1] for batch in batches(*given))
    )
    run = RunDir(tmp_path / "run")
    fit(tiny("optim.stages=[1, 1]", "evaluation.times=1", "evaluation.recalibration_batches=0"), run, World())
    (row,), first = run.rows("evals.jsonl"), run.rows("steps.jsonl")[0]
    before = first["clock_seconds"] - first["train_seconds"]  # start-up
    assert row["clock_seconds"] - row["train_seconds"] - before >= 0.8
    assert row["eval_seconds"] >= 0.4
    assert 0.05 * row["step"] <= row["data_seconds"] < row["train_seconds"]
