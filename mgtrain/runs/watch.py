"""The progress of a run, read from its logs: `mgtrain watch`."""

import time
from collections.abc import Sequence
from typing import Any

from rich.console import Group
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from mgtrain.console import duration
from mgtrain.errors import UsageError
from mgtrain.runs.folder import RunDir
from mgtrain.runs.history import History, accuracy, accuracy_name, best_until, class_accuracy, guarded, seconds_left

QUIET_SECONDS = 600  # without a new log line until a note says so
LOCK_DOUBT = 60  # seconds after a log line in which a run counts as active; a network file system may not share locks


def look(run: RunDir, baseline: RunDir | None = None) -> dict[str, Any]:
    """A run's state from its logs. Raises `UsageError` before the first line, `CheckpointError` if they are damaged."""
    with guarded(run, *([baseline] if baseline else [])):
        history = History(run)
        rows, evals, plan = history.steps, history.evals, history.plan
        if not rows:
            raise UsageError(f"{run.path}: no step is logged yet; try again later")
        last = rows[-1]
        phase = plan[last["step"] - 1].phase
        done, cycle = last["step"] - phase.first_step, len(phase.shapes)
        turn = f", turn {(done - 1) % cycle + 1} of {cycle}" if cycle > 1 else ""
        evaluation = against = ""
        if evals:
            now, best, classes = evals[-1], max(map(accuracy, evals)), class_accuracy(evals[-1])
            found = f"{accuracy_name(now)} {100 * accuracy(now):.1f} %"
            mean = "" if classes is None else f", mean class {100 * classes:.1f} %"
            evaluation = f"{found}{mean} after step {now['step']:,}, best {100 * best:.1f} %"
            against = _against(evals, baseline) if baseline else ""
        finished = bool(evals) and evals[-1]["step"] >= len(plan)
        silent = time.time() - (run.path / "steps.jsonl").stat().st_mtime
        active = not finished and (run.in_use or silent < LOCK_DOUBT)
        return {
            "name": run.name,
            "steps": last["step"],
            "total": len(plan),
            "phase": f"phase {phase.index + 1} of {len(plan.phases)} ({', '.join(map(str, phase.shapes))}){turn}, "
            f"step {done:,} of {phase.steps:,}",
            "row": last,
            "left": seconds_left(plan, rows),  # of training
            "silent": silent,  # seconds since the last log line
            "evaluation": evaluation,  # the last one; empty before the first
            "against": against,  # the baseline at the same time and step; empty without a baseline
            "finished": finished,  # and evaluated
            "active": active,  # whether a process trains it
        }


def render(view: dict[str, Any]) -> Group:
    row, table = view["row"], Table.grid(padding=(0, 2))
    waiting = 100 * row["data_seconds"] / max(row["train_seconds"], 1e-9)
    loss = "not finite" if row["loss"] is None else f"{row['loss']:.3f}"
    clock = f", {duration(row['clock_seconds'])} of wall-clock time" if "clock_seconds" in row else ""
    left = "finished" if view["finished"] else f"about {duration(view['left'])} left"
    if not (view["finished"] or view["active"]):
        left = "stopped; `mgtrain fit ... --resume` continues it"
    elif not view["finished"] and view["steps"] >= view["total"]:
        left = "the last evaluation is left"
    lines = [
        ("", view["phase"]),
        ("now", f"loss {loss}  top-1 {100 * row['top1']:.0f} %  lr {row['lr']:.3g}  epoch {row['epoch']:.1f}"),
        ("time", f"{duration(row['train_seconds'])} of training, {waiting:.0f} % waiting for data{clock}; {left}"),
        ("evaluated", view["evaluation"] or "not yet"),
        *([("baseline", view["against"])] if view["against"] else []),
    ]
    if view["silent"] > QUIET_SECONDS and view["active"]:
        lines.append(("", f"no log line for {duration(view['silent'])}: it is evaluating, or it hangs"))
    for key, words in lines:
        table.add_row(key, Text(words))
    bar = ProgressBar(total=view["total"], completed=view["steps"], width=60)
    title = Text(f"{view['name']}: step {view['steps']:,} of {view['total']:,}", style="bold")
    return Group(title, bar, Text(""), table)  # a bar does not end its line


def _against(evals: Sequence[dict[str, Any]], baseline: RunDir) -> str:
    """The baseline's best accuracy after the same training time and after the same number of steps."""
    best = best_until(History(baseline).evals, evals[-1])
    said = {what: "not evaluated yet" if found is None else f"{100 * found:.1f} %" for what, found in best.items()}
    return f"{baseline.name}: {said['time']} after the same time, {said['step']} after the same steps"
