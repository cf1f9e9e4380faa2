"""The progress line of a run."""

from collections import defaultdict

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from mgtrain.console import duration, err
from mgtrain.grid import Shape
from mgtrain.schedule import Plan, Step


class TrainProgress:
    """The line at the bottom of the terminal: phase, shape, loss, accuracy and time left."""

    def __init__(self, plan: Plan, start: int, shown: bool) -> None:
        self.plan = plan
        self.evaluation = ""  # the last evaluation
        self.times: dict[Shape, list[float]] = defaultdict(list)  # seconds of each step since the last evaluation
        self._speed: dict[Shape, float] = {}  # seconds per step, a moving average
        self.bar = Progress(
            TextColumn("{task.fields[phase]}"),
            BarColumn(bar_width=20),
            TextColumn("{task.completed}/{task.total}"),
            TextColumn("{task.fields[facts]}"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[eta]}"),
            console=err,
            disable=not (shown and err.is_terminal),
            transient=True,
        )
        self._task = self.bar.add_task("", total=len(plan), completed=start, phase="", facts="", eta="")

    def time(self, step: Step, seconds: float) -> None:
        """Add the time of a step."""
        old = self._speed.get(step.shape, seconds)
        self._speed[step.shape] = 0.8 * old + 0.2 * seconds
        self.times[step.shape].append(seconds)

    def show(self, step: Step, loss: float, top1: float, waiting: float) -> None:
        """Show the state after `step`; `waiting` is the share of the time spent waiting for data."""
        phase, seconds = step.phase, self._speed.get(step.shape)
        clips_per_second = f"{step.shape.clips / seconds:.0f} clips/s" if seconds else ""
        self.bar.update(
            self._task,
            completed=step.index + 1,
            phase=f"phase {phase.index + 1}/{len(self.plan.phases)}  {step.shape}",
            facts=(
                f"lr {step.lr:.3g}  loss {loss:.3f}  top-1 {100 * top1:.0f} %  {clips_per_second}  "
                f"data wait {100 * waiting:.0f} %{self.evaluation}"
            ),
            eta=f"{duration(self.remaining(step.index + 1))} left",
        )

    def remaining(self, done: int) -> float:
        """Estimated seconds until the end; shapes without measured steps get the others' mean time per voxel."""
        if not self._speed:
            return 0.0
        per_voxel = sum(s / shape.voxels for shape, s in self._speed.items()) / len(self._speed)
        seconds = 0.0
        for phase in self.plan.phases:
            left = max(0, phase.end_step - max(done, phase.first_step))
            cycle = [self._speed.get(shape, per_voxel * shape.voxels) for shape in phase.shapes]
            seconds += left * sum(cycle) / len(cycle)
        return seconds
