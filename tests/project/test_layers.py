"""Which module may import what."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import workerd

PACKAGE = Path(workerd.__file__).parent
MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


def imports(node: ast.AST) -> Iterator[str]:
    """Every module that is imported when the code runs, at its top or later."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.module, "absolute imports only"
            names = [f"{child.module}.{alias.name}" for alias in child.names]
            yield from (name if name in MODULES else child.module for name in names)
        elif not (isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"):
            yield from imports(child)


GRAPH = {name: set(imports(ast.parse(path.read_text()))) for name, path in MODULES.items()}


def below(name: str) -> set[str]:
    """Everything that this module imports, and what that imports from workerd, and so on."""
    found: set[str] = set()
    new = {name}
    while new:
        new = {each for module in new for each in GRAPH.get(module, ())} - found
        found |= new
    return found


def within(name: str, package: str) -> bool:
    return f"{name}.".startswith(f"{package}.")


@pytest.mark.parametrize(
    ("library", "place"),
    [
        ("pika", "workerd.broker"),
        ("sdnotify", "workerd.daemon.systemd"),
        ("daemon", "workerd.daemon.detach"),
        ("tomli", "workerd.config.load"),
        ("rich", "workerd.cli.watch"),
        ("prometheus_client", "workerd.cli.prometheus"),
    ],
)
def test_a_library_is_imported_in_one_place(library: str, place: str) -> None:
    users = {name for name in GRAPH if any(within(each, library) for each in GRAPH[name])}
    assert users
    assert all(within(name, place) for name in users), users


CORE = [
    *("admission", "cancellations", "copies", "figures", "job", "ledger", "orphans", "pauses"),
    *("retry", "slots", "tally", "template", "times", "topology"),
]


@pytest.mark.parametrize("name", CORE)
def test_the_core_is_pure(name: str) -> None:
    forbidden = {"asyncio", "threading", "socket", "subprocess", "logging", "pika", "workerd.log"}
    assert below(f"workerd.{name}") & forbidden == set()
    # An id begins with the time; nothing else in the core asks a clock.
    clocks = {each for each in below(f"workerd.{name}") if "time" in GRAPH.get(each, ())}
    assert clocks <= {"workerd.ids"}


def test_imports_go_down_only() -> None:
    TopologicalSorter(GRAPH).prepare()  # raises an error that names the circle


def test_broker_handlers_and_service_know_nothing_of_each_other() -> None:
    parts = {"workerd.broker", "workerd.handlers", "workerd.daemon.systemd"}
    for name in GRAPH:
        for part in parts:
            if within(name, part):
                others = parts - {part}
                assert not {n for n in below(name) if any(within(n, o) for o in others)}, name


def test_the_worker_is_given_its_handlers_and_its_host() -> None:
    used = below("workerd.worker.worker")
    assert not {
        n for n in used if within(n, "workerd.handlers") or within(n, "workerd.daemon.systemd")
    }


def test_the_daemon_does_without_the_library_for_metrics() -> None:
    assert "prometheus_client" not in below("workerd.daemon.main")
