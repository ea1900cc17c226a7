"""Which module may import what: the plan of the packages, kept in one table.

Every import counts: those inside functions, and those under TYPE_CHECKING too.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter

import pytest

from tests.harness.trixie import CHECKOUT

# What a package may import of workerd, besides itself and the modules directly in workerd/, the
# leaves. A module with a row of its own is bound by that row, not by its package's.
MAY_IMPORT = {
    "config": [],
    "core": ["config"],
    "runlog": ["core"],
    "broker": ["core", "config"],
    "handlers": ["core", "config"],
    "worker": ["broker", "core", "config"],
    "deadletters": ["broker", "core", "config"],
    "check": ["broker", "handlers", "core", "config"],
    "control": ["worker", "core", "config"],
    "control.client": ["control.protocol"],
    "control.protocol": [],
    "submitting": ["broker", "control.client", "control.protocol", "core", "config"],
    "daemon": [
        *("control", "check", "worker", "handlers", "runlog", "broker", "core", "config"),
    ],
    "cli": [
        *("daemon", "submitting", "control", "check", "deadletters", "worker", "handlers"),
        *("runlog", "broker", "core", "config"),
    ],
    "__main__": ["cli"],
}
# Other interpreters run these by their paths: the standard library is all that they have.
ALONE = {"handlers.child", "handlers.child_boot", "handlers.guard"}
# Each library is imported in one place.
LIBRARIES = {
    "pika": "broker",
    "sdnotify": "daemon.systemd",
    "daemon": "daemon.detach",
    "tomli": "config.load",
    "rich": "cli.watch",
    "prometheus_client": "cli.prometheus",
}
# What the core may not have: input and output, tasks, a clock, the log.
IMPURE = {"asyncio", "threading", "socket", "subprocess", "logging", "os", "time", "workerd.log"}
# Where a new id is made: it begins with the time.
CLOCK = "workerd.ids"

DIRECTLY_IN_WORKERD = 12
LINES = 400
# One file each, whatever its length.
ONE_FILE = {"handlers.child"}

SOURCES = {
    ".".join(path.relative_to(CHECKOUT).with_suffix("").parts).removesuffix(".__init__"): path
    for folder in ("workerd", "tests", "benchmarks")
    for path in sorted((CHECKOUT / folder).rglob("*.py"))
}
TREES = {name: ast.parse(path.read_text()) for name, path in SOURCES.items()}
OURS = [name for name in TREES if name.partition(".")[0] == "workerd"]


def imported(tree: ast.AST) -> Iterator[tuple[str, str | None]]:
    """Each import of a module: from where, and which name of it; None: the module itself."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module
            assert not node.level, "absolute imports only"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield (whole, None) if whole in TREES else (node.module, alias.name)


IMPORTS = {name: list(imported(tree)) for name, tree in TREES.items()}
GRAPH = {name: {module for module, _ in IMPORTS[name]} for name in OURS}


def within(name: str, package: str) -> bool:
    return f"{name}.".startswith(f"{package}.")


def room(name: str) -> str:
    """A module's name without `workerd.`; of workerd itself, nothing."""
    return name.removeprefix("workerd").removeprefix(".")


def row(name: str) -> str | None:
    """The row of the table that binds a module, None for a leaf."""
    fitting = [each for each in MAY_IMPORT if within(room(name), each)]
    return max(fitting, key=len) if fitting else None


def edges() -> Iterator[tuple[str, str]]:
    """Each import of one module of ours by another."""
    for name, modules in GRAPH.items():
        yield from ((name, module) for module in modules if module in OURS and module != name)


def allowed(name: str, module: str) -> bool:
    if room(name) in ALONE:
        return False
    mine, theirs = row(name), row(module)
    if theirs is None:
        return True
    if mine is None:
        return False
    # A module that is bound by a row of its own has to name even its neighbours.
    at_home = mine == theirs or ("." not in mine and within(theirs, mine))
    return at_home or any(within(room(module), each) for each in MAY_IMPORT[mine])


def test_a_package_imports_what_the_table_allows() -> None:
    found = {f"{name} -> {module}" for name, module in edges() if not allowed(name, module)}
    assert found == set()


def test_every_package_has_its_row() -> None:
    packages = {path.parent.name for path in (CHECKOUT / "workerd").glob("*/__init__.py")}
    rows = {name for name in MAY_IMPORT if "." not in name and name != "__main__"}
    assert packages == rows
    named = {*MAY_IMPORT, *(each for many in MAY_IMPORT.values() for each in many), *ALONE}
    assert {name for name in named if f"workerd.{name}" not in TREES} == set()


def test_no_two_modules_import_each_other_by_any_way() -> None:
    graph: dict[str, set[str]] = {name: set() for name in OURS}
    for name, module in edges():
        graph[name].add(module)
    TopologicalSorter(graph).prepare()  # raises an error that names the circle


def defined(statements: list[ast.stmt]) -> Iterator[str]:
    """The names that a module gives a value itself, at its top."""
    for node in statements:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                yield from (each.id for each in ast.walk(target) if isinstance(each, ast.Name))
        elif isinstance(node, ast.If | ast.Try | ast.With):
            yield from defined([*node.body, *getattr(node, "orelse", [])])
            for handler in getattr(node, "handlers", []):
                yield from defined(handler.body)


DEFINED = {name: set(defined(TREES[name].body)) for name in OURS}


def test_a_name_is_imported_from_where_it_is_defined() -> None:
    found = {
        f"{name}: {symbol} from {module}"
        for name, imports in IMPORTS.items()
        for module, symbol in imports
        if symbol and module in OURS and symbol not in DEFINED[module]
    }
    assert found == set()


@pytest.mark.parametrize(("library", "place"), LIBRARIES.items())
def test_a_library_is_imported_in_one_place(library: str, place: str) -> None:
    users = {room(name) for name in OURS if any(within(each, library) for each in GRAPH[name])}
    assert users
    assert all(within(name, place) for name in users), users


def below(name: str) -> set[str]:
    """Everything that this module imports, and what that imports from workerd, and so on."""
    found: set[str] = set()
    new = {name}
    while new:
        new = {each for module in new for each in GRAPH.get(module, ())} - found
        found |= new
    return found


def test_the_core_is_pure() -> None:
    core = {name for name in OURS if within(name, "workerd.core")}
    used = core.union(*map(below, core)) - {CLOCK}
    found = {f"{name} -> {each}" for name in used for each in GRAPH.get(name, set()) & IMPURE}
    assert found == set()


def test_the_daemon_does_without_the_library_for_metrics() -> None:
    assert "prometheus_client" not in below("workerd.daemon.main")


def test_the_packages_import_nothing_when_they_are_opened() -> None:
    inits = [name for name in OURS if SOURCES[name].name == "__init__.py" and name != "workerd"]
    assert {name: GRAPH[name] for name in inits if GRAPH[name]} == {}
    # Nor does anything stand there but what its modules are.
    assert [name for name in inits if len(TREES[name].body) != 1] == []
    assert [name for name in inits if not ast.get_docstring(TREES[name])] == []


def test_few_modules_stand_directly_in_workerd() -> None:
    modules = [path for path in SOURCES.values() if path.parent == CHECKOUT / "workerd"]
    assert len(modules) <= DIRECTLY_IN_WORKERD


def test_no_module_is_long() -> None:
    long = {name for name in OURS if len(SOURCES[name].read_text().splitlines()) > LINES}
    assert {name for name in long if room(name) not in ONE_FILE} == set()
    assert all(f"workerd.{name}" in long for name in ONE_FILE)
