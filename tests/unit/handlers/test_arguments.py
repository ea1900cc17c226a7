"""The values of placeholders in a command's arguments."""

from __future__ import annotations

import pytest

from tests.harness.commands import (
    arguments,
    job,
    refusal,
)


def test_every_placeholder_has_its_value() -> None:
    given = job(
        b'{"user": "ann"}',
        message_id="id-7",
        type="greet",
        headers={"X-Trace": "t1", "x-workerd-attempt": 2},
    )
    templates = ["{id}", "{type}", "{queue}", "{attempt}", "{body}", "{body.user}"]
    assert arguments(*templates, "{header.X-Trace}", job=given) == [
        b"id-7",
        b"greet",
        b"work",
        b"3",
        b'{"user": "ann"}',
        b"ann",
        b"t1",
    ]


def test_several_placeholders_and_text_make_one_argument() -> None:
    given = job(b'{"a": "1 2", "b": "x"}')
    assert arguments("--{body.a}={{{body.b}}}!", job=given) == [b"--1 2={x}!"]


def test_a_value_is_not_expanded_again() -> None:
    given = job(b'{"k": "{header.x}", "l": "{{"}', message_id="{body}", headers={"x": "{id}"})
    templates = ("{body.k}", "{body.l}", "{id}", "{header.x}")
    assert arguments(*templates, job=given) == [b"{header.x}", b"{{", b"{body}", b"{id}"]


def test_double_braces_are_braces() -> None:
    assert arguments("{{id}}", '{{"a": {id}}}', job=job(message_id="7")) == [b"{id}", b'{"a": 7}']


@pytest.mark.parametrize(
    "hostile",
    ["$(touch /tmp/x)", "`id`", "; id", "a b\tc", "*", "'\"", "a\nb", "\\n%s%n", "~", "$HOME", ""],
)
def test_a_value_stays_inside_its_argument_whatever_a_shell_would_make_of_it(hostile: str) -> None:
    given = job(hostile.encode(), message_id=f"i{hostile}", headers={"h": hostile})
    assert arguments("{body}", "x{header.h}", "{id}", job=given) == [
        hostile.encode(),
        b"x" + hostile.encode(),
        b"i" + hostile.encode(),
    ]


def test_any_bytes_but_nul_may_be_an_argument() -> None:
    body = bytes(range(1, 256))
    assert arguments("{body}", job=job(body)) == [body]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("5", "5"),
        ("-0.5", "-0.5"),
        ("true", "true"),
        ("null", "null"),
        ('[1, {"a": "b"}]', '[1, {"a": "b"}]'),
        ('"gr\\u00fcn"', "grün"),
        ('"\\ud83d\\ude00"', "😀"),
        ('""', ""),
    ],
)
def test_a_value_of_the_body_that_is_no_text_is_given_as_json(value: str, text: str) -> None:
    given = job(b'{"k": %s}' % value.encode())
    assert arguments("{body.k}", job=given) == [text.encode()]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (5, b"5"),
        (True, b"true"),
        (["a", 1], b'["a", 1]'),
        (b"\xfc", b"\xfc"),
        ({b"\xfc": 1, "a": 2}, b'{"a": 2}'),
    ],
)
def test_a_header_that_is_no_text_is_given_as_json_and_bytes_as_they_are(
    value: object, text: bytes
) -> None:
    assert arguments("{header.h}", job=job(headers={"h": value})) == [text]


@pytest.mark.parametrize(
    ("body", "error"),
    [
        (b'{"other": 1}', "the body has no key 'k'"),
        (b"", "the body is not JSON"),
        (b"{", "the body is not JSON"),
        (b'{"k": "\xff"}', "the body is not JSON"),
        (b'["k"]', "the body is not a JSON object"),
        (b'{"k": ' + b"[" * 100_000, "the body is not JSON"),
        (b'{"k": ' + b"9" * 5000 + b"}", "the body is not JSON"),
        (b'{"k": "\\ud800"}', "the value of 'k' is half a surrogate pair"),
    ],
)
def test_a_body_without_the_value_that_is_asked_for_is_refused(body: bytes, error: str) -> None:
    report = refusal("{body.k}", job=job(body))
    assert report.reason == "bad-body"
    assert error in report.error


def test_a_missing_header_is_refused() -> None:
    report = refusal("{header.X-Trace}", job=job(headers={"x-trace": "other"}))
    assert (report.reason, report.error) == ("bad-header", "there is no header 'X-Trace'")
