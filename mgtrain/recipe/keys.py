"""The recipe reference, generated from the types: docs/reference/recipe.md and `mgtrain recipes keys`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from mgtrain.recipe import Recipe

HEAD = """\
# Recipe reference

A recipe is a YAML file with these sections and keys; `mgtrain recipes show NAME` prints a shipped one. Change a key on
the command line with `section.key=value`. `mgtrain recipes keys` generates this page.
"""


def reference() -> str:
    """All keys with their types, ranges, defaults and descriptions, as Markdown."""
    schema = Recipe.model_json_schema()
    lines = [HEAD]
    for name, field in schema["properties"].items():
        if "$ref" not in field and "oneOf" not in field:
            lines += ["## Top level", "", *_table({"properties": {name: field}, "required": []}, schema["$defs"]), ""]
            continue
        for kind in field.get("oneOf", [field]):
            section = _resolved(kind, schema["$defs"])
            chosen = section["properties"].get("name", {})
            names = chosen.get("enum", [chosen["const"]] if "const" in chosen else [])
            title = f"## {name}" + (f": `name: {' | '.join(names)}`" if names else "")
            lines += [title, "", _sentence(section.get("description", "")), ""]
            rows = {key: value for key, value in section["properties"].items() if key != "name"}
            if rows:
                lines += [*_table({**section, "properties": rows}, schema["$defs"]), ""]
    return "\n".join(lines).rstrip() + "\n"


def _table(section: dict[str, Any], definitions: dict[str, Any]) -> Iterator[str]:
    yield "| key | value | default | meaning |"
    yield "|---|---|---|---|"
    for key, field in section["properties"].items():
        default = "required" if key in section.get("required", ()) else f"`{json.dumps(field.get('default'))}`"
        meaning = field.get("description", "").replace("|", "\\|").replace("\n", " ")
        yield f"| `{key}` | {_kind(field, definitions)} | {default} | {meaning} |"


def _kind(field: dict[str, Any], definitions: dict[str, Any]) -> str:
    """A field's type and range, such as `number > 0`."""
    field = _resolved(field, definitions)
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    if "anyOf" in field:
        return " or ".join(dict.fromkeys(_kind(part, definitions) for part in field["anyOf"]))
    if "const" in field:
        return f"`{field['const']}`"
    match field.get("type"):
        case "array":
            items = field.get("prefixItems") or [field.get("items", {})]
            kinds = list(dict.fromkeys(_kind(item, definitions) for item in items))
            return f"list of {len(items) if 'prefixItems' in field else ''} {' and '.join(kinds)}".replace("  ", " ")
        case "object":
            return "mapping"
        case "null":
            return "null"
        case "boolean":
            return "true, false"
        case "string":
            return "text"
        case kind:
            return f"{'whole number' if kind == 'integer' else 'number'}{_range(field)}"


def _range(field: dict[str, Any]) -> str:
    low, over = field.get("minimum"), field.get("exclusiveMinimum")
    high, under = field.get("maximum"), field.get("exclusiveMaximum")
    parts = [f">= {low:g}"] if low is not None else [f"> {over:g}"] if over is not None else []
    # Larger limits only keep numbers finite, so they are not shown.
    if high is not None and high < 10**6:
        parts.append(f"<= {high:g}")
    elif under is not None and under < 10**6:
        parts.append(f"< {under:g}")
    if "multipleOf" in field:
        parts.append(f"a multiple of {field['multipleOf']}")
    return f" {', '.join(parts)}" if parts else ""


def _resolved(field: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    reference = field.get("$ref")
    return {**definitions[reference.rpartition("/")[2]], **field} if reference else field


def _sentence(text: str) -> str:
    """The first paragraph of a docstring, on one line."""
    return " ".join(text.partition("\n\n")[0].split())
