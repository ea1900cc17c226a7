"""The log as a line for eyes."""

import os

import pytest

from workerd import log_formats


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("plain", "plain"),
        ("two words", '"two words"'),
        ("two\nlines here", r'"two\nlines here"'),
        ('say "x"', r'"say \"x\""'),
        ('x\\" job_id=forged', r'"x\\\" job_id=forged"'),
        ("\x1b[31m\x9b red", r'"\u001b[31m\x9b red"'),
        ("\x1b[31m", r"\x1b[31m"),
    ],
)
def test_a_field_is_escaped_once(value: str, shown: str) -> None:
    reader, writer = os.pipe()
    log_formats.console(writer)((0.0, "info", "failed", {"error": value}))
    line = os.read(reader, 4096).decode()
    os.close(reader)
    os.close(writer)
    assert line.partition(" ")[2] == f"failed error={shown}\n"
