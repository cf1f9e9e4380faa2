"""What the project says of itself outside of its code: the image, the wheel's metadata, how to cite it."""

from __future__ import annotations

import configparser
import email
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from ruamel.yaml import YAML

import mgtrain

ROOT = Path(__file__).parent.parent
DOCKERFILE = (ROOT / "Dockerfile").read_text()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Built, as the image builds it, from what the Dockerfile copies and .dockerignore lets pass, and nothing else."""
    folder = tmp_path_factory.mktemp("source")
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    passed = {line[1:] for line in ignored if line.startswith("!")}
    assert "*" in ignored
    for words in re.findall(r"^COPY (?!--)(.+)$", DOCKERFILE, re.MULTILINE):
        *sources, target = words.split()
        assert set(sources) <= passed, f"{sources} are not sent to Docker"
        for source in sources:
            copy = shutil.copytree if (ROOT / source).is_dir() else shutil.copy
            copy(ROOT / source, folder / target)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--wheel-dir", folder / "wheels", folder], check=True, timeout=120)
    (made,) = (folder / "wheels").iterdir()
    return zipfile.ZipFile(made)


def test_what_the_image_is_built_from_makes_the_whole_wheel(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    ours = {
        path.relative_to(ROOT).as_posix() for path in (ROOT / "mgtrain").rglob("*") if path.suffix in (".py", ".j2")
    }
    recipes = {f"mgtrain/recipes/{path.name}" for path in (ROOT / "recipes").iterdir()}
    assert len(recipes) > 10
    assert (ours | recipes | {"mgtrain/py.typed"}) - names == set()


def test_the_images_stages_and_program_fit_together() -> None:
    stages = re.findall(r"^FROM python:\$\{PYTHON\}-slim(?: AS (\w+))?$", DOCKERFILE, re.MULTILINE)
    assert stages == ["wheel", ""]
    assert re.findall(r"--from=(\w+) (\S+)", DOCKERFILE) == [("wheel", "/wheels")]
    assert "--wheel-dir /wheels" in DOCKERFILE
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    (program,) = re.findall(r'^ENTRYPOINT \["(\w+)"\]$', DOCKERFILE, re.MULTILINE)
    assert f"{program} =" in config["options.entry_points"]["console_scripts"]
    (python,) = re.findall(r"^ARG PYTHON=(\S+)$", DOCKERFILE, re.MULTILINE)
    assert f"Programming Language :: Python :: {python}" in config["metadata"]["classifiers"]
    assert "gcc" in DOCKERFILE, "Triton needs it"


def test_the_wheels_metadata(wheel: zipfile.ZipFile) -> None:
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    said = email.message_from_bytes(wheel.read(name))
    assert (said["Name"], said["Version"], said["License"]) == ("mgtrain", mgtrain.__version__, "Apache-2.0")
    assert said.get_all("Project-URL") == ["Paper, https://arxiv.org/abs/1912.00998"]
    assert "multigrid training" in said["Keywords"]
    classifiers = said.get_all("Classifier") or []
    assert len(set(classifiers)) == len(classifiers) > 10
    assert "Typing :: Typed" in classifiers
    assert not any(c.startswith("License ::") for c in classifiers), "the licence stands in its own field"
    oldest = said["Requires-Python"].removeprefix(">=")
    versions = [c.rpartition(" ")[2] for c in classifiers if re.search(r"Python :: 3\.", c)]
    assert versions[0] == oldest
    assert str(said.get_payload()).startswith("# ")


def test_the_citation_names_the_software_and_the_paper() -> None:
    cited = YAML(typ="safe").load(ROOT / "CITATION.cff")
    assert {"cff-version", "message", "title", "authors"} <= set(cited)
    assert (cited["version"], cited["license"]) == (mgtrain.__version__, "Apache-2.0")
    (paper,) = cited["references"]
    assert [author["family-names"] for author in paper["authors"]] == [
        "Wu", "Girshick", "He", "Feichtenhofer", "Krähenbühl"
    ]  # fmt: skip
    assert (paper["year"], paper["type"]) == (2020, "conference-paper")
    assert paper["url"] in (ROOT / "README.md").read_text()
