"""Everything before a run's first step: check the recipe, make or restore the weights, warm up every shape."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import nn

from mgtrain.clips.units import Source
from mgtrain.data import check_labels, open_splits
from mgtrain.data.missing import check_present
from mgtrain.data.videos import Videos, mirrored_labels
from mgtrain.engine.checks import check_alike, check_micro_batches, check_precision, check_shapes, make_model
from mgtrain.engine.machine.memory import fit_memory, lack_explained
from mgtrain.engine.machine.tuning import tune
from mgtrain.engine.machine.warmup import Run, set_up, settle, warm_up
from mgtrain.engine.record import describe_run, environment, show_run, show_step
from mgtrain.engine.resume import Learner, resume_run
from mgtrain.engine.step import to_device
from mgtrain.engine.update.average import Average
from mgtrain.engine.update.optim import make_optimizer
from mgtrain.errors import CheckpointError, PlanError
from mgtrain.models.norm import group_slots
from mgtrain.models.weights.load import start_from
from mgtrain.processes.distributed import World, replicate
from mgtrain.recipe import Recipe
from mgtrain.rng import Draw, seed_of
from mgtrain.runs.boards.services import check_boards
from mgtrain.runs.checkpoint import CheckpointInfo
from mgtrain.runs.folder import RunDir
from mgtrain.schedule import Plan, Step, check_world, make_plan


@dataclass(frozen=True, slots=True)
class Training:
    """A run that is ready for its next step."""

    recipe: Recipe  # with the micro-batches that fit into memory
    plan: Plan
    milestones: frozenset[int]  # the numbers of finished steps at which to evaluate
    train: Videos
    val: Videos
    learner: Learner
    replica: nn.Module  # the learner's model, with gradients averaged over the ranks
    state: CheckpointInfo  # where it starts or resumes
    due: bool  # whether the evaluation after `state.step` is not finished yet
    world: World
    _compiled: Run

    @contextmanager
    def step(self, step: Step) -> Iterator[None]:
        """The context of a step: compiled if that saves time, and with a useful message if memory runs out."""
        with lack_explained(step, self.recipe, self.world), self._compiled(step):
            yield


def start(recipe: Recipe, run: RunDir, world: World, resume: bool, allow_changes: bool) -> Training:
    """Check a recipe against its data and this machine, then make the network or restore the newest checkpoint."""
    # 1. Check everything before writing anything.
    train, val = open_data(recipe)
    plan = make_plan(recipe, len(train))
    check_world(plan, world.size)
    check_alike(recipe, plan, (train, val), world)
    set_up(recipe, world.device)
    recipe = fit_memory(recipe, plan, world)
    flops = check_shapes(recipe, [*plan.shapes(), recipe.base, recipe.evaluation_shape])
    check_micro_batches(recipe, plan, world.size)
    check_precision(recipe, world.device)
    check_boards(recipe.logging)

    # 2. Make or restore the network.
    model = first_model(recipe, world, fresh=not (resume and run.checkpoints()))
    scaler = torch.amp.GradScaler(world.device.type, enabled=recipe.hardware.precision == "fp16")
    if recipe.optim.ema is not None and recipe.evaluation.recalibration_batches == 0 and group_slots(model):
        raise PlanError(
            "optim.ema: BatchNorm's running statistics belong to the weights, not to their average; set "
            "evaluation.recalibration_batches above 0, or init.freeze_bn=true"
        )
    average = None if recipe.optim.ema is None else Average(model, recipe.optim.ema, recipe.batch.clips)
    learner = Learner(model, make_optimizer(model, recipe.optim), scaler, average)
    state = CheckpointInfo(0, recipe.to_yaml(), train.classes, plan.fingerprint(), train.identity, val.identity)
    changes: list[str] = []
    if resume:
        state, changes = resume_run(run, state, learner, recipe, world, allow_changes)
        if state.step > len(plan):
            raise CheckpointError(
                f"{run.path}: its newest checkpoint is after step {state.step:,}, and this recipe has {len(plan):,} "
                "steps; train for longer, or start a new run with --name"
            )

    # 3. Write the run's description, choose how convolutions are computed, and warm up every shape.
    describe_run(run, recipe, plan, flops, train, val)
    run.write("env.json", environment(run, recipe, world, state, changes))
    tune(model, run, recipe, plan, world)
    replica = replicate(model, world, all_used=recipe.model.name != "own")
    settle(replica, recipe, world)
    compiled = warm_up(replica, recipe, plan, state.step, world)

    # 4. Delete the log rows after the checkpoint, and open the boards.
    milestones = frozenset(plan.milestones(recipe.evaluation.times))
    logged = state.evaluated and any(row["step"] == state.step for row in run.rows("evals.jsonl"))
    due = world.from_main(state.step in milestones and not logged)
    if resume:  # a user waited for lost steps, too
        last = [row for name in ("steps.jsonl", "evals.jsonl") for row in run.rows(name)[-1:]]
        waited = max((row.get("clock_seconds", 0.0) for row in last), default=0.0)
        state = replace(state, clock_seconds=max(state.clock_seconds, waited))
    run.rewind(state.step, evaluated=not due)
    run.open_boards(recipe.logging)
    if state.step == 0:
        show_run(run, recipe, plan, train)
    for row in run.rows("steps.jsonl")[-1:] if due else ():
        show_step(run, row)  # `rewind` has deleted it from TensorBoard
    return Training(recipe, plan, milestones, train, val, learner, replica, state, due, world, compiled)


def first_model(recipe: Recipe, world: World, fresh: bool = True) -> nn.Module:
    """The recipe's network on this rank's device with its first weights; if not `fresh`, others will replace them."""
    torch.manual_seed(seed_of(recipe.seed, Draw.INIT))
    model = to_device(make_model(recipe), recipe, world)
    start_from(model, recipe.init, fresh)
    return model


def open_data(recipe: Recipe) -> tuple[Videos, Videos]:
    """The training and validation videos, which have the same classes.

    Raises `DataError` if labels do not fit the recipe, or too many videos are missing or not prepared.
    """
    data, splits = recipe.data, open_splits(recipe.data)
    for name, videos in splits.items():
        check_labels(data, name, videos)
    mirrored_labels(splits["train"].classes, data.mirrored)  # raises an error for an unknown class
    for name, videos in (("training", splits["train"]), ("validation", splits["val"])):
        if not data.prepared:
            check_present(name, videos, data.max_bad_fraction)
        Source(videos, data)  # raises an error for an incomplete prepared set, or frames without their rate
    return splits["train"], splits["val"]
