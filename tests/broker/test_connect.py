"""`workerd check --connect`: login, permissions and queues, each problem with its remedy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.harness.amqp import Client
from tests.harness.broker import Broker
from tests.harness.programs import WORKERD, Result, run
from tests.harness.waiting import TIMEOUT

CONFIG = """
[broker]
urls = ["amqp://{user}@{where}"]

[queues.default]
declare = "{declare}"

[handlers.sleep]
command = ["sleep", "{{body}}"]
environment = {{ TOKEN = "hidden-token" }}
"""

Check = Callable[..., Result]


@pytest.fixture
def check(broker: Broker, tmp_path: Path) -> Check:
    """Run `workerd check --connect`, by default as the user guest in the test's virtual host."""

    def check(
        user: str = "guest:guest", *, vhost: str = "", declare: str = "create", show: bool = False
    ) -> Result:
        where = f"{broker.address}:{broker.port}/{vhost or broker.vhost}"
        file = tmp_path / "workerd.toml"
        file.write_text(CONFIG.format(user=user, where=where, declare=declare))
        file.chmod(0o600)
        arguments = ["check", "--connect", "--config", str(file)]
        return run([*WORKERD, *arguments, *(["--show"] if show else [])])

    return check


def problems(result: Result) -> list[str]:
    """What it found, without the broker's address; every line names that, and no password."""
    assert (result.status, result.stdout) == (78, "")
    lines = []
    for line in result.stderr.splitlines():
        command, address, problem = line.split(": ", 2)
        assert command == "workerd"
        assert address.startswith("amqp://")
        assert address.count(":") == 2
        lines.append(problem)
    return lines


def test_a_broker_where_everything_works_is_fine_and_everything_is_declared(
    broker: Broker, client: Client, check: Check
) -> None:
    result = check()
    assert (result.status, result.stdout, result.stderr) == (0, "configuration is fine\n", "")
    assert all(map(client.exists, ["default", "default.dead", "default.due", "workerd.delay.24"]))
    # Nothing that it sent has arrived anywhere.
    assert all(depth.ready == 0 for depth in broker.queues().values())
    assert check().status == 0


def test_a_broker_that_is_down_is_a_problem(broker: Broker, check: Check) -> None:
    broker.stop()
    assert problems(check()) == ["connection refused"]


def test_a_broker_that_hangs_is_given_up(broker: Broker, check: Check) -> None:
    broker.freeze()
    result = check()
    broker.thaw()
    assert problems(result) == ["no AMQP answer within 10 s"]
    assert result.seconds < 10 + TIMEOUT


def test_a_refused_login_names_what_to_do(broker: Broker, check: Check) -> None:
    (wrong_password,) = problems(check("guest:hidden-password"))
    assert wrong_password.startswith("ACCESS_REFUSED - Login was refused")
    assert wrong_password.endswith(
        "; check the user, and its password in broker.urls or broker.password_file"
    )
    (no_vhost,) = problems(check(vhost="nowhere"))
    assert no_vhost == (
        "NOT_ALLOWED - vhost nowhere not found; create it with rabbitmqctl add_vhost nowhere"
    )
    broker.add_user("stranger", vhost=None)
    (no_access,) = problems(check("stranger:stranger"))
    assert "refused for user 'stranger'; allow it with" in no_access
    assert no_access.endswith(f"rabbitmqctl set_permissions -p {broker.vhost} stranger")
    (no_password,) = problems(check("somebody"))
    assert "no password for" in no_password
    assert "set broker.password_file" in no_password


def test_who_may_not_configure_needs_everything_to_be_declared_already(
    broker: Broker, check: Check
) -> None:
    broker.add_user("worker", configure="^$")
    levels, queue, companions = problems(check("worker:worker"))
    assert levels.startswith("the delay levels: ACCESS_REFUSED")
    assert "missing: workerd.unroutable, workerd.delay.00, workerd.delay.01, …;" in levels
    assert queue.startswith("queue default: ACCESS_REFUSED")
    assert companions.startswith("the dead letters and due jobs of default: ACCESS_REFUSED")
    for problem in (levels, queue, companions):
        assert problem.endswith("or grant the rights to configure, write and read them")
    # Once an administrator has declared them, no such right is needed.
    assert check().status == 0
    assert check("worker:worker").status == 0


def test_a_queue_that_is_waited_for_may_be_missing(broker: Broker, check: Check) -> None:
    assert check(declare="wait").status == 0
    assert "default" not in broker.queues()


def test_a_queue_of_others_is_used_as_it_is(client: Client, check: Check) -> None:
    client.declare("default")
    client.declare("default.dead", x_max_length=7)
    assert check().status == 0


def test_a_queue_that_cannot_hold_jobs_is_told(client: Client, check: Check) -> None:
    client.declare("default", x_queue_type="stream")
    (problem,) = problems(check())
    assert problem.startswith("default is a queue of type stream, which cannot hold jobs")


@pytest.mark.parametrize("full", [False, True], ids=["empty", "full"])
def test_who_may_not_read_a_queue_is_told_and_no_message_is_touched(
    broker: Broker, client: Client, check: Check, full: bool
) -> None:
    assert check().status == 0
    if full:
        client.publish("default", b"precious")
    broker.add_user("worker", read="^$")
    *_, queue, due = problems(check("worker:worker"))
    for problem, name in ((queue, "default"), (due, "default.due")):
        assert problem.startswith(f"queue {name}: ACCESS_REFUSED")
        assert problem.endswith(f"the right to read {name} with rabbitmqctl set_permissions")
    assert check().status == 0
    assert [(message.body, message.redelivered) for message in client.drain("default")] == (
        [(b"precious", False)] if full else []
    )


@pytest.mark.parametrize(
    ("write", "missing"),
    [(r"^(default\.due|workerd\..*)$", "amq.default"), (r"^amq\.default$", "workerd.delay.00")],
)
def test_who_may_not_publish_is_told(
    broker: Broker, check: Check, write: str, missing: str
) -> None:
    assert check().status == 0
    broker.add_user("worker", write=write)
    *_, problem = problems(check("worker:worker"))
    assert problem.startswith("publishing: ACCESS_REFUSED")
    assert problem.endswith(f"the right to write {missing} with rabbitmqctl set_permissions")


def test_what_is_shown_holds_no_secret(broker: Broker, check: Check) -> None:
    broker.add_user("hidden-user")
    result = check("hidden-user:hidden-user", show=True)
    assert (result.status, result.stderr) == (0, "")
    assert f'"amqp://hidden-user@{broker.address}:{broker.port}/{broker.vhost}"' in result.stdout
    assert 'environment.TOKEN = "***"' in result.stdout
    assert "hidden-token" not in result.stdout
    assert ":hidden-user@" not in result.stdout
