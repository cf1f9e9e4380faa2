"""The multigrid schedule: long cycle, short cycle and fine-tuning (Wu et al. 2020, sections 3.2 to 3.4)."""

from mgtrain.errors import PlanError
from mgtrain.grid import Shape, coarsen, short_cycle
from mgtrain.recipe import MultigridSchedule, Recipe
from mgtrain.schedule.plan import Stretch


def multigrid(recipe: Recipe, videos: int) -> list[Stretch]:
    """A long cycle in every learning-rate stage except the last, which fine-tunes at the long cycle's finest shape.

    Within a stage, all shapes of the long cycle get the same number of steps. All stages keep the same fraction of
    their baseline steps, such that the run has `epoch_factor` times the baseline's epochs. The first half of
    fine-tuning uses the learning rate of the previous stage. Raises `PlanError` if there is only one stage, which
    cannot both run a long cycle and fine-tune.
    """
    schedule, stages, base = recipe.schedule, recipe.optim.stages, recipe.base
    assert isinstance(schedule, MultigridSchedule)
    if not schedule.long_cycle:
        cycle = short_cycle(base, base, schedule.short_cycle)
        kept = schedule.epoch_factor / _mean_batch(cycle, base)
        return [Stretch(k, k, cycle, kept * epochs * videos / base.clips) for k, epochs in enumerate(stages)]
    if len(stages) < 2 and schedule.fine_tune:
        raise PlanError(
            "a long cycle needs at least two learning-rate stages, because the last one fine-tunes; "
            "set two or more optim.stages, or schedule.fine_tune=false"
        )

    long_shapes = [coarsen(base, time, space) for time, space in schedule.long_cycle]
    cycles = [short_cycle(shape, base, schedule.short_cycle) for shape in long_shapes]
    last_cycle = cycles[-1] if schedule.fine_tune_short_cycle else (long_shapes[-1],)

    # Each stage keeps the fraction `kept` of its baseline steps; solve clips of the run = epoch_factor * baseline's.
    mean_batch = sum(_mean_batch(cycle, base) for cycle in cycles) / len(cycles)  # in units of the base's clips
    last = len(stages) - 1 if schedule.fine_tune else len(stages)  # the first stage without a long cycle
    clips = mean_batch * sum(stages[:last]) + _mean_batch(last_cycle, base) * sum(stages[last:])
    kept = schedule.epoch_factor * sum(stages) / clips

    steps = [kept * epochs * videos / base.clips for epochs in stages]
    long = [Stretch(stage, stage, cycle, steps[stage] / len(cycles)) for stage in range(last) for cycle in cycles]
    if not schedule.fine_tune:
        return long
    if recipe.optim.curve != "steps":
        return [*long, Stretch(last, last, last_cycle, steps[last])]
    half = steps[last] / 2
    return [*long, Stretch(last, last - 1, last_cycle, half), Stretch(last, last, last_cycle, half)]


def _mean_batch(cycle: tuple[Shape, ...], base: Shape) -> float:
    """Mean clips per step of the cycle, in units of the base's clips."""
    return sum(shape.clips for shape in cycle) / len(cycle) / base.clips
