"""The keys of a config, told from the fields of its sections: as text, as Markdown, as a JSON schema for editors."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import JsonSchemaMode, models_json_schema

from pretrain.section import Section, all_fields, mark, section_of

_MODE: JsonSchemaMode = "validation"
_BOUNDS = {
    "exclusiveMinimum": "> {}", "minimum": "≥ {}", "exclusiveMaximum": "< {}", "maximum": "≤ {}",
    "multipleOf": "multiple of {}",
}  # fmt: skip
_LARGE = 2**53  # bounds from here on are those of a number's form
RULES = {
    "fixed": "no", "free": "yes", "measured": "yes, with a note", "stated": "if stated", "extendable": "with --extend",
}  # fmt: skip


NOT_OFFERED = "not offered"  # the values of a key that is always refused; its sentence says why


@dataclass(frozen=True)
class Key:
    """One key of a config: its dotted name, the values it takes, its default in JSON and its sentence."""

    name: str
    type: str
    default: str
    about: str
    resume: str


def keys(schema: type[Section]) -> Iterator[Key]:
    """The keys of a config, in the order of their fields; a section that may be null is one too."""
    tree = schema.model_json_schema(mode=_MODE)
    for name, field in all_fields(schema):
        section = section_of(field)
        if section is not None and field.annotation is section:
            continue
        values = _type(_at(tree, name.split(".")), tree)
        default = "required" if field.is_required() else _json(field.default)
        if default == "null" and "null" not in values:
            default = "–"  # left to DeepSpeed
        if values == "any":
            values, default = NOT_OFFERED, "–"
        yield Key(name, values, default, field.description or "", RULES[mark(field, "resume")])


def text(schema: type[Section]) -> str:
    """The keys for a terminal: a line with values and default, and one with the sentence. Refused keys come last."""
    offered, refused = _parted(keys(schema))
    lines = [f"{key.name}: {key.type}; {key.default}\n    {key.about}" for key in offered]
    if refused:
        lines += ["", "DeepSpeed options that are refused:"]
        lines += [f"{key.name}\n    {key.about}" for key in refused]
    return "\n".join(lines)


def refused_markdown(rows: Iterable[Key]) -> str:
    """The keys that are always refused, as a table."""
    refused = _parted(rows)[1]
    return "\n".join(["| option | why |", "|---|---|", *(f"| `{key.name}` | {key.about} |" for key in refused)])


def markdown(rows: Iterable[Key], *, resume: bool = True) -> str:
    """The keys that may be set, as a table; `resume`: with a column on whether a resume may change them."""
    lines = ["| key | values | default | may change on resume | meaning |", "|---|---|---|---|---|"]
    lines += [
        f"| `{key.name}` | {key.type} | `{key.default}` | {key.resume} | {key.about} |".replace("| `–` |", "| – |")
        for key in _parted(rows)[0]
    ]
    return "\n".join(line if resume else "|".join(line.split("|")[:4] + line.split("|")[5:]) for line in lines)


def json_schema(schemas: Sequence[type[Section]]) -> dict[str, Any]:
    """A JSON schema of the config files that any of `schemas` reads.

    A file may extend another one, so no key is required in it.
    """
    models, tree = models_json_schema([(schema, _MODE) for schema in schemas], title="A config of vit-foundry")
    for definition in tree["$defs"].values():
        definition.pop("required", None)
        for field in definition["properties"].values():
            for name in ("title", "resume", "before"):
                field.pop(name, None)
            if field.get("default", 0) is None and "null" not in _type(field, tree):
                del field["default"]  # left to DeepSpeed
    further = {
        "$schema": {"type": "string", "description": "This file, for editors."},
        "extends": {"type": "string", "description": "Another config that this one is laid over."},
    }
    for schema in schemas:
        name = models[schema, _MODE]["$ref"].rpartition("/")[2]
        tree["$defs"][name]["properties"] |= further
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **tree,
        "anyOf": [models[schema, _MODE] for schema in schemas],
    }


def _parted(rows: Iterable[Key]) -> tuple[list[Key], list[Key]]:
    """The keys that may be set, and those that are always refused."""
    rows = list(rows)
    return [key for key in rows if key.type != NOT_OFFERED], [key for key in rows if key.type == NOT_OFFERED]


def _at(tree: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The schema of a dotted key within that of the whole config."""
    at = tree
    for name in names:
        branches = [at, *at.get("anyOf", ())]
        at = next(whole for whole in (_resolved(branch, tree) for branch in branches) if "properties" in whole)
        at = at["properties"][name]
    return at


def _resolved(schema: dict[str, Any], tree: dict[str, Any]) -> dict[str, Any]:
    reference: str | None = schema.get("$ref")
    return tree["$defs"][reference.rpartition("/")[2]] if reference else schema


def _type(schema: dict[str, Any], tree: dict[str, Any]) -> str:
    """The values a schema takes, in a phrase."""
    schema = _resolved(schema, tree)
    if "anyOf" in schema:
        return " or ".join(_type(branch, tree) for branch in schema["anyOf"])
    if "enum" in schema:
        return " or ".join(map(_json, schema["enum"]))
    if "const" in schema:
        return _json(schema["const"])
    kind = schema.get("type", "any")
    if kind == "array":
        items = schema.get("prefixItems")
        return (
            f"[{', '.join(_type(item, tree) for item in items)}]" if items else f"[{_type(schema['items'], tree)}, …]"
        )
    bounds = [form.format(schema[bound]) for bound, form in _BOUNDS.items() if schema.get(bound, _LARGE) < _LARGE]
    kind = {"boolean": "true or false"}.get(kind, kind)
    return " ".join([kind, ", ".join(bounds)]).rstrip()


def _json(value: Any) -> str:
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    return json.dumps(value, ensure_ascii=False)
