"""What `workerd check` finds without a broker."""

import os
from pathlib import Path
from typing import Any

from workerd.check.offline import check
from workerd.config.model import Broker, Control, Handler, Settings

PATH = {"PATH": os.defpath}


def problems(timeout: float = 1.0, **settings: Any) -> list[str]:
    handler = Handler("x", command=("sleep", "1"), timeout=timeout)
    return check(Settings(handlers={"x": handler}, **settings), PATH)


def test_a_password_file_that_is_not_there_is_found(tmp_path: Path) -> None:
    file = tmp_path / "password"
    broker = Broker(password_file=file)
    (problem,) = check(Settings(broker=broker), PATH)
    assert problem.startswith(f"broker.password_file: {file}: No such file or directory; ")
    file.write_text("secret")
    assert check(Settings(broker=broker), PATH) == []


def test_a_handler_may_not_outlast_the_acknowledgement_timeout() -> None:
    (problem,) = problems(1800.0)
    assert problem.startswith("handlers.x.timeout: 30m is not below broker.ack_timeout, 30m: ")
    assert "RabbitMQ's consumer_timeout" in problem
    assert problems(1800.0, broker=Broker(ack_timeout=1801.0)) == []


def test_the_group_of_operators_has_to_exist() -> None:
    (problem,) = problems(control=Control(operators="no-such-group"))
    assert problem.startswith('control.operators: there is no group "no-such-group"')
