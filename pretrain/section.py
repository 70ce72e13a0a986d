"""Config sections: closed groups of keys, each with a sentence and a rule for resuming."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic.fields import FieldInfo

# What a resume may do with a key:
#   fixed       keep it: the key determines the weights
#   free        change it or leave it out: the weights do not depend on it
#   measured    as free, but a change is noted: scores are of something else from then on
#   stated      change it by stating it; a config that leaves it out is refused
#   extendable  as stated, with --extend only
Resume = Literal["fixed", "free", "measured", "stated", "extendable"]

Values = TypeVar("Values", bound=Sequence[Any])


class Section(BaseModel):
    """A closed, immutable group of keys."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)
    gone: ClassVar[Mapping[str, Any]] = {}  # keys that only earlier versions had: accepted with the value all now have


_NO_OTHER = object()


def key(default: Any = ..., *, about: str, resume: Resume = "fixed", before: Any = _NO_OTHER, **further: Any) -> Any:
    """A field of a `Section`.

    Args:
        default: its value where a config leaves it out; without one it must be set.
        about: one sentence on it, for `--keys` and docs/config.md.
        resume: what a resume may do with it.
        before: what a checkpoint without the key was trained with, where that is not `default`.
        further: arguments of pydantic's `Field`: bounds, examples.
    """
    extra = {"resume": resume, **({} if before is _NO_OTHER else {"before": before})}
    return Field(default, description=about, json_schema_extra=extra, **further)


def mark(field: FieldInfo, name: Literal["resume", "before"]) -> Any:
    """What `key` recorded of the field, or its default: fixed on resume, and before as today."""
    extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
    return extra.get(name, "fixed" if name == "resume" else field.default)


def section_of(field: FieldInfo) -> type[Section] | None:
    """The section that a field holds, if it may hold one."""
    kinds = (field.annotation, *getattr(field.annotation, "__args__", ()))
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)), None)


def all_fields(schema: type[Section], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Each field of a section and of the sections in it, with its dotted key."""
    for name, field in schema.model_fields.items():
        yield prefix + name, field
        if (inner := section_of(field)) is not None:
            yield from all_fields(inner, f"{prefix}{name}.")


def without_gone(schema: type[Section], tree: dict[str, Any]) -> dict[str, Any]:
    """A config or a part of one without the keys that are gone (`Section.gone`), where they have the value named."""
    kept = {name: value for name, value in tree.items() if (name, value) not in schema.gone.items()}
    for name, field in schema.model_fields.items():
        section = section_of(field)
        if section is not None and isinstance(kept.get(name), dict):
            kept[name] = without_gone(section, kept[name])
    return kept


def _not_empty(values: Values) -> Values:
    if not values:
        raise ValueError("found []; at least one is needed")
    return values


def each_once(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """Check that there is one value or more, and none twice."""
    if len(set(_not_empty(values))) < len(values):
        raise ValueError(f"found {list(values)}; name each once")
    return values


def _some(shots: tuple[int, ...]) -> tuple[int, ...]:
    if min(shots) < 1:
        raise ValueError(f"found {list(shots)}; shots are images of each class, 1 or more")
    return tuple(sorted(shots))


def _not_negative(seeds: tuple[int, ...]) -> tuple[int, ...]:
    if min(seeds) < 0:
        raise ValueError(f"found {list(seeds)}; seeds are 0 or more")
    return seeds


def _folder_name(name: str) -> str:
    if name in ("", ".", "..") or "/" in name or "\0" in name:
        raise ValueError(f"found {name!r}; a folder's name would be right: not empty, no /, neither . nor ..")
    return name


FolderName = Annotated[str, AfterValidator(_folder_name)]  # results go to runs/<name>
# An INDEX, or a list that is concatenated. An empty one would be the folder that the command runs in.
IndexPath = Annotated[str, Field(min_length=1)]
Indices = Annotated[IndexPath | tuple[IndexPath, ...], AfterValidator(_not_empty)]
# Of few-shot draws, in a run's config and in a few-shot config.
Shots = Annotated[tuple[int, ...], AfterValidator(each_once), AfterValidator(_some)]
Seeds = Annotated[tuple[int, ...], AfterValidator(each_once), AfterValidator(_not_negative)]
