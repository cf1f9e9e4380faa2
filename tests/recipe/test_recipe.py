"""Recipes: what is accepted, and the one line that refuses the rest."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mgtrain.errors import RecipeError
from mgtrain.recipe import load_recipe, parse_recipe, shipped_recipes
from mgtrain.runs.folder import RunDir

TEXT = """\
data:
  format: list
  root: videos
  train: train.csv
  val: val.csv
  classes: 4
clip: {frames: 16, stride: 2, crop: 64, short_side: [72, 90]}
evaluation: {crop: 72, short_side: 72}
model:
  name: slowfast_r50
  width: 16
batch: {clips: 8}
optim:
  lr: 5e-2
  stages: [4, 2]
schedule:
  name: multigrid
  long_cycle: [[0.5, 1.0], [1.0, 1.0]]
"""


def test_a_recipe_is_typed_and_complete() -> None:
    recipe = parse_recipe(TEXT, "my.yaml")
    assert recipe.optim.lr == 0.05  # 5e-2 is a number in YAML 1.2
    assert recipe.optim.momentum == 0.9
    assert recipe.clip.short_side == (72, 90)
    assert recipe.model.width == 16
    assert recipe.schedule.short_cycle == (0.5, 0.7071)  # type: ignore[union-attr]


def test_a_recipe_is_read_only() -> None:
    recipe = parse_recipe(TEXT, "my.yaml")
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 1  # type: ignore[misc]


def test_a_written_recipe_reads_back_the_same() -> None:
    for file in shipped_recipes().values():
        recipe = load_recipe(file)
        assert parse_recipe(recipe.to_yaml(), "again") == recipe


def test_overrides_change_single_keys() -> None:
    recipe = parse_recipe(TEXT, "my.yaml", ["optim.lr=0.5", "data.root=/my videos", "seed=3", "optim.stages=[1, 2.5]"])
    assert (recipe.optim.lr, recipe.data.root, recipe.seed, recipe.optim.stages) == (0.5, "/my videos", 3, (1, 2.5))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("  lr: 5e-2", "  lrr: 5e-2", "my.yaml:14: unknown key 'optim.lrr'; did you mean 'lr'?"),
        ("  stages: [4, 2]\n", "  stages: [4, 2]\n  zzz: 1\n", "my.yaml:16: unknown key 'optim.zzz'; allowed: name, "),
        ("  width: 16", "  widht: 16", "my.yaml:11: unknown key 'model.widht'; did you mean 'width'?"),
        ("  width: 16", "  width: 12", "my.yaml:11: model.width is 12; it must be a multiple of 8"),
        ("  width: 16", "  depth: 34", "my.yaml:11: model.depth is 34; it must be 50 or 101"),
        ("  lr: 5e-2", "  lr: -1", "my.yaml:14: optim.lr is -1; it must be greater than 0"),
        ("  lr: 5e-2", "  lr: high", 'my.yaml:14: optim.lr is "high"; it must be a valid number'),
        ("  lr: 5e-2", "  lr: .nan", "my.yaml:14: optim.lr is NaN; it must be a finite number"),
        ("  lr: 5e-2\n", "", "my.yaml:13: missing key 'optim.lr'"),
        ("  classes: 4", "  classes: 4\n  classes: 5", "my.yaml:7: not valid YAML: found duplicate key \"classes\""),
        ("  name: slowfast_r50", "  name: slowfast", "my.yaml:9: model.name is 'slowfast'; did you mean 'slowfast_r50"),
        ("  name: slowfast_r50\n", "", "my.yaml:9: missing key 'model.name'"),
        ("short_side: [72, 90]", "short_side: [90, 72]", "my.yaml:7: clip: short_side [90, 72] must be ascending"),
        ("[[0.5, 1.0]", "[[1.0, 1.0], [0.5, 1.0]", "my.yaml:18: schedule: long_cycle must go from coarse to fine"),
        ("[[0.5, 1.0]", "[[0.5, 1.5]", "my.yaml:18: schedule.long_cycle.0.1 is 1.5; it must be less than or equal"),
        ("name: multigrid", "name: [a", "my.yaml:18: not valid YAML: "),
        ("  root: videos", "  root: &a videos", "my.yaml:3: anchors and aliases are not allowed"),
        ("  root: videos", "  root: !!python/object:os.system x", "my.yaml:3: tags (tag:yaml.org,2002:python/"),
        ("optim:", "augment: {mixupp: 1}\noptim:", "my.yaml:13: unknown key 'augment.mixupp'; did you mean 'mixup'?"),
        ("optim:", "augment: {erase: 2}\noptim:", "my.yaml:13: augment.erase is 2; it must be less than or equal"),
        ("optim:", "augment: {hue: 0.6}\noptim:", "my.yaml:13: augment.hue is 0.6; it must be less than or "),
        ("optim:", "augment: {magnitude: 31}\noptim:", "my.yaml:13: augment.magnitude is 31; it must be less than"),
        ("optim:", "augment: {cutmix: -1}\noptim:", "my.yaml:13: augment.cutmix is -1; it must be greater than or"),
        ("  lr: 5e-2", "  lr: 5e-2\n  betas: [0.9, 0.95]", "my.yaml:13: optim: betas is a key of name: adamw, and name "
         "is sgd; leave it out"),
        ("  lr: 5e-2", "  lr: 5e-2\n  name: adamw\n  momentum: 0.8", "my.yaml:13: optim: momentum is a key of "),
        ("  lr: 5e-2", "  lr: 5e-2\n  name: adam", "my.yaml:15: optim.name is \"adam\"; it must be 'sgd' or 'adamw'"),
        ("  lr: 5e-2", "  lr: 5e-2\n  ema: 1", "my.yaml:15: optim.ema is 1; it must be less than 1"),
        ("  lr: 5e-2", "  lr: 5e-2\n  layer_decay: 1.1", "my.yaml:15: optim.layer_decay is 1.1; it must "),
        ("  name: slowfast_r50\n  width: 16", "  name: r3d_18\n  drop_path: 0.1", "my.yaml:9: model: "
         "drop_path is for swin3d_t and mvit_v2_s; r3d_18 has no stochastic depth"),
        ("  classes: 4", "  classes: 4\n  mirrored: [[a, b], [b, c]]", "my.yaml:1: data: mirrored names the class 'b'"),
        ("  classes: 4", "  classes: 4\n  mirrored: [a, b]", "my.yaml:7: data.mirrored.0 is \"a\"; it must be "),
        ("  classes: 4", "  classes: 4\n  mirrored: [[a]]", "my.yaml:7: "),
        (TEXT, "- a list", "my.yaml:1: a recipe is a mapping with the sections seed, data, clip"),
        (TEXT, "", "my.yaml:1: a recipe is a mapping"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_one_line_with_its_place(old: str, new: str, message: str) -> None:
    assert old in TEXT
    with pytest.raises(RecipeError) as caught:
        parse_recipe(TEXT.replace(old, new), "my.yaml")
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lr", "override 'optim.lr': must have the form section.key=value"),
        ("optim.lr=x", "override 'optim.lr=x': optim.lr is \"x\"; it must be a valid number"),
        ("seed.lr=1", "override 'seed.lr=1': "),
        ("lr=0.1", "override 'lr=0.1': unknown key 'lr'; did you mean 'optim.lr'?"),
        ("crop=64", "override 'crop=64': unknown key 'crop'; did you mean 'clip.crop'?"),
        ("optim.lrr=1", "override 'optim.lrr=1': unknown key 'optim.lrr'; did you mean 'lr'?"),
        ("optim.lr=[", "override 'optim.lr=[':2: not valid YAML"),
        (
            "data.root=my set #1",
            "override 'data.root=my set #1': ' #' begins a comment; write root='\"...\"'",
        ),
        (
            "data.root=2026-11-29 10:00:00",
            "my.yaml:1: cannot be understood: YAML takes '2026-11-29 10:00:00' for a time",
        ),
    ],
)
def test_wrong_overrides_are_named(override: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe("seed: 0\n" + TEXT, "my.yaml", [override])
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_names_that_look_like_dates_and_comments_are_names() -> None:
    words = ["data.train=2026-11-29", 'data.root="my set #1"', "data.val=a#b"]
    data = parse_recipe("seed: 0\n" + TEXT, "my.yaml", words).data
    assert (data.train, data.root, data.val) == ("2026-11-29", "my set #1", "a#b")


def test_an_alias_bomb_is_refused() -> None:
    bomb = "a: &a [x, x]\n" + "".join(f"{c}: &{c} [*{p}, *{p}]\n" for p, c in zip("abcdefgh", "bcdefghi", strict=True))
    with pytest.raises(RecipeError, match="anchors and aliases are not allowed"):
        parse_recipe(bomb, "my.yaml")


def test_a_missing_recipe_is_answered_with_the_nearest_shipped_one() -> None:
    with pytest.raises(RecipeError, match=re.escape("did you mean the shipped recipe 'k400_i3d_8x8_r50_baseline'?")):
        load_recipe("k400_i3d_8x8_r50_basline")


def test_baseline_and_multigrid_of_an_experiment_differ_in_the_schedule_only() -> None:
    recipes = shipped_recipes()
    baselines = [name for name in recipes if name.endswith("_baseline")]
    assert len(baselines) >= 4
    assert len(recipes) == 2 * len(baselines)
    for name in baselines:
        texts = [recipes[n].read_text() for n in (name, name.replace("_baseline", "_multigrid"))]
        before_schedule = [re.split(r"(?m)^schedule:", text.partition("\nseed:")[2]) for text in texts]
        assert before_schedule[0][0] == before_schedule[1][0], name
        schedules = [load_recipe(recipes[n]).schedule.name for n in (name, name.replace("_baseline", "_multigrid"))]
        assert schedules == ["baseline", "multigrid"]


def test_shipped_recipes_say_what_they_claim_cost_and_how_to_run_them() -> None:
    for name, file in shipped_recipes().items():
        header = file.read_text().partition("\nseed:")[0]
        for word in ("Claim", "Cost", "Command", name):
            assert word in header, f"{name}: no {word}"


def test_recipe_files_are_found_by_path_and_name(tmp_path: Path) -> None:
    file = tmp_path / "my.yaml"
    file.write_text(TEXT)
    assert load_recipe(file) == load_recipe(str(file)) == parse_recipe(TEXT, "x")
    assert load_recipe("recipes/k400_i3d_8x8_r50_baseline.yaml").model.name == "i3d_r50"


def test_a_key_of_an_earlier_version_is_refused_but_read_from_a_run(tmp_path: Path) -> None:
    assert parse_recipe(TEXT.replace("data:\n", "data:\n  enlarge: 1.0\n"), "old.yaml", saved=True) == parse_recipe(
        TEXT, "x"
    )
    old = TEXT.replace("short_side: 72}", "short_side: 72, per_phase: 1}")
    with pytest.raises(RecipeError, match=r"unknown key .evaluation.per_phase.; write evaluation.times, the"):
        parse_recipe(old, "old.yaml")
    assert parse_recipe(old, "old.yaml", saved=True).evaluation.times == 8
    run = RunDir(tmp_path)
    run.write("recipe.yaml", old)
    assert run.recipe().evaluation.times == 8
