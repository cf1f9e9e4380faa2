"""The documentation's commands run, and its reference is that of the program."""

from __future__ import annotations

import re
import runpy
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from ruamel.yaml import YAML
from test_floors import FLOORS, PACKAGE
from typer.testing import CliRunner

import mgtrain
from mgtrain.cli import app
from mgtrain.recipe import Recipe, shipped_recipes
from mgtrain.recipe.keys import reference

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# What makes a command of the pages quick; every other word stays as it is.
SMALL_DATA = ("--train", "2", "--val", "1", "--frames", "24")
SMALL = ("model={name: i3d_r50, width: 8, depth: [1, 1, 1, 1], dropout: 0.0}", "clip.frames=8", "clip.stride=1",
         "clip.crop=32", "clip.short_side=[32, 40]", "evaluation.crop=32", "evaluation.short_side=32",
         "evaluation.recalibration_batches=1", "batch.clips=4", "batch.bn_clips=4", "optim.stages=[1, 1]",
         "optim.warmup_epochs=0", "evaluation.times=2", "hardware.workers=0")  # fmt: skip
WITH_RECIPE = {("fit",), ("plan",), ("bench", "data")}


def commands(page: Path) -> list[str]:
    """The lines of a page's `sh` blocks, without comments and indentation."""
    blocks = re.findall(r"^ *```sh\n(.*?)^ *```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    lines = (re.sub(r"\s+# .*|\s{2,}#.*", "", line).strip() for block in blocks for line in block.splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def leaves(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """All commands that do something, with the words that name them."""
    if hasattr(command, "commands"):
        for name, one in command.commands.items():
            yield from leaves(one, (*path, name))
    else:
        yield path, command


LEAVES = dict(leaves(typer.main.get_command(app)))


def split_words(line: str) -> tuple[tuple[str, ...], list[str]]:
    """The words that name a command of mgtrain's, and the others."""
    words = shlex.split(line.partition("-m mgtrain")[2] if "-m mgtrain" in line else line.removeprefix("mgtrain"))
    for end in (">", "|"):
        words = words[: words.index(end)] if end in words else words
    for length in (2, 1):
        if tuple(words[:length]) in LEAVES:
            return tuple(words[:length]), words[length:]
    raise AssertionError(f"{line}: no such command")


OURS = [
    pytest.param(line, id=f"{page.stem}: {line}")
    for page in PAGES
    for line in commands(page)
    if re.match(r"mgtrain (?!-)|torchrun .*-m mgtrain", line)
]


@pytest.mark.parametrize("line", OURS)
def test_every_command_of_the_pages_exists_with_these_options(line: str) -> None:
    path, words = split_words(line)
    LEAVES[path].make_context(" ".join(path), [*words])  # raises what the user would be told
    if path in WITH_RECIPE and words[0] in shipped_recipes():
        changes = [word for word in words if re.match(r"[a-z_]+\.[a-z_]+=", word)]
        done = CliRunner().invoke(app, ["plan", words[0], "--no-costs", "--videos", "1000", *changes])
        assert done.exit_code == 0, done.output


def run_page(name: str, folder: Path, replaced: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a page's commands in a folder, one after the other, made quick."""
    monkeypatch.chdir(folder)
    for line in commands(ROOT / "docs" / name):
        for old, new in replaced.items():
            line = line.replace(old, new)
        if not line.startswith("mgtrain"):
            if line.startswith("sed"):
                subprocess.run(line, shell=True, check=True)
            continue
        path, words = split_words(line)
        words += SMALL if path in WITH_RECIPE else SMALL_DATA if path == ("data", "synthesize") else ()
        done = CliRunner().invoke(app, [*path, *words])
        assert done.exit_code == 0, f"{line}: {done.output} {done.exception!r}"
        if " > " in line:
            Path(line.partition(" > ")[2]).write_text(done.stdout)


@pytest.mark.usefixtures("quick_doctor")
def test_the_quick_start_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_page("tutorial/quick-start.md", tmp_path, {}, monkeypatch)
    assert "demo_multigrid" in (tmp_path / "demo.html").read_text()


@pytest.mark.slow
def test_ones_own_data_run(motions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    videos = sorted(motions.rglob("*.mp4"))
    for c, name in enumerate(("wave", "bow")):
        (tmp_path / "my_clips" / name).mkdir(parents=True)
        for n in range(12):
            shutil.copy(videos[12 * c + n], tmp_path / "my_clips" / name / f"person{n // 2}_take{n % 2}.mp4")
    run_page("tutorial/your-data.md", tmp_path, {}, monkeypatch)
    assert "my_clips_multigrid" in (tmp_path / "report.html").read_text()
    assert len((tmp_path / "scores.csv").read_text().splitlines()) > 2


@pytest.mark.slow
def test_kinetics_runs(motions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for split in ("train", "val"):
        rows = ["label,youtube_id,time_start,time_end,split"]
        (tmp_path / "k400" / split).mkdir(parents=True)
        for n, video in enumerate(sorted((motions / "videos" / split).rglob("*.mp4"))[::3]):
            name = f"{split:_<9}{n:02d}"
            shutil.copy(video, tmp_path / "k400" / split / f"{name}_000001_000002.mp4")
            rows.append(f"{'bow' if n % 2 else 'wave'},{name},1,2,{split}")
        (tmp_path / f"k400/{split}.csv").write_text("\n".join(rows))
    replaced = {"/data/k400": str(tmp_path / "k400"), "/scratch/k400": str(tmp_path / "prepared")}
    replaced |= {"root: .*|": "classes: 400|classes: 2|; s|root: .*|", "--gpus 8": "--gpus 1"}
    run_page("how-to/kinetics.md", tmp_path, replaced, monkeypatch)


def test_the_reference_is_that_of_the_program() -> None:
    generated = {
        "recipe.md": reference(),
        "cli.md": runpy.run_path(str(ROOT / "scripts/reference.py"))["command_page"](),
    }
    for name, page in generated.items():
        written = (ROOT / "docs/reference" / name).read_text(encoding="utf-8")
        assert written == page, "run: python scripts/reference.py"
    assert "|  |" not in reference(), "a key without a description"
    for section, field in Recipe.model_fields.items():
        for kind in getattr(field.annotation, "__args__", (field.annotation,)):
            for key in getattr(kind, "model_fields", ()):
                assert key == "name" or f"| `{key}` |" in reference(), f"{section}.{key}"


def test_the_drawings_are_those_of_the_script_and_name_modules_that_exist() -> None:
    script = runpy.run_path(str(ROOT / "scripts/drawings.py"))
    for name, drawn in script["drawings"]().items():
        assert (ROOT / "docs/assets" / name).read_text(encoding="utf-8") == drawn, "run: python scripts/drawings.py"
    boxes = [files for band in script["CLIP"] + script["STEP"] for _, files in band.boxes]
    missing = [file for files in boxes for file in files.split() if not (PACKAGE / file).exists()]
    assert not missing
    assert [[name for name, _ in rooms] for rooms in reversed(script["ROOMS"])] == FLOORS


def test_drawings_are_readable_on_light_and_on_dark_pages() -> None:
    drawings = {file.name: file.read_text(encoding="utf-8") for file in (ROOT / "docs").rglob("*.svg")}
    assert len(drawings) > 4
    for name, drawn in drawings.items():
        twin = name.replace("-light.", "-dark.") if "-light." in name else name.replace("-dark.", "-light.")
        assert "prefers-color-scheme: dark" in drawn or (twin != name and twin in drawings), name
        assert 'fill: #ffffff"' not in drawn, f"{name} has a white background"


def test_the_navigation_has_every_page_once_in_four_kinds() -> None:
    site = YAML(typ="safe").load(ROOT / "mkdocs.yml")
    kinds = {title: entry for part in site["nav"] for title, entry in part.items() if isinstance(entry, list)}
    assert list(kinds) == ["Tutorial", "How to", "Reference", "Explanation"]
    shown = ["index.md", *(page for entries in kinds.values() for entry in entries for page in entry.values())]
    assert sorted(shown) == sorted(page.relative_to(ROOT / "docs").as_posix() for page in PAGES[1:])
    for kind, entries in kinds.items():
        folder = kind.lower().replace(" ", "-")
        assert all(page.startswith(f"{folder}/") for entry in entries for page in entry.values()), kind


def test_the_python_page_documents_the_public_names() -> None:
    page = (ROOT / "docs/reference/python.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^::: mgtrain\.(\w+)$", page, re.MULTILINE)) == sorted(mgtrain.__all__)


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        text = re.sub(r"`[^`\n]*`", "", page.read_text(encoding="utf-8"))
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
            assert target.startswith("http") or (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("path", LEAVES, ids=" ".join)
def test_every_command_has_an_example_that_it_would_take(path: tuple[str, ...]) -> None:
    text = LEAVES[path].help or ""
    if path == ("recipes", "list"):
        return
    assert "Example" in text, f"mgtrain {' '.join(path)}: no example"
    shown = " ".join(re.split(r"Examples?:", text)[1].split())
    for example in shown.split("  |  ") if "  |  " in shown else re.split(r" \| (?=mgtrain|torchrun)", shown):
        found, words = split_words(example.strip())
        assert found == path or example.startswith("torchrun")
        LEAVES[found].make_context(" ".join(found), words)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_knows_the_commands(shell: str) -> None:
    done = CliRunner().invoke(
        app, [], prog_name="mgtrain",
        env={"_MGTRAIN_COMPLETE": f"complete_{shell}", "COMP_WORDS": "mgtrain re", "COMP_CWORD": "1",
             "_TYPER_COMPLETE_ARGS": "mgtrain re", "_TYPER_COMPLETE_FISH_ACTION": "get-args"},
    )  # fmt: skip
    assert "report" in done.output
    assert "recipes" in done.output
