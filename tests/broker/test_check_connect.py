"""What `workerd check --connect` finds at a broker."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.broker import Broker
from workerd.check.broker import check_broker
from workerd.config.load import load
from workerd.config.model import Settings


@pytest.fixture
def narrow(broker: Broker, tmp_path: Path) -> Iterator[Settings]:
    """The settings of a user who may not configure anything."""
    user = f"narrow-{broker.vhost}"
    broker.ctl("add_user", user, "secret")
    broker.ctl("set_permissions", "-p", broker.vhost, user, "^$", ".*", ".*")
    file = tmp_path / "workerd.toml"
    file.touch(0o600)
    file.write_text(f'[broker]\nurls = ["{broker.url.replace("guest:guest", f"{user}:secret")}"]\n')
    yield load(file, environ={})
    broker.ctl("delete_user", user)


def test_check_says_why_a_queue_that_is_missing_could_not_be_declared(narrow: Settings) -> None:
    problems = [problem for problem in check_broker(narrow) if ": queue default: " in problem]
    assert len(problems) == 1
    assert "ACCESS_REFUSED" in problems[0]
