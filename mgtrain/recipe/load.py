"""Read a recipe file or a shipped recipe, with overrides; an error is one line that starts with `file:line:`.

Aliases and tags are not allowed, so a recipe cannot run code or expand without bounds.
"""

import difflib
import json
import re
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from datetime import date
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.events import CollectionEndEvent, CollectionStartEvent

from mgtrain.errors import RecipeError, one_line
from mgtrain.recipe.base import Section
from mgtrain.recipe.sections import Recipe

MOST_BYTES, MOST_DEPTH = 100_000, 20  # of a recipe; far more than any real one needs
RETIRED = {  # keys of earlier versions -> what to do instead
    "evaluation.per_phase": "write evaluation.times, the evaluations of the whole run",
    "data.enlarge": "leave it out: the larger prepared level is read instead",
    "data.skip_loop_filter": "leave it out: H.264 is decoded exactly",
}


def load_recipe(path: str | Path, overrides: Sequence[str] | None = (), saved: bool = False) -> Recipe:
    """Read a recipe file, or a shipped recipe by its name, and apply overrides such as `optim.lr=0.05`.

    `saved`: a run has written the recipe, so `RETIRED` keys are ignored. A `RecipeError` is one line,
    `file:line: what is wrong, what is allowed`.
    """
    file = find_recipe(path)
    return parse_recipe(read_text(file, "recipe"), str(file), overrides, saved)


def read_text(file: Path, what: str) -> str:
    """The text of a recipe or a study, which is `what`. Raises `RecipeError` if it cannot be one."""
    try:
        with file.open("rb") as opened:
            content = opened.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise RecipeError(f"{file}:1: larger than {MOST_BYTES:,} bytes, so not a {what}")
        return content.decode()
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{file}:1: cannot be read: {error}; a {what} must be a UTF-8 text file") from None


def parse_recipe(text: str, name: str, overrides: Sequence[str] | None = (), saved: bool = False) -> Recipe:
    """Parse YAML text as `load_recipe` does; error messages call the file `name`."""
    tree = parse_yaml(text, name)
    for section, _, key in (dotted.partition(".") for dotted in RETIRED if saved):
        if isinstance(tree.get(section), dict):
            tree[section].pop(key, None)
    origins: dict[tuple[str, ...], str] = {}
    for override in overrides or ():
        origins[_apply_override(tree, override)] = f"override {override!r}"
    try:
        # Pydantic's strict mode accepts a list for a tuple in JSON only.
        return Recipe.model_validate_json(as_json(tree), strict=True)
    except ValidationError as error:
        raise RecipeError(_explain(error, tree, name, origins)) from None
    except (TypeError, ValueError, RecursionError) as error:
        raise RecipeError(f"{name}:1: cannot be understood: {error}") from None


