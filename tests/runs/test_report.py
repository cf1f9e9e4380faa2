"""The report: one file, nothing from elsewhere, every number a comparison has, nothing that a name could do."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from warm import Start

from mgtrain.cli.compare import parse_thresholds
from mgtrain.engine.examples import example_frames
from mgtrain.engine.fit import fit
from mgtrain.errors import CheckpointError, UsageError
from mgtrain.processes.distributed import World
from mgtrain.recipe import Recipe
from mgtrain.runs.compare import compare
from mgtrain.runs.folder import RunDir
from mgtrain.runs.groups import compare_groups, grouped, verdicts
from mgtrain.runs.history import History
from mgtrain.runs.report import render_report, write_report

HOSTILE = "<script>alert(1)</script>\"'&"


class Page(HTMLParser):
    """Reads a page: its tags, attributes and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def runs(tiny: Callable[..., Recipe], straight: Path, tmp_path_factory: pytest.TempPathFactory) -> list[RunDir]:
    """A baseline, whose name is an attack, and a multigrid run."""
    folder = tmp_path_factory.mktemp("runs")
    made = [RunDir(folder / "<b>slow"), RunDir(folder / "fast")]
    fit(tiny("schedule={name: baseline}"), made[0], World())
    shutil.copytree(straight, made[1].path, ignore=shutil.ignore_patterns("*.safetensors"))
    data = made[1].read("data.json")
    for run in made:
        run.write("data.json", {**data, "classes": [HOSTILE, *data["classes"][1:]]})
    return made


@pytest.fixture(scope="module")
def page(runs: list[RunDir]) -> Page:
    return Page(render_report(runs, example_frames(runs[-1])))


def test_nothing_comes_from_elsewhere_and_nothing_runs(page: Page) -> None:
    tags = [tag for tag, _ in page.tags]
    assert not {"script", "iframe", "object", "embed", "b"} & set(tags)
    for tag, attributes in page.tags:
        for key, value in attributes.items():
            assert not key.startswith("on")
            if key in ("src", "href", "xlink:href"):
                assert (value or "").startswith(("data:", "#")), (tag, value)
    policy = next(
        a["content"] for t, a in page.tags if t == "meta" and a.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def test_names_are_shown_as_they_are(page: Page) -> None:
    assert HOSTILE in page.text
    assert "<b>slow" in page.text


def test_the_page_says_what_the_comparison_says(runs: list[RunDir], page: Page) -> None:
    result = compare(*runs)
    assert result["verdict"] in page.text
    for words in (
        "3.18x less",
        "1.50x more",
        f"{100 * result['runs'][1]['accuracy']:.1f} %",
        "16x8x16²",
        "mean class",
        f"{100 * result['runs'][1]['mean_class']:.1f} %",
        "schedule.name",
    ):
        assert words in page.text, words


def test_every_figure_has_words_and_a_table(page: Page) -> None:
    pictures = [attributes for tag, attributes in page.tags if tag == "svg"]
    assert len(pictures) == 6 + 2 * 2
    assert all(len(picture["aria-label"] or "") > 20 for picture in pictures)
    assert sum(tag == "details" for tag, _ in page.tags) >= len(pictures)
    shown = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(shown) == 7  # shapes that the plan has steps of
    assert all("frames of a training clip at" in (picture["alt"] or "") for picture in shown)
    identifiers = [attributes["id"] for _, attributes in page.tags if attributes.get("id")]
    referred = re.findall(r"#([\w-]+)", " ".join(str(v) for _, a in page.tags for k, v in a.items() if "href" in k))
    assert set(referred) <= set(identifiers)


def test_time_is_split_into_all_there_is(runs: list[RunDir]) -> None:
    from mgtrain.runs.report import _split

    run = History(runs[1])
    view = {"split": _split(run), "summary": run.summary}
    last = runs[1].rows("evals.jsonl")[-1]
    assert sum(part["compute"] + part["data"] for part in view["split"]) == pytest.approx(last["train_seconds"])
    assert [part["phase"] for part in view["split"]] == list(range(6))
    assert sum(part["evaluation"] for part in view["split"]) == pytest.approx(view["summary"].eval_seconds)


def test_one_run_and_runs_without_their_data_are_reported_as_well(runs: list[RunDir], tmp_path: Path) -> None:
    page = Page(render_report(runs[:1]))
    assert not [tag for tag, _ in page.tags if tag == "img"]
    assert "less training time" not in page.text
    text = (runs[1].path / "recipe.yaml").read_text()
    try:
        recipe = runs[1].recipe()
        elsewhere = recipe.changed("data", root="/nowhere")
        (runs[1].path / "recipe.yaml").write_text(elsewhere.to_yaml())
        page = Page(render_report(runs, example_frames(runs[-1])))
    finally:
        (runs[1].path / "recipe.yaml").write_text(text)
    assert not [tag for tag, _ in page.tags if tag == "img"]


def test_seeds_are_judged_together(tiny: Callable[..., Recipe], runs: list[RunDir], tmp_path: Path) -> None:
    both = [*runs]
    for n, run in enumerate(runs):
        shutil.copytree(run.path, tmp_path / f"again{n}")
        both.append(RunDir(tmp_path / f"again{n}"))
        both[-1].write("recipe.yaml", run.recipe().to_yaml().replace("seed: 3", "seed: 4"))
    page = Page(render_report(both))
    (said,) = verdicts(compare_groups(grouped(both)))
    assert said in page.text
    assert "2 pairs of runs" in said
    assert "The recipes of <b>slow and fast differ in" in page.text
    assert "not only differ in schedule" not in page.text  # seeds differ on purpose
    assert "Most frequent mistakes of <b>slow" in page.text
    assert "equal accuracies do not show the spread" in page.text
    assert "pairs of runs" not in Page(render_report(runs)).text
    assert "margin 50 points" in Page(render_report(both, margin=50.0)).text
    assert "margin 1 point" not in Page(render_report(both, margin=50.0)).text


def test_damaged_logs_are_one_line(runs: list[RunDir], tmp_path: Path) -> None:
    shutil.copytree(runs[1].path, tmp_path / "bad")
    (tmp_path / "bad" / "plan.json").write_text('{"videos": 24, "flops_per_clip": []}')
    with pytest.raises(CheckpointError, match="the logs are damaged"):
        render_report([RunDir(tmp_path / "bad")])


def test_the_command_writes_the_file(runs: list[RunDir], tmp_path: Path, mgtrain: Start) -> None:
    write_report(runs, tmp_path / "deep" / "r.html")
    assert (tmp_path / "deep/r.html").read_text().startswith("<!DOCTYPE html>")
    with pytest.raises(CheckpointError, match="cannot be written"):
        write_report(runs, tmp_path)
    result = mgtrain(
        tmp_path, "compare", runs[0].path, runs[1].path, "--html", "c.html", "--fail-under", "steps=4", "--csv", "c.csv"
    )
    assert result.returncode == 6
    assert "steps is 3.18, less than 4" in result.stderr
    assert (tmp_path / "c.html").exists()
    twice = mgtrain(tmp_path, "compare", runs[0].path, runs[1].path, runs[1].path)
    assert (twice.returncode, "is named twice, but counts as one run" in twice.stderr) == (2, True)
    for text in ("x", "speedup=nan", "speedup=x", "sped=1"):
        with pytest.raises(UsageError, match="--fail-under"):
            parse_thresholds(text)
