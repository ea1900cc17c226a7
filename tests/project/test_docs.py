"""The documentation names every key and every event, and links to what is there."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.harness.trixie import CHECKOUT
from workerd.config.fields import Pairs, Section, value_types
from workerd.config.model import TLS, Broker, Control, Handler, Log, Queue, Retry, Worker
from workerd.log_formats import message_id

DOCS = CHECKOUT / "docs"
PAGES = [CHECKOUT / "README.md", CHECKOUT / "CHANGELOG.md", *sorted(DOCS.glob("*.md"))]

TABLES = {
    "`[broker]`": Broker(),
    "`[broker.tls]`": TLS(),
    "`[worker]`": Worker(),
    "`[queues.NAME]`": Queue("x"),
    "`[handlers.NAME]`": Handler("x"),
    "`retry`": Retry(),
    "`[log]`": Log(),
    "`[control]`": Control(),
}
# Where the default is more than a value.
IN_WORDS = {"queues": "all that are configured", "prefetch": "`concurrency`"}


def rows(heading: str) -> dict[str, tuple[str, str]]:
    """The kind and the default of every key in the table under a heading."""
    text = (DOCS / "configuration.md").read_text()
    section = re.split(r"^##+ ", text.partition(f"# {heading}\n")[2], flags=re.MULTILINE)[0]
    cells = (line.split(" | ") for line in section.splitlines() if line.startswith("| `"))
    return {key.strip("| `"): (kind, default) for key, kind, default, *_ in cells}


def default(settings: Any, key: str, kind: Any) -> str:
    value = getattr(settings, key)
    if key in IN_WORDS:
        return IN_WORDS[key]
    if isinstance(kind, Pairs):
        entries = ", ".join(f"{name} = {kind.value.show(entry)}" for name, entry in value.items())
        return f"`{{ {entries} }}`" if entries else "`{}`"
    if value is None or value == ():
        return "–"
    return f"`{kind.scalar.show(value)}`"


@pytest.mark.parametrize("heading", TABLES)
def test_every_key_is_documented_with_its_default(heading: str) -> None:
    settings = TABLES[heading]
    expected = {
        key: default(settings, key, kind)
        for key, kind in value_types(type(settings)).items()
        if not isinstance(kind, Section)
    }
    assert {key: default for key, (_, default) in rows(heading).items()} == expected


def events() -> Iterator[str]:
    """The constant names of all events in the code."""
    for path in sorted((CHECKOUT / "workerd").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                module = node.func.value
                if isinstance(module, ast.Name) and module.id == "log":
                    for part in ast.walk(node.args[0]) if node.args else ():
                        if isinstance(part, ast.Constant) and isinstance(part.value, str):
                            yield part.value


def documented() -> set[str]:
    """The events that docs/logging.md lists."""
    return set(re.findall(r"^\| `([a-z ]+)` \|", (DOCS / "logging.md").read_text(), re.MULTILINE))


def test_every_event_is_explained_in_the_catalog_of_the_journal() -> None:
    catalog = (CHECKOUT / "packaging/systemd/workerd.catalog").read_text()
    explained = dict(
        re.findall(r"^# ([a-z ]+)\n-- ([0-9a-f]{32})\nSubject: .", catalog, re.MULTILINE)
    )
    # A job's own output explains itself.
    assert explained == {event: message_id(event) for event in documented() - {"output"}}


def test_the_catalog_names_fields_that_there_are() -> None:
    catalog = (CHECKOUT / "packaging/systemd/workerd.catalog").read_text()
    fields = set(re.findall(r"`([a-z_]+)`", (DOCS / "logging.md").read_text()))
    assert set(re.findall(r"@WORKERD_(\w+)@", catalog)) <= {name.upper() for name in fields}


def test_every_event_is_documented() -> None:
    listed = documented()
    # These are the outcomes of runs, and what the log says of itself.
    computed = {"failed", "rejected", "interrupted", "log dropped"}
    # Of copies that the broker does not take.
    computed |= {"retry refused", "postponement refused", "dead letter refused"}
    # By an operator.
    computed |= {"paused", "resumed"}
    # The level that is chosen for "publisher disconnected" has a name of its own.
    computed.add("publisher disconnected")
    not_events = {"auto"}
    assert set(events()) - not_events | computed == listed


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    text = re.sub(r"`[^`\n]*`", "", page.read_text())  # code is no link
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", text):
        name, _, anchor = target.partition("#")
        file = (page.parent / name) if name else page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)", file.read_text(), re.MULTILINE)
            anchors = {
                re.sub(r"[^\w\- ]", "", h).strip().lower().replace(" ", "-") for h in headings
            }
            assert anchor in anchors, target


def test_the_words_of_the_glossary_are_in_order_and_there_once() -> None:
    words = re.findall(r"(?m)^\| ([^|]+) \| ", (DOCS / "glossary.md").read_text())[1:]
    assert "dead letter" in words
    assert words == sorted(set(words), key=str.casefold)


GUIDES = ["architecture.md", "contributing.md"]


def members() -> dict[str, set[str]]:
    """The classes of workerd, with what each of them has."""
    found: dict[str, set[str]] = {}
    for path in sorted((CHECKOUT / "workerd").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                own = found.setdefault(node.name, set())
                for each in ast.walk(node):
                    if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef):
                        own.add(each.name)
                    elif isinstance(each, ast.Attribute) and isinstance(each.ctx, ast.Store):
                        own.add(each.attr)
    return found


@pytest.mark.parametrize("guide", GUIDES)
def test_a_guide_to_the_code_names_files_that_there_are(guide: str) -> None:
    named = re.findall(r"`((?:[\w.-]+/)+[\w.-]*)`", (DOCS / guide).read_text())
    assert named
    places = (CHECKOUT, CHECKOUT / "workerd")
    missing = [name for name in named if not any((root / name).exists() for root in places)]
    assert [name for name in missing if "NAME" not in name and "*" not in name] == []


def test_the_architecture_names_what_is_in_the_code() -> None:
    classes = members()
    named = re.findall(
        r"\b([A-Z]\w+)\.(?!md|py)([a-z_]\w+)", (DOCS / "architecture.md").read_text()
    )
    assert ("Worker", "perform") in named
    assert {f"{cls}.{name}" for cls, name in named if name not in classes.get(cls, set())} == set()