def recipe_differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The keys that differ in two flat recipes: dotted key -> (a's value, b's); None for an absent key."""
    return {key: (a.get(key), b.get(key)) for key in {**a, **b} if a.get(key) != b.get(key)}


def changed_keys(before: Mapping[str, Any], now: Mapping[str, Any], free: Collection[str]) -> list[str]:
    """The changed keys of flat recipes that affect results, except `free` ones, such as `optim.lr 0.1 -> 0.2`."""
    return [
        f"{key} {a} -> {b}"
        for key, (a, b) in recipe_differences(before, now).items()
        if affects_results(key) and key not in free
    ]


def affects_results(key: str) -> bool:
    """Whether a key, such as `optim.lr`, affects the trained weights beyond rounding, rather than speed or logs."""
    free = key.partition(".")[0] in ("hardware", "logging", "faults") or key == "evaluation.times"
    return key == "hardware.precision" or not free


def shipped_recipes() -> dict[str, Path]:
    """The recipes shipped with mgtrain: name -> file, sorted by name."""
    installed, in_checkout = (Path(__file__).parents[n] / "recipes" for n in (1, 2))
    folder = installed if installed.is_dir() else in_checkout
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))}


def find_recipe(path: str | Path) -> Path:
    """The file at `path`, or the shipped recipe of that name."""
    file = Path(path)
    with suppress(OSError):  # such as a name that is too long
        if file.is_file():
            return file
    shipped = shipped_recipes()
    name = file.name.removesuffix(".yaml")
    if name in shipped and (str(path) == file.name or file.parent.name == "recipes"):
        return shipped[name]
    close = difflib.get_close_matches(name, shipped, n=1)
    hint = f"did you mean the shipped recipe {close[0]!r}?" if close else "`mgtrain recipes list` shows those shipped"
    raise RecipeError(f"{path}: no such recipe file; {hint}")


def parse_yaml(text: str, name: str, expected: str = "") -> Any:
    """The YAML document as ruamel's dicts and lists, which know their lines; it must be a mapping.

    `expected` is the message if it is something else.
    """
    yaml = YAML(typ="rt", pure=True)
    depth = 0
    try:
        for event in yaml.parse(text):
            depth += isinstance(event, CollectionStartEvent) - isinstance(event, CollectionEndEvent)
            where = f"{name}:{event.start_mark.line + 1}"
            if depth > MOST_DEPTH:  # the parser takes minutes for thousands of brackets
                raise RecipeError(f"{where}: nested more than {MOST_DEPTH} deep; no key of a recipe is")
            if getattr(event, "anchor", None) is not None:
                raise RecipeError(f"{where}: anchors and aliases are not allowed in a recipe; write the values out")
            if getattr(event, "tag", None) is not None:
                raise RecipeError(f"{where}: tags ({event.tag}) are not allowed in a recipe; remove it")
        tree = yaml.load(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = " ".join(str(error.problem or error.context).split())
        raise RecipeError(f"{name}:{mark.line + 1 if mark else 1}: not valid YAML: {problem}") from None
    except RecipeError:
        raise
    except Exception as error:  # ruamel's own errors, such as an IndexError for `0x_`
        raise RecipeError(f"{name}:1: not valid YAML: {one_line(error, 200)}") from None
    if not isinstance(tree, dict):
        expected = expected or f"a recipe is a mapping with the sections {', '.join(Recipe.model_fields)}"
        raise RecipeError(f"{name}:1: {expected}")
    return tree


def as_json(tree: Any) -> str:
    """What `parse_yaml` returns as JSON. YAML takes a name such as 2026-11-29 for a date; here it is a name again."""

    def name(value: object) -> str:
        if type(value) is not date:
            raise TypeError(f"YAML takes {str(value)!r} for a time; write it in quotes")
        return value.isoformat()

    return json.dumps(tree, ensure_ascii=False, default=name)


def _apply_override(tree: Any, override: str) -> tuple[str, ...]:
    """Set `section.key=value` in the tree; returns the keys."""
    dotted, equals, value = override.partition("=")
    keys = tuple(dotted.strip().split("."))
    if not equals or not all(keys):
        raise RecipeError(f"override {override!r}: must have the form section.key=value, for example optim.lr=0.05")
    parent = tree
    for key in keys[:-1]:
        if not isinstance(parent.setdefault(key, {}), dict):
            raise RecipeError(f"override {override!r}: {key!r} is not a section")
        parent = parent[key]
    parsed = parse_yaml(f"value: {value}\n", f"override {override!r}")
    if re.search(r"\s#", value) and "#" not in str(parsed["value"]):
        raise RecipeError(f"override {override!r}: ' #' begins a comment; write {keys[-1]}='\"...\"' to keep it")
    if list(parsed) != ["value"]:
        raise RecipeError(f"override {override!r}: more than one value; write one override per key")
    parent[keys[-1]] = parsed["value"]
    return keys


def _explain(error: ValidationError, tree: Any, name: str, origins: dict[tuple[str, ...], str]) -> str:
    """Pydantic's first error as one line: where, what, what is allowed or probably meant."""
    first, keys, line = first_error(error, tree)
    where = next((origin for changed, origin in origins.items() if keys[: len(changed)] == changed), f"{name}:{line}")
    dotted = ".".join(keys) or "recipe"
    match first["type"]:
        case "extra_forbidden":
            kinds = _kinds(keys[0]) if len(keys) > 1 else (Recipe,)
            if len(kinds) > 1:  # chosen by `name`
                chosen = tree[keys[0]]["name"]
                kinds = tuple(kind for kind in kinds if chosen in get_args(kind.model_fields["name"].annotation))
            allowed = list(kinds[0].model_fields)
            close = difflib.get_close_matches(keys[-1], allowed, n=1)
            if len(keys) == 1 and not close:  # without a section, such as lr=0.1
                close = [f"{s}.{keys[0]}" for s in Recipe.model_fields for k in _kinds(s) if keys[0] in k.model_fields]
            hint = f"did you mean {close[0]!r}?" if close else f"allowed: {', '.join(allowed)}"
            if (keys[0], "name") in origins:
                hint += f"; to change the name, replace the section: '{keys[0]}={{name: {tree[keys[0]]['name']}}}'"
            return f"{where}: unknown key {dotted!r}; {RETIRED.get(dotted, hint)}"
        case "missing" | "union_tag_not_found":
            key = dotted if first["type"] == "missing" else f"{dotted}.name"
            return f"{where}: missing key {key!r}"
        case "union_tag_invalid":
            tag, expected = first["ctx"]["tag"], first["ctx"]["expected_tags"].replace("'", "")
            close = difflib.get_close_matches(tag, expected.split(", "), n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            return f"{where}: {dotted}.name is {tag!r}; {hint}allowed: {expected}"
        case "value_error":  # of a whole section; a tag may follow its name
            return f"{where}: {dotted.partition('.')[0]}: {first['ctx']['error']}"
        case _:
            message = first["msg"].removeprefix("Input should be ")
            return f"{where}: {dotted} is {json.dumps(first['input'])[:60]}; it must be {message}"


def first_error(error: ValidationError, tree: Any) -> tuple[Mapping[str, Any], tuple[str, ...], int]:
    """Pydantic's first error, its keys without the tags that pydantic adds for unions, and its line."""
    # A misspelt key often causes a missing one, so it comes first.
    first = min(error.errors(), key=lambda item: item["type"] != "extra_forbidden")
    keys: list[str] = []
    node, line = tree, 1
    for part in first["loc"]:
        if part in node if isinstance(node, dict) else isinstance(node, list) and part in range(len(node)):
            places = getattr(getattr(node, "lc", None), "data", None) or {}  # none of what an override has set
            line = places[part][0] + 1 if part in places else line
            node = node[part]
        elif part != first["loc"][-1] or (isinstance(part, str) and not isinstance(node, dict)):
            continue  # a tag
        keys.append(str(part))
    return first, tuple(keys), line


def _kinds(section: str) -> tuple[type[Section], ...]:
    """The types of a section: several if its `name` chooses one; none for a key of the top level."""
    annotation = Recipe.model_fields[section].annotation
    return tuple(kind for kind in get_args(annotation) or (annotation,) if issubclass(kind, Section))
