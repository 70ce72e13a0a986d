"""Reads a config file into a checked section: merges its bases and the overrides, and explains what it refuses.

An unknown key, a wrong type or two keys that contradict each other end the command before anything is built. The
message names the key, the value found and what would be right, and tells an override from the file.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from pretrain import files
from pretrain.errors import InputError, nearest
from pretrain.section import Section, all_fields, without_gone

CONFIG_FOLDER = Path("configs")
SCHEMA_FILE = "schema.json"  # beside the configs, for editors
# Python's words for JSON's, as people type them. A lower-case none is a value of some keys.
_WORDS = {"none": None, "null": None, "true": True, "false": False}


class _Record(Section):
    """What a run folder's config.json holds beside the config. --config accepts and ignores it."""

    versions: dict[str, str]
    git_commit: str | None
    command: list[str]
    network: dict[str, Any] | None = None  # earlier versions recorded no network and no origin
    origin: dict[str, Any] | None = None


Schema = TypeVar("Schema", bound=Section)


def read_config(schema: type[Schema], name: str | Path, overrides: Iterable[str] = ()) -> Schema:
    """Read a config file, its bases and the command line's overrides into a checked `schema`.

    Lines of the file that begin with // are comments; "$schema" is for editors and ignored.

    Args:
        schema: the closed section that the whole file must fit.
        name: a path, or a name that is looked up under `configs/`.
        overrides: `key.path=value`, applied last. A value that is not JSON is a string, except that None, True and
            False are read as in Python.

    Raises:
        InputError: the file is missing or is not JSON, or a key is unknown, missing, of a wrong type or refused.
    """
    path = _find(Path(name))
    tree = _read_tree(path, chain=())
    typed = {}
    for override in overrides:
        keys, value = _parse_override(schema, override)
        typed[".".join(keys)] = override.partition("=")[2]
        for key in reversed(keys):
            value = {key: value}
        tree = _merge(tree, value)
    try:
        return schema.model_validate_json(json.dumps(without_gone(schema, tree)))
    except ValidationError as error:
        raise InputError("\n".join(_explain(schema, path, entry, typed) for entry in error.errors())) from None


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[tuple[str, Any, Any]]:
    """The dotted keys whose values differ between two trees, with both values, in order of their names."""
    found: list[tuple[str, Any, Any]] = []
    for key in sorted(set(old) | set(new)):
        before, after, dotted = old.get(key), new.get(key), f"{prefix}{key}"
        if isinstance(before, dict) and isinstance(after, dict):
            found += differences(before, after, f"{dotted}.")
        elif before != after:
            found.append((dotted, before, after))
    return found


def _find(path: Path) -> Path:
    for candidate in (path, CONFIG_FOLDER / path):
        if files.is_file(candidate):
            return candidate
    if files.exists(path):
        raise InputError(f"config {path}: not a file; a JSON file would be right, as a run folder's config.json")
    known = sorted(
        str(file.relative_to(CONFIG_FOLDER)) for file in CONFIG_FOLDER.rglob("*.json") if file.name != SCHEMA_FILE
    )
    near = nearest(str(path), known)
    hint = f"did you mean {near}?" if near else f"known: {', '.join(known) or 'none'}"
    raise InputError(f"config {path}: no such file, here or under {CONFIG_FOLDER}/; {hint}")


