"""Placeholders in the arguments of commands."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workerd.config.template import Placeholder, Template


def test_an_argument_is_cut_into_text_and_placeholders() -> None:
    assert Template.parse("--user={body.user.name}/{id}!").parts == (
        "--user=",
        Placeholder("body.key", "user.name"),
        "/",
        Placeholder("id"),
        "!",
    )
    assert Template.parse("").parts == ()


@pytest.mark.parametrize("name", ["id", "type", "queue", "attempt", "body"])
def test_every_plain_placeholder_is_known(name: str) -> None:
    (placeholder,) = Template.parse("{" + name + "}").placeholders
    assert placeholder.kind == name


def test_a_header_is_named_by_what_follows_the_dot() -> None:
    assert Template.parse("{header.X-Trace}").parts == (Placeholder("header", "X-Trace"),)


def test_double_braces_are_braces() -> None:
    assert Template.parse("{{body}}").parts == ("{body}",)
    assert Template.parse("{{{body}}}").parts == ("{", Placeholder("body"), "}")
    assert Template.parse('{{"a": 1}}').parts == ('{"a": 1}',)


@pytest.mark.parametrize("text", ["{", "}", "a{b", "{body", "body}", "{body}}", "{{body}", "{a{b}"])
def test_a_lone_brace_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="a literal brace is written"):
        Template.parse(text)


@pytest.mark.parametrize("text", ["{}", "{bdy}", "{ body }", "{body.}", "{header}", "{id.x}"])
def test_an_unknown_placeholder_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="unknown placeholder"):
        Template.parse(text)


def test_a_misspelt_placeholder_is_put_right() -> None:
    with pytest.raises(ValueError, match=r'did you mean "\{attempt\}"'):
        Template.parse("{atempt}")


@pytest.mark.parametrize("text", ["{}", "{$1}", "{Worker,isMainThread}", "{eval:true}"])
def test_braces_of_another_language_are_told_how_they_are_written(text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f'write "{{{text}}}"')):
        Template.parse(text)


@given(st.text("{}abody.", max_size=20) | st.text(max_size=20))
def test_parsing_either_succeeds_or_raises_a_value_error(text: str) -> None:
    try:
        parts = Template.parse(text).parts
    except ValueError:
        return
    assert all(parts), "no empty part"


@given(st.text(max_size=30))
def test_every_text_can_be_written_literally(text: str) -> None:
    template = Template.parse(text.replace("{", "{{").replace("}", "}}"))
    assert "".join(map(str, template.parts)) == text
    assert template.placeholders == ()
