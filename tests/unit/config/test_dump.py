"""The configuration as it is shown: TOML without secrets."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import tomli
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from tests.harness.trixie import CHECKOUT
from workerd.config.dump import show
from workerd.config.load import load
from workerd.config.text import toml
from workerd.errors import SettingsError

Write = Callable[..., Path]

SHIPPED = CHECKOUT / "etc" / "workerd.toml"
SLEEP = '[handlers.sleep]\ncommand = ["sleep", "{body}"]\n'


def test_what_is_shown_reads_back_as_the_same_settings(write: Write, etc: Path) -> None:
    write(SHIPPED.read_text())
    write(
        '[handlers."image.resize"]\npython = "a:b"\nrecycle_after = 0\nkill_grace = 0.3\n'
        'max_body = 1000\n[control]\noperators = "ops"\n',
        "conf.d/a.toml",
    )
    before = load(etc=etc, environ={})
    text = show(before)
    assert f'kill_grace = "300ms"  # {etc}/conf.d/a.toml' in text
    assert 'timeout = "25m"  # default' in text
    assert "# memory_limit is not set" in text
    after = load(write(text, "shown.toml"), environ={})
    assert replace(after, origins=before.origins, files=before.files) == before


def test_secrets_are_not_shown(write: Write, etc: Path) -> None:
    write(
        '[broker]\nurls = ["amqp://u:s3cret@h/v"]\nmanagement_url = "http://u:s3cret@h"\n'
        + SLEEP
        + 'environment = { TOKEN = "s3cret" }\n'
    )
    settings = load(etc=etc, environ={})
    shown = tomli.loads(show(settings))
    assert shown["broker"]["urls"] == ["amqp://u@h:5672/v"]
    assert shown["broker"]["management_url"] == "http://u:***@h"
    assert shown["handlers"]["sleep"]["environment"] == {"TOKEN": "***"}
    assert "s3cret" not in show(settings) + repr(settings)


@hypothesis_settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.text("!\"'.-\\~aé ", min_size=1),
    argument=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="{}\0")),
)
def test_any_name_and_argument_are_either_refused_or_shown_as_toml(
    etc: Path, name: str, argument: str
) -> None:
    file = etc / "workerd.toml"
    file.write_text(f'[handlers.{toml(name)}]\ncommand = ["x", {toml(argument)}]\n')
    try:
        settings = load(file, environ={})
    except SettingsError:
        assert not re.fullmatch("[!-~]+", name)
    else:
        shown = tomli.loads(show(settings))["handlers"]
        assert shown[name]["command"] == ["x", argument]
