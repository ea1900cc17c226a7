"""The recipes of docs/architecture.md: what each list of files promises, nothing forgotten."""

from __future__ import annotations

import argparse
import ast
import importlib.util
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import pytest
import tomli

from tests.harness.trixie import CHECKOUT
from workerd.cli.main import parser
from workerd.config.fields import Named, Section, value_types
from workerd.config.model import HandlerKind, Settings

DOCS = CHECKOUT / "docs"


def page(name: str) -> str:
    return (DOCS / name).read_text()


def section(text: str, heading: str) -> str:
    """What stands below a heading, up to the next one of its kind."""
    level = heading.partition(" ")[0]
    _, found, rest = text.partition(f"\n{heading}\n")
    assert found, heading
    return re.split(rf"^{level} ", rest, flags=re.MULTILINE)[0]


@pytest.fixture(scope="module")
def manual(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the manual pages."""
    script = CHECKOUT / "packaging/manual.py"
    spec = importlib.util.spec_from_file_location("manual", script)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    folder = tmp_path_factory.mktemp("manual")
    module.main(folder)
    return folder


def roff(text: str) -> str:
    return text.replace("-", r"\-")


# A configuration key


def keys(cls: type, names: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The path of every key below a table; NAME stands for the names that users give."""
    for name, kind in value_types(cls).items():
        if isinstance(kind, Named):
            yield from keys(kind.cls, (*names, name, "NAME"))
        elif isinstance(kind, Section):
            yield from keys(kind.cls, (*names, name))
        else:
            yield (*names, name)


KEYS = sorted(keys(Settings))


@pytest.mark.parametrize("key", KEYS, ids=".".join)
def test_a_key_is_in_the_documents_and_in_the_manual(key: tuple[str, ...], manual: Path) -> None:
    row = rf"(?m)^\| `{key[-1]}` \|"
    assert re.search(row, page("configuration.md"))
    assert f"\n.TP\n\\fB{key[-1]}\\fR\n" in (manual / "workerd.toml.5").read_text()


def without_comments(shipped: str) -> str:
    """The shipped file with all that it proposes in force."""
    return re.sub(r"(?m)^# ?(?=\[\w+[.\w]*\]$|\w+ = )", "", shipped)


def paths(table: Mapping[str, Any], names: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, value in table.items():
        place = (*names, "NAME") if names in (("queues",), ("handlers",)) else (*names, name)
        if isinstance(value, dict):
            yield from paths(value, place)
        else:
            yield place


def test_the_shipped_file_proposes_keys_that_there_are() -> None:
    text = without_comments((CHECKOUT / "etc/workerd.toml").read_text())
    # Two proposals for one key: the later one.
    lines: dict[str, str] = {}
    table = ""
    for line in text.splitlines():
        table = line if line.startswith("[") else table
        lines[f"{table} {line.partition(' = ')[0]}"] = line
    named = set(paths(tomli.loads("\n".join(lines.values()))))
    assert ("handlers", "NAME", "retry", "attempts") in named
    assert named <= set(KEYS)


# A command


def commands(top: argparse.ArgumentParser) -> Iterator[tuple[str, str]]:
    """Every command: all of its words, and its help in a list of commands."""
    for action in top._actions:
        if isinstance(action, argparse._SubParsersAction):
            about = {each.dest: each.help or "" for each in action._choices_actions}
            for name, below in action.choices.items():
                yield below.prog.removeprefix("workerd "), about.get(name, "")
                yield from commands(below)


COMMANDS = dict(commands(parser()))


def test_every_command_says_what_it_is_for() -> None:
    assert [name for name, about in COMMANDS.items() if not about] == []


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_is_in_the_readme_and_in_the_manual(name: str, manual: Path) -> None:
    table = section((CHECKOUT / "README.md").read_text(), "## Commands")
    assert re.search(rf"`(workerd )?{name}\b", table)
    assert f'\n.SH "workerd {roff(name)}"\n' in (manual / "workerd.8").read_text()


@pytest.mark.parametrize("name", sorted({name.partition(" ")[0] for name in COMMANDS}))
def test_a_command_has_a_module_that_is_named_for_it_or_says_so(name: str) -> None:
    modules = CHECKOUT / "workerd/cli"
    module = modules / f"{name.replace('-', '_')}.py"
    listed = (modules / "__init__.py").read_text()
    assert module.exists() or re.search(rf"`(workerd )?{name}`", listed)


# A queue argument


def test_every_queue_argument_is_documented() -> None:
    code = (CHECKOUT / "workerd/core/topology.py").read_text()
    strings = {n.value for n in ast.walk(ast.parse(code)) if isinstance(n, ast.Constant)}
    used = {each for each in strings if isinstance(each, str) and re.fullmatch("x-[a-z-]+", each)}
    assert "x-queue-type" in used
    assert {each for each in used if each not in page("topology.md")} == set()


# A handler kind


@pytest.mark.parametrize("kind", get_args(HandlerKind))
def test_a_handler_kind_is_documented(kind: str) -> None:
    assert ("handlers", "NAME", kind) in KEYS
    examples = page("handlers.md") + (CHECKOUT / "README.md").read_text()
    assert re.search(rf"(?m)^{kind} = ", examples)


# A request of the local socket


def test_every_request_is_documented() -> None:
    code = (CHECKOUT / "workerd/control/requests.py").read_text()
    table = code.partition("self._requests: ")[2].partition("= {")[2].partition("}")[0]
    requests = {*re.findall(r'"(\w+)":', table), "submit"}
    assert "status" in requests
    headings = re.findall(r"(?m)^### (.*)", page("control.md"))
    assert requests == set(re.findall(r"`(\w+)`", " ".join(headings)))


# A log event: the events themselves are in test_docs.

# What docs/logging.md calls "job" in its tables.
JOB = {"job_id", "job_type", "queue", "attempt"}


def fields() -> Iterator[tuple[str, str]]:
    """The fields that each call of the log names: event, field."""
    for path in sorted((CHECKOUT / "workerd").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                module, event = node.func.value, node.args[:1]
                if isinstance(module, ast.Name) and module.id == "log" and event:
                    for keyword in node.keywords:
                        if keyword.arg and isinstance(event[0], ast.Constant):
                            yield str(event[0].value), keyword.arg


def test_every_field_of_an_event_is_documented_in_its_row() -> None:
    rows = dict(re.findall(r"(?m)^\| `([a-z ]+)` \|(.*)", page("logging.md")))
    found = set(fields())
    assert ("start", "redelivered") in found
    missing = {
        f"{event}: {name}"
        for event, name in found
        if event in rows and f"`{name}`" not in rows[event]
        if not (name in JOB and "job" in rows[event])
    }
    assert missing == set()


# A commit


def test_what_runs_before_a_commit_is_what_make_check_runs() -> None:
    makefile = (CHECKOUT / "Makefile").read_text()
    recipe = makefile.partition("\ncheck:")[2].partition("\n\n")[0]
    commands = re.findall(r"(?m)^\t\$\(python\) (.*)$", recipe)
    hooks = (CHECKOUT / ".pre-commit-config.yaml").read_text()
    assert commands
    assert re.findall(r"(?m)^ +entry: \.venv/bin/python (.*)$", hooks) == commands


def test_make_help_lists_every_target() -> None:
    makefile = (CHECKOUT / "Makefile").read_text()
    [targets] = re.findall(r"(?m)^\.PHONY: (.*)$", makefile)
    assert re.findall(r"(?m)^([a-z]+):.* ## .+$", makefile) == targets.split()
