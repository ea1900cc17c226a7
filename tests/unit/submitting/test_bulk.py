"""Lines that are to be JSON."""

from __future__ import annotations

import pytest

from workerd.errors import EX_DATAERR, CommandError
from workerd.submitting import bulk


@pytest.mark.parametrize(
    "line",
    [
        "{}".encode("utf-16"),
        "1".encode("utf-32-le"),
        b"\xef\xbb\xbf{}",
        b'"\xff"',
        b"",
        b"[" * 100_000,
    ],
    ids=["utf-16", "utf-32", "byte order mark", "latin", "empty", "deep"],
)
def test_only_json_in_utf_8_is_json(line: bytes) -> None:
    with pytest.raises(CommandError, match="not JSON: ") as caught:
        bulk._check_json(line)
    assert caught.value.status == EX_DATAERR


def test_json_in_utf_8_is_taken() -> None:
    bulk._check_json('{"name": "é\U0001f600"}\r'.encode())
