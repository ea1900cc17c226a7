"""What a reload changes."""

from __future__ import annotations

from pathlib import Path

import pytest

from workerd.config.load import load
from workerd.config.model import Settings
from workerd.daemon.reload import differences

BEFORE = """
[queues.default]
[handlers.sleep]
command = ["sleep", "1"]
"""


def settings(tmp_path: Path, text: str) -> Settings:
    file = tmp_path / "workerd.toml"
    file.write_text(text)
    return load(file, "1", {})


@pytest.mark.parametrize(
    ("after", "changes"),
    [
        (BEFORE, []),
        (BEFORE.replace('"1"', '"2"'), ["handlers.sleep"]),
        (BEFORE + '[broker]\nheartbeat = "9s"\n[log]\nlevel = "debug"', ["broker", "log"]),
        (BEFORE.replace("sleep]", "nap]"), ["+handlers.nap", "-handlers.sleep"]),
    ],
)
def test_the_tables_that_differ_are_named(tmp_path: Path, after: str, changes: list[str]) -> None:
    old = settings(tmp_path, BEFORE)
    assert differences(old, settings(tmp_path, after)) == changes
