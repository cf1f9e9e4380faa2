"""Sections of `gpu_check.py`: losses, memory, resuming, loading and whole runs."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
from gpu_sections import CLIPS, TINY, Check, Row, Trainer, row

from mgtrain.clips.prepared import Settings
from mgtrain.data import open_splits
from mgtrain.data.synthetic import BASIC_MOTIONS, synthesize
from mgtrain.engine.fit import fit
from mgtrain.engine.machine.memory import Memory, fit_memory
from mgtrain.models.dropout import hashed_mask
from mgtrain.preflight.loading import measure_loading
from mgtrain.preflight.prepare import prepare
from mgtrain.processes.cores import usable_cores
from mgtrain.processes.distributed import World
from mgtrain.recipe import Recipe
from mgtrain.runs.folder import RunDir
from mgtrain.schedule import baseline_recipe, make_plan

CLOSE = {"fp32": 1e-3, "tf32": 0.03, "bf16": 0.03, "fp16": 0.02}  # allowed relative errors of the first losses
HALVES = (
    ("bf16", "{precision: bf16}", "bf16"),
    ("bf16, channels first", "{precision: bf16, channels_last: false}", "bf16"),
    ("fp16", "{precision: fp16}", "fp16"),
)
VIDEOS = {"train": 4, "val": 1}  # of each of 8 classes
END_TO_END = 10.0  # seconds that the baseline run should take


# 6
def losses(check: Check) -> Iterator[Row]:
    """Losses on the GPU against those on a CPU: precisions, layouts, recomputed blocks, micro-batches"""
    for model in ("slowfast_r50", "i3d_nln_r50"):
        same = TINY.format(model)
        exact = first_losses(check.small(same), World())
        for name, how, close in (
            ("fp32", "{tf32: false}", "fp32"),
            ("fp32, channels first", "{tf32: false, channels_last: false}", "fp32"),
            ("fp32, recomputed", "{tf32: false, recompute: true}", "fp32"),
            ("fp32, in passes", "{tf32: false, micro_clips: 4}", "fp32"),
            ("tf32", "{tf32: true}", "tf32"),
            *(HALVES if check.gpu else ()),
        ):
            yield compared(f"{model} {name}", check.small(same, f"hardware={how}"), exact, check.world, CLOSE[close])
    for ranks in sorted({2, check.world.size} if check.world.size > 1 else ()):  # which share a BatchNorm group
        spanning = check.small(f"batch.bn_clips={CLIPS * ranks}", "hardware.tf32=false")
        exact = first_losses(spanning, World())
        yield compared(f"BatchNorm over {ranks} ranks", spanning, exact, check.world, CLOSE["fp32"])


def compared(name: str, recipe: Recipe, exact: list[float], world: World, allowed: float) -> Row:
    """A row of the largest relative error of a recipe's first losses."""
    found = first_losses(recipe, world)
    error = max(abs(a - b) / abs(b) for a, b in zip(found, exact, strict=True))
    return row(name, error <= allowed, error=error, allowed=allowed)


def first_losses(recipe: Recipe, world: World, steps: int = 4) -> list[float]:
    """Losses of a plan's first steps, averaged over all ranks."""
    trainer = Trainer(recipe, world, search=False)
    with mock.patch("mgtrain.models.dropout.keep_mask", hashed_mask):  # also on a CPU, the masks of a GPU
        found = [trainer.step(step, trainer.batch(step)) for step in trainer.plan[:steps]]
    return [world.sum(loss).item() / world.size for loss in found]


# 7
def memory(check: Check) -> Iterator[Row]:
    """Memory limits are kept: memory estimated, allocated and reserved"""
    free = torch.cuda.mem_get_info()[0] / 2**30 if check.gpu else float("inf")
    for gib in (0.25, 0.5) if check.toy else (gib for gib in (8, 20, 60) if gib < free):
        recipe = check.recipe("batch.clips=64", f"hardware.memory_gib={gib}")
        plan = make_plan(recipe, 1000)
        limited = fit_memory(recipe, plan, check.world)
        estimated, shape = Memory(limited, plan.shapes()).most(plan, 1)
        if check.gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        trainer, step = Trainer(limited, check.world), plan.first_steps()[shape]
        trainer.step(step, trainer.batch(step))
        if check.gpu:  # the first step includes cuDNN's search, which takes as much memory as there is
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            trainer.step(step, trainer.batch(step))
        taken = (torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()) if check.gpu else (None, None)
        allocated, reserved = (None if n is None else n / 2**30 for n in taken)
        yield row(f"{gib} GiB", None if reserved is None else reserved <= gib, shape=str(shape),
                  micro_clips=limited.hardware.micro_clips, recompute=limited.hardware.recompute,
                  estimated_gib=estimated / 2**30, allocated_gib=allocated, reserved_gib=reserved)  # fmt: skip
        del trainer


