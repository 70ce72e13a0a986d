"""The layout of the code: imports point down the list of rooms, in no circle; modules and functions stay small."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
# A room may import the rooms below it.
STAGES = [("launch",), ("finetune", "fewshot"), ("pretrain",)]
ROOMS = [
    *(
        "rehearsal",
        "history",
        "training",
        "record",
        "plan",
        "weights",
        "shards",
        "datasets",
        "engine",
        "stream",
        "index",
    ),
    *("images", "storage", "checkpoint", "ranks", "model", "page", "ground"),
]
MODULES_OF_A_FOLDER, LINES_OF_A_MODULE, PARAMETERS = 12, 400, 9


def test_imports_point_down():
    upward = {(name, target) for name in modules() for target in imports(name) if level(target) < level(name)}
    sideways = {
        (name, target)
        for name in modules()
        for target in imports(name)
        if {name.split(".")[0], target.split(".")[0]} == {"finetune", "fewshot"}
    }
    assert not upward | sideways


def test_no_circle_between_modules():
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"circle: {' -> '.join([*path[path.index(name) :], name])}"
        if name not in done:
            for target in imports(name):
                visit(target, (*path, name))
            done.add(name)

    for name in modules():
        visit(name, ())


def test_no_folder_has_more_than_12_modules():
    counts: dict[str, int] = {}
    for path in modules().values():
        if path.name != "__init__.py":
            folder = path.parent.relative_to(ROOT).as_posix()
            counts[folder] = counts.get(folder, 0) + 1
    assert not {folder for folder, count in counts.items() if count > MODULES_OF_A_FOLDER}


def test_no_module_has_more_than_400_lines():
    lines = {name: len(path.read_text().splitlines()) for name, path in modules().items()}
    assert not {name for name, count in lines.items() if count > LINES_OF_A_MODULE}


def test_no_function_takes_more_than_nine_parameters():
    found = set()
    for name in modules():
        for function in (node for node in ast.walk(tree(name)) if isinstance(node, ast.FunctionDef)):
            given = function.args
            parameters = {one.arg for one in (*given.posonlyargs, *given.args, *given.kwonlyargs)} - {"self", "cls"}
            if len(parameters) > PARAMETERS:
                found.add(f"{name}: {function.name}")
    assert not found


def test_each_folder_describes_itself_and_imports_nothing():
    undescribed = set()
    for name, path in modules().items():
        if path.name != "__init__.py" or name == "pretrain":  # pretrain's own opens the doors for Python users, lazily
            continue
        if len(ast.get_docstring(tree(name)) or "") < 20:
            undescribed.add(name)
        assert len(tree(name).body) <= 1, f"{path}: more than a docstring"
    assert not undescribed


def test_what_reads_checkpoints_and_plans_imports_no_deepspeed():
    rooms = ("checkpoint", "ranks", "weights", "plan")
    named = [name for name in modules() if name.startswith(tuple(f"pretrain.{room}." for room in rooms))]
    assert "pretrain.weights.load" in named
    code = (
        f"import sys, {', '.join(named)}\n"
        "heavy = ('deepspeed', 'pretrain.engine.quiet', 'pretrain.training')\n"
        "print([name for name in sys.modules if f'{name}.'.startswith(tuple(f'{one}.' for one in heavy))])"
    )
    answer = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert answer.stdout == "[]\n"


def level(name: str) -> tuple[int, int]:
    """The height of a module: of its stage and, within `pretrain`, of its room; from 0, the highest."""
    stage, *rest = name.split(".")
    if stage != "pretrain" or not rest:  # pretrain's own __init__ names what is anywhere in it
        return next(number for number, names in enumerate(STAGES) if stage in names), 0
    return len(STAGES) - 1, ROOMS.index(rest[0] if rest[0] in ROOMS else "ground")


@cache
def modules() -> dict[str, Path]:
    """The source's modules, by dotted name."""
    found = {}
    for stage in (stage for stages in STAGES for stage in stages):
        for path in sorted((ROOT / stage).rglob("*.py")):
            found[".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")] = path
    return found


@cache
def tree(name: str) -> ast.Module:
    return ast.parse(modules()[name].read_text())


@cache
def imports(name: str) -> tuple[str, ...]:
    """The modules of the source that a module imports, anywhere in it; not what only a type checker reads."""
    return tuple(dict.fromkeys(target for target in _targets(tree(name)) if target in modules() and target != name))


def _targets(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
        return
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        for alias in node.names:
            inner = f"{node.module}.{alias.name}"
            yield inner if inner in modules() else str(node.module)
    for child in ast.iter_child_nodes(node):
        yield from _targets(child)
