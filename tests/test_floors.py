"""Imports go down only, and who alone may do what: read out of the source."""

from __future__ import annotations

import ast
import configparser
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import mgtrain

PACKAGE = Path(mgtrain.__file__).parent
FLOORS = [
    ["errors", "rng", "grid", "console"],
    ["recipe", "processes"],
    ["schedule", "data", "models"],
    ["clips", "runs"],
    ["engine"],
    ["preflight"],
    ["cli"],
]
MODULES = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}
NAMES = {name.removesuffix("__init__").rstrip("."): path for name, path in MODULES.items()}


def room_of(name: str) -> str:
    """The room of a module: the package, or the module, at the top."""
    return name.partition(".")[0]


def floor_of(name: str) -> int:
    """The floor of a module is that of its room."""
    for floor, rooms in enumerate(FLOORS):
        if room_of(name) in rooms:
            return floor
    raise AssertionError(
        f"mgtrain.{name} is on no floor; give its room one in tests/test_floors.py and CONTRIBUTING.md"
    )


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


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"", "__main__"}))
def test_a_module_imports_from_its_room_and_lower_floors_only(name: str) -> None:
    own = floor_of(name)
    for other in imported(NAMES[name]):
        target = other.removeprefix("mgtrain.")
        if target not in (other, "", "__version__") and room_of(target) != room_of(name):
            assert floor_of(target) < own, f"mgtrain.{name} (floor {own}) imports {other} (floor {floor_of(target)})"


def test_a_house_that_one_person_can_hold_in_the_head() -> None:
    lines = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in MODULES.items()}
    packages = {room_of(name) for name in MODULES if "." in name}
    assert len(packages) <= 10
    assert len(MODULES.keys() - {name for name in MODULES if "." in name}) <= 6
    assert len(FLOORS) <= 7
    assert {name: n for name, n in lines.items() if n > 400} == {}
    sizes: dict[str, int] = {}  # a package inside a package has a limit of its own
    for name, n in lines.items():
        sizes[name.rpartition(".")[0]] = sizes.get(name.rpartition(".")[0], 0) + n
    assert {package: n for package, n in sizes.items() if n > 2000} == {}


def test_the_wheel_has_every_package() -> None:
    config = configparser.ConfigParser()
    config.read(PACKAGE.parent / "setup.cfg")
    listed = set(config["options"]["packages"].split()) - {"mgtrain.recipes"}  # it lies beside the package
    assert listed == {".".join(path.parent.relative_to(PACKAGE.parent).parts) for path in PACKAGE.rglob("__init__.py")}


def test_no_two_modules_import_each_other() -> None:
    below = {
        name: {o.removeprefix("mgtrain.") for o in imported(path) if o.startswith("mgtrain.")}
        for name, path in NAMES.items()
    }

    def reach(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"a circle: {' -> '.join((*path, name))}"
        for other in below.get(name, ()):
            if other != name:
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
    assert users_of("manual_seed") == {"models.dropout", "clips.augment", "engine.start"}  # the last: the first weights
    assert users_of("default_generator") == users_of("fork_rng") == {"clips.augment"}  # torchvision draws from it
    assert users_of("set_rng_state") == set()
    assert not any(
        other == "random" or other.startswith("random.") for path in NAMES.values() for other in imported(path)
    )


def test_only_distributed_imports_torch_distributed() -> None:
    users = {
        name for name, path in NAMES.items() for other in imported(path)
        if other.startswith(("torch.distributed", "torch.nn.parallel"))
    }  # fmt: skip
    assert users == {"processes.distributed"}


def test_the_python_interface_has_the_names_that_it_lists() -> None:
    for name in mgtrain.__all__:
        assert getattr(mgtrain, name).__name__ == name
    with pytest.raises(AttributeError):
        mgtrain.__getattr__("nothing")


COMMANDS = {  # by their exit codes
    0: ["--help", "--version", "fit --help", "recipes list", "recipes show demo_baseline",
        "plan k400_slowfast_8x8_r50_multigrid --gpus 8 --no-costs", "plan k400_slowfast_8x8_r50_multigrid --json"],
    2: ["compare none nothing", "data index none --to lists", "data split none --val 0.2 --to lists", "data check none",
        "data stats none", "data prepare none", "fit none", "fit demo_multigrid optim.none=1",
        "fit demo_multigrid --baseline none", "bench data none", "bench step none",
        "doctor none", "eval none", "predict none a.mp4", "export none --to onnx", "ckpt verify none", "report none",
        "watch none"],
    3: ["init --data none", "fit demo_multigrid --procs 3"],
}  # fmt: skip
# Of each line of stdin, in a process that has imported the command line only: the exit code, and what is imported.
IMPORTS = """
import os, sys
from mgtrain.cli import main
for line in sys.stdin:
    if not os.fork():
        sys.argv, code = ["mgtrain", *line.split()], 1
        os.dup2(2, 1)
        try:
            main()
        except SystemExit as end:
            code = end.code
        finally:
            slow = [name for name in ("torch", "av", "tensorboard") if name in sys.modules]
            print("imported:", line.strip(), code, *slow, sep=";", file=sys.stderr, flush=True)
            os._exit(0)
    os.wait()
"""


def test_commands_that_do_not_compute_and_those_that_refuse_do_not_import_torch(tmp_path: Path) -> None:
    expected = {line: [str(code)] for code, lines in COMMANDS.items() for line in lines}
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS], input="\n".join(expected), cwd=tmp_path, capture_output=True, text=True
    )
    said = [line.split(";")[1:] for line in done.stderr.splitlines() if line.startswith("imported:")]
    assert {line: found for line, *found in said} == expected
    assert "Traceback" not in done.stderr
