"""The house stands as designed: imports point down only, heavy libraries stay in their rooms, functions stay short."""

import ast
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# From the ground up. A module imports from its own floor and from those below, never from one above.
FLOORS = (
    "errors",
    "toybox",
    "lowrank",
    "formats",
    "workbench",
    "models",
    "data",
    "mixing",
    "generation",
    "training",
    "evaluation",
    "demo",
    "web",
    "cli",
    "__main__",
)
# Libraries that take seconds to import, and the only floors that may.
ROOMS = {
    "diffusers": {"toybox", "models", "generation"},
    "transformers": {"toybox", "models", "generation"},
    "accelerate": {"training"},
    "gradio": {"web"},
}
# What the command line reads before it knows whether torch is needed.
WITHOUT_TORCH = (
    "sdlora",
    "sdlora.errors",
    "sdlora.formats.architectures",
    "sdlora.formats.block_weights",
    "sdlora.formats.library",
    "sdlora.formats.read",
    "sdlora.generation.job",
    "sdlora.lowrank.laws",
    "sdlora.mixing.plan",
    "sdlora.training.config",
)
LONGEST_FUNCTION = 60


def _name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {_name(path): ast.parse(path.read_text("utf-8")) for path in sorted((ROOT / "sdlora").rglob("*.py"))}


def _statements(tree: ast.AST, *, lazy: bool) -> Iterator[ast.Import | ast.ImportFrom]:
    """Every import statement; without `lazy` only those that run when the module is imported."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        elif lazy or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from _statements(node, lazy=lazy)


def imports_of(module: str, *, lazy: bool = True) -> set[str]:
    """Full names of what a module imports; `from a import b` is a.b where that is one of our modules, else a."""
    found = set()
    for node in _statements(SOURCES[module], lazy=lazy):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        else:
            assert not node.level, f"{module}: relative import; write the full name"
            parent = node.module or ""
            full = {f"{parent}.{alias.name}" for alias in node.names}
            found |= {name if name in SOURCES else parent for name in full}
    return found


def _floor(module: str) -> str:
    floor = module.split(".")[1]
    assert floor in FLOORS, f"{module}: {floor} is on no floor; give it a place in FLOORS"
    return floor


def _inner(module: str) -> set[str]:
    """The package's own modules that a module imports; the root holds only the version and may be asked by all."""
    return {name for name in imports_of(module) if name.startswith("sdlora.")}


MODULES = [module for module in SOURCES if module != "sdlora"]


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module: str) -> None:
    here = FLOORS.index(_floor(module))
    above = [name for name in _inner(module) if FLOORS.index(_floor(name)) > here]
    assert not above, f"{module} may not import {', '.join(above)}"


def test_there_are_no_import_cycles() -> None:
    try:
        TopologicalSorter({module: _inner(module) for module in MODULES}).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


@pytest.mark.parametrize("module", MODULES)
def test_heavy_libraries_stay_in_their_rooms(module: str) -> None:
    heavy = {name.split(".")[0] for name in imports_of(module)} & ROOMS.keys()
    assert all(_floor(module) in ROOMS[library] for library in heavy), f"{module} may not import {', '.join(heavy)}"


@pytest.mark.parametrize("module", [module for module in MODULES if _floor(module) == "lowrank"])
def test_lowrank_needs_nothing_but_torch(module: str) -> None:
    allowed = {"torch", *sys.stdlib_module_names}
    foreign = {
        name
        for name in imports_of(module)
        if name.split(".")[0] not in allowed and not name.startswith(("sdlora.lowrank", "sdlora.errors"))
    }
    assert not foreign, f"{module} may not import {', '.join(foreign)}"


@pytest.mark.parametrize("module", [module for module in WITHOUT_TORCH if module in SOURCES])
def test_what_the_command_line_reads_first_comes_without_torch(module: str) -> None:
    reached, waiting = set(), [module]
    while waiting:
        name = waiting.pop()
        if name in SOURCES and name not in reached:
            # Importing a.b.c runs a and a.b too.
            parents = {".".join(name.split(".")[:depth]) for depth in range(1, name.count(".") + 1)}
            waiting += imports_of(name, lazy=False) | parents
        reached.add(name)
    heavy = {name for name in reached if name.split(".")[0] in {"torch", *ROOMS}}
    assert not heavy, f"importing {module} imports {', '.join(heavy)}"


@pytest.mark.parametrize("module", SOURCES)
def test_functions_fit_a_screen(module: str) -> None:
    functions = (node for node in ast.walk(SOURCES[module]) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
    lengths = {node.name: (node.end_lineno or 0) - node.lineno + 1 for node in functions}
    long = {name: length for name, length in lengths.items() if length > LONGEST_FUNCTION}
    assert not long, f"{module} has functions of more than {LONGEST_FUNCTION} lines: {long}"
