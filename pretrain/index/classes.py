"""Whether index files number their classes alike, as far as those that name them tell."""

from __future__ import annotations

from collections.abc import Sequence

from pretrain.errors import InputError
from pretrain.index.indexfile import IndexFile


def check_classes(names: tuple[str, ...] | None, others: tuple[str, ...] | None, where: str, elsewhere: str) -> None:
    """Raise InputError where two indices that name their classes do not number them alike: a label would mean two
    things.
    """
    if names is None or others is None or names == others:
        return
    at = next((label for label, (a, b) in enumerate(zip(names, others, strict=False)) if a != b), None)
    label = min(len(names), len(others)) if at is None else at
    here, there = (repr(known[label]) if label < len(known) else "absent" for known in (names, others))
    raise InputError(
        f"{elsewhere}: class {label} is {there} here and {here} in {where}; both must number the same classes alike: "
        "build or index them with one list of classes"
    )


def check_names(files: Sequence[IndexFile]) -> None:
    """Raise InputError where a file has labels beyond the classes that one of them names."""
    for named in [file for file in files if file.classes][:1]:
        names = len(named.classes or ())
        for file in files:
            if file.num_classes > names:
                raise InputError(
                    f"{file.path}: has labels up to {file.num_classes - 1}, and {named.path} names {names} classes; "
                    "both must number the same classes alike"
                )


def unnamed_text(files: Sequence[IndexFile]) -> str:
    """In words, whose numbering of the classes is taken on trust: files without names, beside one with; else empty."""
    named = next((file for file in files if file.classes), None)
    unnamed = [str(file.path) for file in files if not file.classes]
    if named is None or not unnamed:
        return ""
    return f"{', '.join(unnamed)}: without names of its classes, taken to number them as {named.path} does"
