"""The recipe reference, generated from the types: docs/reference/recipe.md and `mgtrain recipes keys`."""

import json
from collections.abc import Iterator
from typing import Any

from mgtrain.recipe import Recipe

HEAD = """\
# Recipe reference

A recipe is a YAML file with these sections and keys; `mgtrain recipes show NAME` prints a shipped one. Change a key on
the command line with `section.key=value`. `mgtrain recipes keys` generates this page.
"""
TYPES = {
    "integer": "whole number", "number": "number", "string": "text", "boolean": "true, false", "object": "mapping",
    "null": "null",
}  # fmt: skip
LIMITS = {
    "minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<", "multipleOf": "a multiple of"
}  # fmt: skip


def reference() -> str:
    """All keys with their types, ranges, defaults and descriptions, as Markdown."""
    schema = Recipe.model_json_schema()
    definitions, lines = schema["$defs"], [HEAD]
    for name, field in schema["properties"].items():
        if "$ref" not in field and "oneOf" not in field:
            lines += ["## Top level", "", *_table({"properties": {name: field}}, definitions), ""]
            continue
        for kind in field.get("oneOf", [field]):
            section = _resolved(kind, definitions)
            chosen = section["properties"].get("name", {})
            names = chosen.get("enum", [chosen["const"]] if "const" in chosen else [])
            title = f"## {name}" + (f": `name: {' | '.join(names)}`" if names else "")
            lines += [title, "", section["description"], ""]
            rows = {key: value for key, value in section["properties"].items() if key != "name"}
            if rows:
                lines += [*_table({**section, "properties": rows}, definitions), ""]
    return "\n".join(lines).rstrip() + "\n"


def _table(section: dict[str, Any], definitions: dict[str, Any]) -> Iterator[str]:
    yield "| key | value | default | meaning |"
    yield "|---|---|---|---|"
    for key, field in section["properties"].items():
        default = "required" if key in section.get("required", ()) else f"`{json.dumps(field.get('default'))}`"
        meaning = field.get("description", "").replace("|", "\\|")
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
    if field["type"] == "array":
        items = field.get("prefixItems") or [field["items"]]
        kinds = " and ".join(dict.fromkeys(_kind(item, definitions) for item in items))
        return f"list of {len(items)} {kinds}" if "prefixItems" in field else f"list of {kinds}"
    # Limits of a million and more only keep numbers finite, so they are not shown.
    limits = [f"{words} {field[key]:g}" for key, words in LIMITS.items() if field.get(key, 10**6) < 10**6]
    return f"{TYPES[field['type']]} {', '.join(limits)}".rstrip()


def _resolved(field: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    reference = field.get("$ref")
    return {**definitions[reference.rpartition("/")[2]], **field} if reference else field
