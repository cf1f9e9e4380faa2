"""Imports go down only, and who alone may do what: read out of the source."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import mgtrain

PACKAGE = Path(mgtrain.__file__).parent
FLOORS = [
    ["errors", "grid", "rng", "models.options", "watchdog", "signals", "machine"],
    ["recipe", "isolated", "manifest"],
    ["schedule", "reference"],
    ["clips.order", "clips.cut", "clips.decode", "clips.prepared", "clips.pixels", "clips.augment", "models",
     "datasets", "distributed", "console"],
    ["clips.loader", "checkpoint", "rundir", "prepare", "check", "predictions"],
    ["engine.checks", "engine.step", "engine.optim", "engine.evaluate", "engine.recalibrate", "engine.clock",
     "engine.mix", "engine.warmup", "engine.finite", "engine.memory", "engine.resume", "weights"],
    ["engine.fit", "engine.trained", "engine.predict", "engine.record", "engine.examples",
     "compare", "bench_step", "costs", "stats"],
    ["export", "report", "bench", "watch", "init"],
    ["forecast", "doctor"],
    ["cli"],
    ["__main__"],
]  # fmt: skip
PACKAGES = {"", "clips", "engine"}  # hold modules of several floors, and nothing but a docstring or a version
MODULES = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}
NAMES = {name.removesuffix("__init__").rstrip("."): path for name, path in MODULES.items()}


def floor_of(name: str) -> int:
    """The floor of a module: its own, or that of the package it is in."""
    for length in range(name.count(".") + 1, 0, -1):
        part = ".".join(name.split(".")[:length])
        for floor, names in enumerate(FLOORS):
            if part in names:
                return floor
    raise AssertionError(f"mgtrain.{name} is on no floor; give it one in tests/test_floors.py and in the design")


def imported(path: Path) -> Iterator[str]:
    """All modules that a file imports, anywhere in it: `from a import b` is a.b where that is one of ours."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write imports in full"
            assert node.module is not None
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full.removeprefix("mgtrain.") in NAMES or not full.startswith("mgtrain") else node.module


def test_every_module_has_a_floor() -> None:
    for name in NAMES:
        if name not in PACKAGES:
            floor_of(name)


@pytest.mark.parametrize("name", sorted(set(NAMES) - PACKAGES))
def test_a_module_imports_from_lower_floors_only(name: str) -> None:
    own = floor_of(name)
    for other in imported(NAMES[name]):
        target = other.removeprefix("mgtrain.")
        if target != other and target not in PACKAGES:
            floor = floor_of(target)
            neighbours = floor == own and target.partition(".")[0] == name.partition(".")[0]  # in one package
            assert floor < own or neighbours, f"mgtrain.{name} (floor {own}) imports {other} (floor {floor})"


def test_no_two_modules_import_each_other() -> None:
    below = {
        name: {o.removeprefix("mgtrain.") for o in imported(path) if o.startswith("mgtrain.")}
        for name, path in NAMES.items()
    }

    def reach(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"a circle: {' -> '.join((*path, name))}"
        for other in below.get(name, ()):
            if name != "models" and other != name:  # models/__init__ imports its models when first asked for one
                reach(other, (*path, name))

    for name in below:
        reach(name, ())


def users_of(word: str) -> set[str]:
    """The modules in whose code (not its comments and docstrings) a name such as `a.b` ends in `word`."""
    users = set()
    for name, path in NAMES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute | ast.Name) and ast.unparse(node).endswith(word):
                users.add(name)
    return users


def test_only_rng_makes_generators() -> None:
    assert users_of("np.random.Generator") >= {"rng"}  # others name the type
    assert users_of("default_rng") | users_of("Philox") | users_of("SeedSequence") == {"rng"}
    assert users_of("torch.Generator") == {"models.dropout"}  # rng.py knows no torch
    assert users_of("manual_seed") == {"models.dropout", "clips.augment", "engine.fit"}  # the last: the first weights
    assert users_of("default_generator") == users_of("set_rng_state") == {"clips.augment"}  # torchvision draws from it
    assert not any(
        other == "random" or other.startswith("random.") for path in NAMES.values() for other in imported(path)
    )


def test_only_distributed_imports_torch_distributed() -> None:
    users = {
        name for name, path in NAMES.items() for other in imported(path)
        if other.startswith(("torch.distributed", "torch.nn.parallel"))
    }  # fmt: skip
    assert users == {"distributed"}


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["--version"],
        ["fit", "--help"],
        ["recipes", "list"],
        ["recipes", "show", "demo_baseline"],
        ["plan", "k400_slowfast_8x8_r50_multigrid", "--gpus", "8", "--no-costs"],
        ["plan", "k400_slowfast_8x8_r50_multigrid", "--json", "--no-costs"],
        ["compare", "none", "nothing"],
        ["data", "index", "none", "--to", "lists"],
        ["data", "split", "none", "--val", "0.2", "--to", "lists"],
    ],
    ids=" ".join,
)
def test_commands_that_do_not_compute_do_not_import_torch(words: list[str], tmp_path: Path) -> None:
    program = (
        "import sys\nfrom mgtrain.cli import main\ntry:\n    main()\nfinally:\n"
        "    print('imported', *[m for m in ('torch', 'av', 'tensorboard') if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *words], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == (2 if "none" in words else 0), done.stderr
    assert done.stderr.splitlines()[-1] == "imported"