def _read_tree(path: Path, chain: Sequence[Path]) -> dict[str, Any]:
    """The file's keys, laid over those of the file that it extends."""
    if path.resolve() in chain:
        raise InputError(f"config {path}: extends itself by way of {' → '.join(file.name for file in chain)}")
    try:
        tree = json.loads(_read_text(path), object_pairs_hook=_unique_keys, parse_float=_number)
    except json.JSONDecodeError as error:
        raise InputError(f"config {path}: no JSON at line {error.lineno}, column {error.colno}: {error.msg}") from None
    except ValueError as error:  # a repeated key, not UTF-8, an integer of more digits than Python converts
        raise InputError(f"config {path}: cannot be read: {error}") from None
    if not isinstance(tree, dict):
        raise InputError(f"config {path}: expected a JSON object, found {type(tree).__name__}")
    with suppress(ValidationError):  # otherwise these names are unknown keys
        _Record.model_validate({key: tree[key] for key in _Record.model_fields if key in tree})
        tree = {key: value for key, value in tree.items() if key not in _Record.model_fields}
    if isinstance(tree.get("$schema"), str):
        del tree["$schema"]
    base = tree.pop("extends", None)
    if base is None:
        return tree
    near, shipped = path.parent / str(base), CONFIG_FOLDER / str(base)
    base_path = next(filter(files.is_file, (near, shipped)), None)
    if base_path is None:
        raise InputError(f"config {path}: extends {base!r}, but neither {near} nor {shipped} is a file")
    return _merge(_read_tree(base_path, (*chain, path.resolve())), tree)


