"""How dead letters look."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest

from tests.harness.letters import EXPIRED, FACTS, NOW, letter
from workerd.core.job import UNREADABLE
from workerd.deadletters.render import details, export, row


def test_a_letter_of_workerd_tells_its_facts() -> None:
    failed = letter(FACTS, message_id="a", type="resize", body=b"xyz")
    assert row(failed, NOW)[:5] == ("a", "resize", "exit-status", "5", "3")
    assert row(failed, NOW)[6] == "3"
    assert dict(details(failed, NOW).texts) == {"error": "one\ntwo\x1b[31m", "body, 3 bytes": "xyz"}


def test_a_letter_of_the_broker_is_explained_in_words() -> None:
    expired = letter(EXPIRED, message_id="a")
    assert row(expired, NOW) == ("a", "-", "expired", "-", "-", "2h", "0")
    told = dict(details(expired, NOW).facts)["RabbitMQ"]
    assert told.startswith(
        "expired in queue jobs, 2 times, first at 2027-01-15T06:00:00Z: its time"
    )


@pytest.mark.parametrize(
    "headers",
    [
        {"x-death": "nonsense", "x-workerd-last-failure": "yesterday", "x-workerd-attempts": "x"},
        {"x-death": [3, {}], "x-workerd-reason": 7, "x-workerd-error": b"\xff"},
        {UNREADABLE: b"\0\1"},
        {b"\xff": {b"\xfe": [float("nan"), b"\xff"]}},
    ],
)
def test_a_letter_full_of_nonsense_can_be_shown(headers: dict[Any, Any]) -> None:
    odd = letter(headers, message_id=b"\xff", type=b"\xfe", body=bytes(range(256)))
    assert row(odd, NOW)[0] == r"\xff"
    assert details(odd, NOW).texts[-1][1].startswith("00 01 02")
    shown = json.loads(json.dumps(export(odd), allow_nan=False))
    assert base64.b64decode(shown["body_base64"]) == odd.message.body