# 9
def resuming(check: Check) -> Iterator[Row]:
    """A run that was stopped and resumed equals one that was not"""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        synthesize(folder / "data", videos_per_class={"train": 4, "val": 1}, classes=BASIC_MOTIONS[:4], frames=24,
                   size=(64, 48))  # fmt: skip
        recipe = check.small(
            f"data={{format: list, root: {folder / 'data'}, train: train.csv, val: val.csv, classes: 4}}",
            "batch={clips: 4, bn_clips: 4}", "optim={lr: 0.002, stages: [6, 3]}",
            "logging={steps: 1, checkpoint_steps: 2, keep_checkpoints: 100}",
            "hardware={deterministic: true, workers: 0}",
        )  # fmt: skip
        runs = RunDir(folder / "straight"), RunDir(folder / "resumed")
        fit(recipe, runs[0], check.world)
        shutil.copytree(runs[0].path, runs[1].path)
        saved = runs[1].checkpoints()
        for later in saved[len(saved) // 2 :]:
            later.unlink()
        fit(recipe, runs[1], check.world, resume=True)
        found = [[line["loss"] for line in run.rows("steps.jsonl")] for run in runs]
        error = max(abs(a - b) / abs(a) for a, b in zip(*found, strict=True))
        yield row("losses", len(found[0]) == len(found[1]) and error == 0, steps=len(found[0]), largest_error=error)


# 10
def loading(check: Check) -> Iterator[Row]:
    """The loader's throughput on prepared videos, against what the GPU needs"""
    with videos_of(check) as words:
        recipe = check.recipe(*words)
        plan, train = make_plan(recipe, 1000), open_splits(recipe.data)["train"]
        firsts = list(plan.first_steps().items())
        for shape, step in (firsts[0], firsts[4], firsts[-1]):
            found = measure_loading(recipe, train, check.world, shape, step.grid, 0.1 if check.toy else 1.0)
            of_core, rate = found["clips_per_second_per_core"], found["loader_clips_per_second"]
            needed = shape.clips / check.seconds[shape] if shape in check.seconds else None
            host = found["milliseconds"]["collate"] + found["milliseconds"]["transfer"]
            yield row(str(shape), cores=usable_cores(), clips_per_second_per_core=of_core, clips_per_second=rate,
                      needed=needed, cores_needed=None if needed is None else needed / of_core,
                      host_ms_per_step=host * shape.clips)  # fmt: skip


# 11
def end_to_end(check: Check) -> Iterator[Row]:
    """Baseline and multigrid as a user runs them, on prepared videos: epochs of the plan per second"""
    with videos_of(check) as words, tempfile.TemporaryDirectory() as folder:
        recipe = check.recipe(*words, "evaluation.times=1", "evaluation.recalibration_batches=1")
        of_step = check.world.from_main(check.seconds.get(recipe.base, 0.05))  # ranks must agree on the plan
        epochs = (1 if check.toy else END_TO_END / of_step) * recipe.base.clips / len(open_splits(recipe.data)["train"])
        shorter = epochs / sum(recipe.optim.stages)  # the whole schedule, shortened
        recipe = recipe.changed("optim", stages=tuple(n * shorter for n in recipe.optim.stages), warmup_epochs=0.0)
        seconds = {}
        for name, one in (("baseline", baseline_recipe(recipe)), ("multigrid", recipe)):
            place = check.world.from_main(str(Path(folder) / name))  # the main rank's, which alone writes
            run = RunDir(Path(place), writes=check.world.main)
            fit(one, run, check.world)
            last = check.world.from_main(run.rows("steps.jsonl")[-1] if check.world.main else {})
            totals = make_plan(one, len(open_splits(one.data)["train"])).totals()
            seconds[name] = last["train_seconds"]
            yield row(name, steps=totals.steps, epochs=totals.epochs, seconds=seconds[name],
                      epochs_per_second=totals.epochs / seconds[name],
                      waits_for_data=last["data_seconds"] / seconds[name])  # fmt: skip
        yield row("speedup of the whole plan", times=seconds["baseline"] / seconds["multigrid"])


def make_videos(folder: Path, toy: bool) -> None:
    """Make videos of Kinetics' size, and prepare them, for sections 10 and 11."""
    size, frames = ((64, 48), 24) if toy else ((340, 256), 150)
    synthesize(folder / "data", videos_per_class=VIDEOS, frames=frames, size=size)
    paths = [path.relative_to(folder / "data").as_posix() for path in sorted((folder / "data/videos").rglob("*.mp4"))]
    settings = Settings((48,) if toy else (256, 160), 25, None)
    prepare(folder / "data", paths, folder / "prepared", settings, usable_cores())


@contextmanager
def videos_of(check: Check) -> Iterator[tuple[str, ...]]:
    """Changes to a recipe, to read the videos of `--data`, or else temporary ones."""
    with tempfile.TemporaryDirectory() as made:
        folder = check.data or Path(check.world.from_main(made))
        if check.data is None and check.world.main:
            make_videos(folder, check.toy)
        check.world.barrier()
        data = f"root: {folder / 'data'}, train: train.csv, val: val.csv, classes: 8, prepared: {folder / 'prepared'}"
        yield (f"data={{format: list, {data}}}", "logging.steps=10")