def _read_text(path: Path) -> str:
    """The file with its comment lines emptied, so that line numbers stay."""
    return re.sub(r"(?m)^[ \t]*//.*", "", path.read_text(encoding="utf-8"))


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in tree if names.count(name) > 1)
        raise ValueError(f"the key {repeated!r} stands twice in one object; keep one of them")
    return tree


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` laid over `base`, object by object; setting train.steps clears train.epochs, and the reverse."""
    merged = dict(base)
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = _merge(merged[key], value)
        else:
            merged[key] = value
    train = over.get("train")
    if isinstance(train, dict) and isinstance(merged.get("train"), dict):
        for name, other in (("steps", "epochs"), ("epochs", "steps")):
            if train.get(name) is not None and train.get(other) is None:
                merged["train"] = {**merged["train"], other: None}
    return merged


def _number(text: str) -> float:
    """A JSON number with a point or an exponent; 5e8 and other whole ones become integers."""
    value = float(text)
    return int(value) if value.is_integer() and abs(value) < 2**53 else value


def _parse_override(schema: type[Section], text: str) -> tuple[list[str], Any]:
    """`key.path=value` → the keys, and the value."""
    dotted, equals, raw = text.partition("=")
    keys = dotted.split(".")
    if not equals or not all(keys):
        raise InputError(f"override {text!r}: expected key.path=value, as in train.steps=100")
    if raw.lower() in _WORDS and raw != "none":
        return keys, _WORDS[raw.lower()]
    try:
        return keys, json.loads(raw, parse_float=_number)
    except ValueError:
        if raw[:1] not in ("[", "{", '"'):
            return keys, raw
    form = _form(schema, keys, [dotted]) or "JSON in single quotes, which the shell does not change"
    raise InputError(f"override {dotted}: {raw} is no JSON; {form} would be right")


def _explain(schema: type[Section], path: Path, entry: Any, typed: Mapping[str, str]) -> str:
    """One line for one of pydantic's errors: the dotted key, what was found, what would be right.

    Args:
        entry: one of `ValidationError.errors()`.
        typed: the keys that overrides set, with the text behind their "=".
    """
    location = [str(part) for part in entry["loc"] if not _is_branch(str(part))]
    dotted, kind, found = ".".join(location), entry["type"], entry["input"]
    where = _where(path, dotted, kind, typed)
    if kind == "extra_forbidden":
        return f"{where}: unknown key; {_hint(schema, location)}"
    form = _form(schema, location, typed)
    if kind == "missing" and not (location[-1].isdecimal() and form):
        return f"{where}: missing; it has no default and must be set"
    if kind == "value_error":
        return f"{where}: {entry['ctx']['error']}"
    shown = json.dumps(found)
    if dotted in typed and not isinstance(found, str | dict | list):  # 1.10 rather than the number 1.1
        shown = typed[dotted]
        if kind == "string_type":
            form = shlex.quote(f"{dotted}={json.dumps(shown, ensure_ascii=False)}")
    field, _ = _field(schema, location)
    right = "input should be true or false" if kind == "bool_type" else _as_json(_lower_first(entry["msg"]))
    if kind == "not_offered" and field is not None:
        right += f": {field.description}"
    if isinstance(found, str) and field is not None and type(None) in getattr(field.annotation, "__args__", ()):
        right += " or null"
    return f"{where}: found {shown}; {right}" + (f", as in {form}" if form else "")


def _where(path: Path, dotted: str, kind: str, typed: Mapping[str, str]) -> str:
    """What is at fault: an override that sets the key, a section around it or a part of it; otherwise the file."""
    over = [key for key in typed if _overlap(key, dotted)]
    if not over:
        return f"config {path}: {dotted}" if dotted else f"config {path}"
    if kind != "value_error" or any(dotted == key or dotted.startswith(f"{key}.") for key in over):
        return f"override {dotted}"
    # Keys contradict each other; some come from the command line, others perhaps from the file.
    overrides = " ".join(f"{key}={typed[key]}" for key in over)
    return f"config {path} with {overrides}" + (f": {dotted}" if dotted else "")


def _overlap(one: str, other: str) -> bool:
    """Whether one dotted key is the other or lies in it."""
    return not other or f"{one}.".startswith(f"{other}.") or f"{other}.".startswith(f"{one}.")


def _form(schema: type[Section], location: Sequence[str], typed: Iterable[str]) -> str:
    """An example of the list or object that the key at `location` takes or lies in; empty where it takes neither.

    It is a word for the shell where an override sets the key, and JSON otherwise.
    """
    field, keys = _field(schema, location)
    if field is None:
        return ""
    example = field.examples[0] if field.examples else field.get_default(call_default_factory=True)
    if isinstance(example, BaseModel):
        example = example.model_dump(mode="json", exclude_none=True)
    if not isinstance(example, dict | list | tuple) or not example:
        return ""
    if isinstance(example, dict):  # the first keys suffice
        example = dict(list(example.items())[:3])
    written = json.dumps(example, separators=(",", ":"))
    dotted = ".".join(keys)
    by_override = any(f"{name}.".startswith(f"{dotted}.") for name in typed)
    return shlex.quote(f"{dotted}={written}") if by_override else written


def _field(schema: type[Section], location: Sequence[str]) -> tuple[FieldInfo | None, list[str]]:
    """The deepest field on the way to `location`, and its keys."""
    fields, field = dict(all_fields(schema)), None
    keys: list[str] = []
    while len(keys) < len(location) and (deeper := fields.get(".".join([*keys, location[len(keys)]]))):
        keys, field = [*keys, location[len(keys)]], deeper
    return field, keys


def _is_branch(part: str) -> bool:
    """Whether a part of pydantic's location names a member of a union rather than a key."""
    return part in ("bool", "str", "constrained-str", "constrained-int") or part.startswith(("tuple[", "literal["))


def _hint(schema: type[Section], location: list[str]) -> str:
    """What a key that is unknown at `location` may have meant: a similar name here, or the same name elsewhere."""
    *parents, wrong = location
    known = [key for key, _ in all_fields(schema)]
    siblings = [key.split(".")[-1] for key in known if key.split(".")[:-1] == parents]
    near = nearest(wrong, siblings)
    if near:
        return f"did you mean {'.'.join([*parents, near])}?"
    elsewhere = [key for key in known if key.split(".")[-1] == wrong]
    if elsewhere:
        return f"did you mean {' or '.join(elsewhere)}?"
    return f"known here: {', '.join(siblings)}"


def _as_json(text: str) -> str:
    """A sentence of pydantic's with the values that it names written as JSON."""
    text = re.sub(r"'([^']*)'", r'"\1"', text)
    return re.sub(r"\b(True|False|None)\b", lambda word: json.dumps(_WORDS[word[0].lower()]), text)


def _lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]
