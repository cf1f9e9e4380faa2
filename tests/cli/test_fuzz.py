"""Whatever is written into a recipe or a list of videos, a command takes it or refuses it in one line.

The quick tests draw the same examples each time; the slow ones draw others for some minutes.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch  # here, so that no example pays for it
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

import mgtrain.engine.start
from mgtrain.cli import main
from mgtrain.recipe import shipped_recipes

CODES = {0, 2, 3, 4, 69}  # what a command may say to something odd: never 1, which is our mistake
LISTS = {
    "list": "a b.mp4 1\nc,d.mp4 0\nsub/e.mp4 2\nf.mp4 3\n",
    "kinetics": "label,youtube_id,time_start,time_end,split\nleft,xxxxxxxxxxx,20,30,train\nup,yyyyyyyyyyy,3,13,train\n",
    "charades": "id,actions\nleft_0,c092 11.90 21.20;c147 0.00 12.60\nleft_1,\n",
    "something_something": '[{"id": "left_0", "template": "[a]"}, {"id": "left_1", "template": "b"}]',
}


def quick(examples: int) -> Any:
    return settings(
        max_examples=examples, derandomize=True, database=None, deadline=None, suppress_health_check=[*HealthCheck]
    )


def slow(examples: int) -> Any:
    return settings(max_examples=examples, database=None, deadline=None, suppress_health_check=[*HealthCheck])


class Accepted(BaseException):
    """Raised where a run would begin to write."""


def call(folder: Path, *words: str) -> tuple[int, str]:
    """The exit code and stderr of a command in a folder; 0 where `fit` would begin."""
    out, err, argv, before = io.StringIO(), io.StringIO(), sys.argv, Path.cwd()
    sys.argv = ["mgtrain", *words]
    os.chdir(folder)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
    except SystemExit as end:
        return int(end.code or 0), err.getvalue()
    except Accepted:
        return 0, err.getvalue()
    finally:
        sys.argv = argv
        os.chdir(before)
    raise AssertionError("main always exits")


def check(folder: Path, *words: str) -> int:
    """A command accepts, or refuses in one line with a documented code, and leaves no run directory."""
    code, errors = call(folder, *words)
    assert code in CODES, errors
    assert "Traceback" not in errors
    lines = [line for line in errors.splitlines() if not line.startswith("warning: ")]
    if code:
        assert len(lines) == 1, errors
        assert lines[0].startswith("mgtrain: ")
        assert len(lines[0]) > len("mgtrain: ")
    assert all(character.isprintable() or character == "\n" for character in errors if ord(character) < 0xA0)
    assert not (folder / "runs").exists()
    return code


NUMBERS = st.one_of(
    st.sampled_from([0, 1, 2, 3, 7, 8, 16, 2**31, 2**63, 10**18, 10**400, -1, -(10**30)]),
    st.integers(-3, 70),
    st.sampled_from([0.0, -0.0, 0.5, 1.0, 1.5, 1e-320, 1e-9, 1e9, 1e308, math.inf, -math.inf, math.nan]),
    st.floats(),
)
TEXTS = st.one_of(
    st.text(max_size=12),
    st.sampled_from(["", "list", "folder", "i3d_r50", "../x", "/", "~", "[red]", "x" * 5000]),
    st.sampled_from(["\0", "\x1b[2J", "\u202e", "\ud800"]),
)
VALUES = st.recursive(
    st.one_of(NUMBERS, TEXTS, st.booleans(), st.none()),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=6,
)


def written(value: Any) -> str:
    """A value as YAML, by way of JSON; numbers that JSON lacks as YAML has them, and nothing refused."""
    text = json.dumps(value)
    for word, number in (("Infinity", ".inf"), ("NaN", ".nan")):
        text = text.replace(word, number)
    return text


@st.composite
def odd_trees(draw: st.DrawFn, text: str) -> str:
    """A recipe in which keys are dropped, get other values or other names, or come in where they do not belong."""
    tree = YAML(typ="safe", pure=True).load(text)
    for _ in range(draw(st.integers(1, 3))):
        node = tree
        while True:
            keys = list(range(len(node)) if isinstance(node, list) else node)
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if isinstance(node[key], dict | list) and draw(st.integers(0, 4)):
                node = node[key]
                continue
            match draw(st.sampled_from(["replace", "replace", "drop", "rename", "add", "deep"])):
                case "drop":
                    del node[key]
                case "rename" if isinstance(node, dict):
                    node[draw(st.text(max_size=8))] = node.pop(key)
                case "add" if isinstance(node, dict):
                    node[draw(st.sampled_from(["classes", "name", "lr", "x"]))] = draw(VALUES)
                case "deep":
                    for _ in range(draw(st.sampled_from([1, 15, 500]))):
                        node[key] = [node[key]]
                case _:
                    node[key] = draw(VALUES)
            break
    return written(tree)


@st.composite
def odd_texts(draw: st.DrawFn, text: str) -> str:
    """A text in which pieces are cut out, doubled or put in."""
    signs = ["\n", ": ", "- ", "[", "}", "&a ", "*a", "!!x ", "|\n", "'", '"', "#", "%", "\t", ",", ";"]
    pieces = st.one_of(TEXTS, st.sampled_from(signs))
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(text)))
        end = min(len(text), start + draw(st.integers(0, 12)))
        middle = draw(st.one_of(st.just(""), st.just(2 * text[start:end]), pieces, NUMBERS.map(written)))
        text = text[:start] + middle + text[end:]
    return text


def odd(text: str) -> st.SearchStrategy[bytes]:
    texts = st.one_of(odd_trees(text), odd_texts(text)).map(lambda odd: odd.encode("utf-8", "surrogatepass"))
    return st.one_of(texts, texts, texts, st.binary(max_size=40))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_text: str, motions: Path) -> Iterator[Path]:
    """A folder in which `fit` stops where it would begin to write."""
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "tiny.yaml").write_text(tiny_text)
    (folder / "root").mkdir()
    (folder / "root/videos").symlink_to(motions / "videos/val")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mgtrain.engine.start, "describe_run", _begin)
        yield folder
    assert torch.get_num_threads() == 1


def _begin(*_: object, **__: object) -> None:
    raise Accepted


def recipes_are_taken_or_refused(data: st.DataObject, folder: Path, tiny_text: str) -> None:
    (folder / "odd.yaml").write_bytes(data.draw(odd(tiny_text)))
    planned = check(folder, "plan", "--no-costs", "odd.yaml")
    trained = check(folder, "fit", "odd.yaml", "--device", "cpu")
    assert trained or not planned  # what fit takes, plan takes


def shipped_recipes_are_taken_or_refused(data: st.DataObject, folder: Path) -> None:
    name = data.draw(st.sampled_from(sorted(shipped_recipes())))
    (folder / "odd.yaml").write_bytes(data.draw(odd(shipped_recipes()[name].read_text())))
    check(folder, "plan", "--no-costs", "odd.yaml", "--json")


def overrides_are_taken_or_refused(data: st.DataObject, folder: Path) -> None:
    keys = ["seed", "data.root", "data.classes", "clip.frames", "optim", "optim.lr", "schedule.name", "x.y"]
    key = data.draw(st.one_of(st.sampled_from(keys), TEXTS))
    value = data.draw(
        st.one_of(VALUES.map(written), TEXTS, st.sampled_from(["", "[", "&a 1", "!!x", "1\n2", "{a: 1}"]))
    )
    word = f"{key}={value}".replace("\0", "")  # which no command can be given
    if not word.startswith("-"):
        check(folder, "plan", "--no-costs", "tiny.yaml", word)


def annotations_are_taken_or_refused(data: st.DataObject, folder: Path, tiny_text: str, motions: Path) -> None:
    format = data.draw(st.sampled_from(sorted(LISTS)))
    text = data.draw(st.one_of(odd_texts(LISTS[format]), odd_texts(LISTS[format]), st.text(max_size=50)))
    root = folder / "root"
    (root / "train.csv").write_bytes(text.encode("utf-8", "surrogatepass"))
    (root / "val.csv").write_text(LISTS[format])
    labels = '{"a": 0, "b": 1}'
    (root / "labels.json").write_text(data.draw(st.one_of(st.just(labels), st.just(labels), odd_texts(labels)))
                                      .encode("utf-8", "replace").decode())  # fmt: skip
    recipe = tiny_text.replace(str(motions), str(root)).replace("format: list", f"format: {format}")
    classes = {"charades": 157, "list": 4}.get(format, 2)
    (folder / "lists.yaml").write_text(recipe.replace("classes: 4", f"classes: {classes}"))
    check(folder, "data", "index", "lists.yaml", "--to", "made")
    shutil.rmtree(folder / "made", ignore_errors=True)


@quick(15)
@given(st.data())
def test_fit_and_plan_take_or_refuse_any_recipe(folder: Path, tiny_text: str, data: st.DataObject) -> None:
    recipes_are_taken_or_refused(data, folder, tiny_text)


@quick(20)
@given(st.data())
def test_plan_takes_or_refuses_any_change_to_a_shipped_recipe(folder: Path, data: st.DataObject) -> None:
    shipped_recipes_are_taken_or_refused(data, folder)


@quick(20)
@given(st.data())
def test_plan_takes_or_refuses_any_override(folder: Path, data: st.DataObject) -> None:
    overrides_are_taken_or_refused(data, folder)


@quick(40)
@given(st.data())
def test_index_takes_or_refuses_any_annotations(
    folder: Path, tiny_text: str, motions: Path, data: st.DataObject
) -> None:
    annotations_are_taken_or_refused(data, folder, tiny_text, motions)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@slow(3000)
@given(st.data())
def test_many_recipes_overrides_and_annotations_are_taken_or_refused(
    folder: Path, tiny_text: str, motions: Path, data: st.DataObject
) -> None:
    match data.draw(st.integers(0, 3)):
        case 0:
            recipes_are_taken_or_refused(data, folder, tiny_text)
        case 1:
            shipped_recipes_are_taken_or_refused(data, folder)
        case 2:
            overrides_are_taken_or_refused(data, folder)
        case _:
            annotations_are_taken_or_refused(data, folder, tiny_text, motions)
