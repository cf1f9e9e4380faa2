"""Studies: which runs there are, in which order, that none is made twice, and that a whole one runs to its end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from warm import Start

from mgtrain.errors import CheckpointError, RecipeError, StoppedError, UsageError
from mgtrain.recipe.load import parse_recipe
from mgtrain.runs.study.definition import Run, load_study, runs_of
from mgtrain.runs.study.jobs import pinned, shares_of_cores, train_all
from mgtrain.runs.study.results import changes_of, known_result, read_result, summed_up

STUDY = """\
question: Is it as good?
recipe: tiny.yaml
overrides: [evaluation.times=2, evaluation.recalibration_batches=0, "optim.stages=[1, 1]"]
variants:
  baseline: {overrides: ["schedule={name: baseline}"]}
  short only: {overrides: ["schedule.long_cycle=[]"]}
seeds: [0, 4]
"""


@pytest.fixture
def file(tiny_text: str, tmp_path: Path) -> Path:
    (tmp_path / "tiny.yaml").write_text(tiny_text)
    (tmp_path / "study.yaml").write_text(STUDY)
    return tmp_path / "study.yaml"


def runs_in(file: Path) -> list[Run]:
    return runs_of(load_study(file), file)


def test_variants_take_turns_within_a_seed_and_fold(file: Path) -> None:
    assert [run.name for run in runs_in(file)] == ["baseline_0", "short_only_0", "baseline_4", "short_only_4"]
    file.write_text(f"{STUDY}folds: {{A: [data.val=a.csv], B: [data.val=b.csv]}}\n")
    runs = runs_in(file)
    assert [run.name for run in runs[:4]] == ["baseline_a_0", "short_only_a_0", "baseline_b_0", "short_only_b_0"]
    assert (runs[3].recipe.data.val, runs[3].recipe.seed, runs[3].recipe.schedule.name) == ("b.csv", 0, "multigrid")
    file.write_text(f"{STUDY}folds: {{A: [data.val=a.csv], B: [data.val=a.csv]}}\n")
    with pytest.raises(RecipeError, match="baseline_a_0 and baseline_b_0 are the same run"):
        runs_in(file)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("question", "qestion", r"study.yaml:1: qestion: Extra inputs are not permitted; allowed: question, paper,"),
        (
            '{overrides: ["schedule.l',
            '{overide: ["schedule.l',
            "variants.short only.overide: .* allowed: recipe, overrides",
        ),
        ("seeds: [0, 4]", "seeds: []", "seeds is empty; name at least one"),
        ("seeds: [0, 4]", "seeds: [4, 4]", "must differ in letters or digits; rename one"),
        ("short only", "Baseline!", "must differ in letters or digits; rename one"),
        ("seeds: [0, 4]", "seeds: [-1]", r"study.yaml:7: seeds.0: Input should be greater than or equal to 0"),
        ("schedule.long_cycle", "schedule.longcycle", "unknown key 'schedule.longcycle'; did you mean 'long_cycle'"),
        ("tiny.yaml", "none.yaml", "none.yaml: no such recipe file"),
        (STUDY, "- a list", "study.yaml:1: a study is a mapping with the keys question, paper, recipe"),
        (STUDY, "question: [", "study.yaml:1: not valid YAML"),
    ],
)
def test_a_mistake_is_one_line(file: Path, old: str, new: str, message: str) -> None:
    file.write_text(STUDY.replace(old, new))
    with pytest.raises(RecipeError, match=message) as caught:
        runs_in(file)
    assert "\n" not in str(caught.value)


def test_two_runs_of_one_name_are_refused(file: Path) -> None:
    variants = STUDY.replace("short only", "baseline x")
    file.write_text(f"{variants}folds: {{x y: [], y: []}}\n")
    with pytest.raises(RecipeError, match="two runs are called baseline_x_y_0; rename a variant or a fold"):
        runs_in(file)


def test_runs_with_other_scores_are_refused_before_any_is_trained(file: Path) -> None:
    several = "seeds: [0, 4]\nfolds: {one: [], several: [data.multi_label=true]}"
    file.write_text(STUDY.replace("seeds: [0, 4]", several))
    with pytest.raises(RecipeError, match=r"runs with and without data\.multi_label have other scores"):
        runs_in(file)


def test_a_study_runs_to_its_end_and_no_run_is_made_twice(file: Path, mgtrain: Start) -> None:
    folder = file.parent
    assert "1 of 4 runs to train" in mgtrain(folder, "study", file, "--only", "baseline", "--seeds", 1).stderr
    first = mgtrain(folder, "study", file, "--jobs", 2, "--only", "baseline")
    assert first.returncode == 0, first.stderr
    assert "1 of 4 runs to train" in first.stderr
    assert "no result yet: short only" in first.stdout
    results = sorted(path.name for path in (folder / "results/study").glob("*.json"))
    assert results == ["baseline_0.json", "baseline_4.json"]
    before = {path: path.stat().st_mtime_ns for path in folder.glob("runs/study/*/evals.jsonl")}
    second = mgtrain(folder, "study", file, "--json")
    assert second.returncode == 0, second.stderr
    assert "2 of 4 runs to train" in second.stderr
    assert {path: path.stat().st_mtime_ns for path in before} == before
    base, group = json.loads(second.stdout)["groups"]
    assert (base["name"], group["name"], group["pairs"], base["seeds"]) == ("baseline", "short only", 2, [0, 4])
    assert [run["evaluations"] for run in base["runs"] + group["runs"]] == [2] * 4
    page = (folder / "results/study/index.html").read_text()
    assert "Is it as good?" in page
    again = "runs/study_again"  # where no run has a result yet
    assert f"<pre>mgtrain study {file} --runs {again} --results {again}/results</pre>" in page
    assert "schedule.long_cycle=[]" in page
    assert "<script" not in page
    # The runs' folders may go: the results are enough.
    kept = read_result(folder / "results/study/short_only_4.json")
    assert (kept.variant, kept.outcome.recipe["seed"], len(kept.curve)) == ("short only", 4, 2)
    assert kept.outcome.env["device"]
    assert kept.outcome.summary.finished
    found = [read_result(path) for path in sorted((folder / "results/study").glob("*.json"))]
    assert "schedule.short_cycle=[0.5, 0.7071]" in changes_of(found, "short only", "baseline")

    # What is missing, and whether times may come from other code, is said.
    study = load_study(file)
    assert summed_up(study, found)["warnings"] == []
    (lost,) = (warning for warning in summed_up(study, found[:-1])["warnings"] if "no result" in warning)
    assert lost == "short only: no result of 1 run (seed 4); if one failed, the comparison hides that"
    there = replace(found[-1].outcome, env={**found[-1].outcome.env, "git": "0123"})
    (moved,) = summed_up(study, [*found[:-1], replace(found[-1], outcome=there)])["warnings"]
    assert moved.startswith("short only: trained at another commit (0123, unknown) than baseline (unknown), which")

    # Another recipe under the same name is refused, and a damaged file.
    for old, new in (("times=2", "times=3"), ("times=2", "times=2, hardware.workers=1")):  # these change the times
        file.write_text(STUDY.replace(old, new))
        assert mgtrain(folder, "study", file).returncode == 4
    file.write_text(STUDY)
    assert "0 of 4 runs to train" in mgtrain(folder, "study", file).stderr
    # A result of an earlier version lacks keys that recipes have now: they had their defaults.
    result = folder / "results/study/baseline_0.json"
    old = json.loads(result.read_text())
    del old["recipe"]["augment.mixup"]
    old["recipe"]["evaluation.per_phase"] = 1
    result.write_text(json.dumps(old))
    assert known_result(runs_in(file)[0], result) is not None
    renamed = known_result(replace(runs_in(file)[0], variant="Baseline!"), result)
    assert renamed is not None
    assert renamed.variant == "Baseline!"
    first, second = found[0], found[-1]
    cleared = replace(second.outcome, recipe={**second.outcome.recipe, "optim.clip_norm": None})
    others = [
        replace(first, outcome=replace(first.outcome, recipe={**first.outcome.recipe, "optim.clip_norm": 1.0})),
        replace(second, outcome=cleared),
    ]
    assert "optim.clip_norm=null" in changes_of(others, "short only", "baseline")
    file.write_text(STUDY.replace("[1, 1]", "[2, 1]"))
    refused = mgtrain(folder, "study", file)
    assert refused.returncode == 4
    assert "baseline_0.json: the study's recipe has changed since: optim.stages [1.0, 1.0]" in (
        refused.stderr.replace("\n", " ")
    )
    assert f"; to train again, remove the file and {Path('runs/study/baseline_0')}; or" in refused.stderr.replace(
        "\n", " "
    )
    assert "(as for short_only_0, " in refused.stderr.replace("\n", " ")
    file.write_text(STUDY)
    videos = json.loads(result.read_text()) | {"videos": {"train": "0" * 16, "val": "0" * 16}}
    result.write_text(json.dumps(videos))
    other_videos = mgtrain(folder, "study", file)
    assert other_videos.returncode == 4
    assert "baseline_0.json: the study's videos have changed since; to train" in other_videos.stderr.replace("\n", " ")
    (run, *_) = runs_in(file)
    (folder / "bad.json").write_text('{"schema": "mgtrain.result/1", "variant": 1}')
    with pytest.raises(CheckpointError, match="not a readable result"):
        known_result(run, folder / "bad.json")
    assert known_result(run, folder / "none.json") is None
    del old["environment"]["torch"]
    (folder / "bad.json").write_text(json.dumps(old))
    with pytest.raises(CheckpointError, match="its environment lacks torch"):
        known_result(run, folder / "bad.json")
    whole = json.loads((folder / "results/study/short_only_4.json").read_text())
    for part, value in (
        ("curve", None), ("curve", [{}]), ("recipe", None), ("summary", whole["summary"] | {"accuracy": None}),
        ("summary", whole["summary"] | {"train_seconds": 0}), ("environment", whole["environment"] | {"devices": 5}),
    ):  # fmt: skip
        (folder / "bad.json").write_text(json.dumps(whole | {part: value}))
        with pytest.raises(CheckpointError, match="not a readable result"):
            read_result(folder / "bad.json")


def test_a_dry_run_forecasts_and_trains_nothing(file: Path, mgtrain: Start) -> None:
    done = mgtrain(file.parent, "study", file, "--dry-run", "--measure", 0.05, "--json", "--jobs", 2)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [(row["variant"], row["runs"]) for row in found["variants"]] == [("baseline", 2), ("short only", 2)]
    each = [row["seconds_each"] for row in found["variants"]]
    assert sum(each) * 0.999 < found["seconds"] < sum(each) + max(each)  # two runs of each, two at a time
    assert not (file.parent / "runs").exists()
    wrong = mgtrain(file.parent, "study", file, "--only", "long only")
    assert wrong.returncode == 2
    assert "--only long only: no such variant; allowed: baseline, short only" in wrong.stderr


def program(text: str) -> list[str]:
    """A command that takes the words of a run, as `mgtrain` does, and does something else."""
    return [sys.executable, "-c", f"import os, sys, time, signal\n{text}"]


def test_runs_that_fail_do_not_keep_others_from_running(file: Path, tmp_path: Path) -> None:
    finished: list[str] = []
    command = program("sys.exit(3 if sys.argv[2].endswith('recipes/baseline_0.yaml') else 0)")
    failed = train_all(runs_in(file), tmp_path / "runs", command, 2, [], lambda run: finished.append(run.name))
    assert [(run.name, code) for run, code in failed] == [("baseline_0", 3)]
    assert sorted(finished) == ["baseline_4", "short_only_0", "short_only_4"]


def test_runs_stop_where_their_study_fails(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits = (
        "ready = sys.argv[2].endswith('recipes/baseline_0.yaml')\n"
        "out = sys.argv[sys.argv.index('--name') + 1]\n"
        "assert os.path.isabs(out), out\nother = os.path.join(os.path.dirname(out), 'short_only_0', 'output.txt')\n"
        "def save(*_):\n    print('saved')\n    sys.exit(75)\n"
        "signal.signal(signal.SIGTERM, save)\nprint('ready', flush=True)\n"
        "while not ready: time.sleep(0.1)\n"
        "while not os.path.exists(other) or 'ready' not in open(other).read(): time.sleep(0.05)\n"
    )

    def full(run: Run) -> None:
        raise CheckpointError("the disk is full")

    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="the disk is full"):
        train_all(runs_in(file), Path("runs"), program(waits), 2, [], full)
    assert (tmp_path / "runs/short_only_0/output.txt").read_text().split() == ["ready", "saved"]


def test_runs_train_what_the_study_said_at_its_start(file: Path, tmp_path: Path) -> None:
    runs = runs_in(file)
    (tmp_path / "tiny.yaml").write_text("edited meanwhile")
    train_all(runs, tmp_path / "runs", program("print(open(sys.argv[2]).read())"), 1, [], lambda run: None)
    for run in runs:
        assert parse_recipe((tmp_path / "runs" / run.name / "output.txt").read_text(), "recipe") == run.recipe


def test_runs_stop_and_save_if_their_study_is_killed(file: Path, tmp_path: Path) -> None:
    waits = (
        "def save(*_):\n    print('saved', flush=True)\n    sys.exit(75)\n"
        "signal.signal(signal.SIGTERM, save)\nprint('ready', flush=True)\ntime.sleep(60)"
    )
    study = (
        "import sys; from pathlib import Path\n"
        "from mgtrain.runs.study.definition import load_study, runs_of\n"
        "from mgtrain.runs.study.jobs import train_all\n"
        f"file = Path({str(file)!r})\n"
        f"train_all(runs_of(load_study(file), file), Path('runs'), {program(waits)!r}, 1, [], print)"
    )
    output = tmp_path / "runs/baseline_0/output.txt"
    with subprocess.Popen([sys.executable, "-c", study], cwd=tmp_path) as process:
        while not output.is_file() or "ready" not in output.read_text():
            time.sleep(0.05)
            assert process.poll() is None
        process.kill()
    deadline = time.monotonic() + 30
    while "saved" not in output.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_study_without_its_first_variant_says_so(file: Path, mgtrain: Start) -> None:
    (file.parent / "not_a_folder").write_text("")
    refused = mgtrain(file.parent, "study", file, "--results", "not_a_folder")
    assert refused.returncode == 2
    assert not (file.parent / "runs/study/baseline_0").exists()
    done = mgtrain(file.parent, "study", file, "--only", "short only", "--seeds", 1, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["groups"], found["warnings"]) == (
        [], ["nothing to compare yet: baseline, with which the others are compared, has no result"]
    )  # fmt: skip


def test_jobs_have_cores_of_their_own(file: Path, tmp_path: Path) -> None:
    cores = sorted(os.sched_getaffinity(0))
    assert shares_of_cores(len(cores)) == [[core] for core in cores]
    assert shares_of_cores(1) == [cores]
    with pytest.raises(UsageError, match="runs that share a core cannot be compared in time; use --jobs"):
        shares_of_cores(len(cores) + 1)
    jobs = len(cores)
    say = "print(*os.sched_getaffinity(0), os.environ['OMP_NUM_THREADS'])"
    train_all(runs_in(file)[:jobs], tmp_path / "runs", program(say), jobs, [], lambda run: None)
    if jobs > 1:
        said = [(tmp_path / "runs" / run.name / "output.txt").read_text().split() for run in runs_in(file)[:jobs]]
        assert said == [[str(core), "1"] for core in cores[: len(said)]]
    with pinned(cores[:1]):
        assert os.sched_getaffinity(0) == set(cores[:1])
    assert os.sched_getaffinity(0) == set(cores)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=["asked", "terminal closed"])
def test_a_study_that_is_stopped_lets_its_runs_save(file: Path, tmp_path: Path, number: int) -> None:
    waits = (
        "def save(*_):\n    print('saved')\n    sys.exit(75)\n"
        "signal.signal(signal.SIGTERM, save)\nprint('ready', flush=True)\ntime.sleep(60)"
    )
    output = tmp_path / "runs/baseline_0/output.txt"

    def stop_when_ready() -> None:
        while not output.is_file() or "ready" not in output.read_text():
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=stop_when_ready)
    thread.start()
    with pytest.raises(StoppedError, match="run the same command again to resume the study"):
        train_all(runs_in(file), tmp_path / "runs", program(waits), 1, [], lambda run: None)
    thread.join()
    assert output.read_text().split() == ["ready", "saved"]
    assert not (tmp_path / "runs/short_only_0").exists()
