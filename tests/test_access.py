"""Login, permissions and virtual hosts: what only an administrator can mend."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.harness.amqp import Client
from tests.harness.broker import Broker
from tests.harness.config import config
from tests.harness.daemon import Daemon
from tests.harness.oracle import Oracle

StartDaemon = Callable[..., Daemon]

TWO_QUEUES: dict[str, dict[str, str]] = {"jobs": {}, "others": {}}


class User:
    """A user of the broker, who may do nothing yet in its virtual host."""

    def __init__(self, broker: Broker, password: Path) -> None:
        # As unique as the virtual host, so that nobody has to clean up.
        self.name = f"user-of-{broker.vhost}"
        self.url = broker.url.replace("guest:guest", self.name)
        self.password = password
        self._broker = broker
        broker.eval(
            f'rabbit_auth_backend_internal:add_user(<<"{self.name}">>, <<"right">>, <<"tests">>)'
        )
        self.write("right")

    def write(self, password: str) -> None:
        """Write the password file of the daemon."""
        self.password.write_text(f"{password}\n")
        self.password.chmod(0o600)

    def permit(self, configure: str = ".*", write: str = ".*", read: str = ".*") -> None:
        rights = ", ".join(f'<<"{right}">>' for right in (configure, write, read))
        self._broker.eval(
            "rabbit_auth_backend_internal:set_permissions("
            f'<<"{self.name}">>, <<"{self._broker.vhost}">>, {rights}, <<"tests">>)'
        )


@pytest.fixture
def user(broker: Broker, tmp_path: Path) -> User:
    return User(broker, tmp_path / "password")


def warnings(daemon: Daemon) -> list[str]:
    return [entry["event"] for entry in daemon.events(level="warning")]


def test_a_wrong_password_is_tried_slowly_until_the_file_is_mended(
    broker: Broker, client: Client, daemon: StartDaemon, oracle: Oracle, user: User
) -> None:
    user.permit()
    user.write("not-the-password")
    settings = {"password_file": str(user.password), "reconnect_max": "400ms"}
    workerd = daemon(
        config(user.url, oracle.command(), broker=settings, worker={"ready_wait": "500ms"})
    )
    workerd.wait_ready()
    refused = workerd.wait_event("unreachable", count=3)
    assert refused["text"].startswith("ACCESS_REFUSED - ")
    # Not the shorter pauses of a network that may be back any moment.
    assert {entry["retry_in"] for entry in workerd.events("unreachable")} == {0.4}
    workerd.wait_notify(
        lambda text: text.startswith("STATUS=waiting for broker 127.0.0.1 in 0s: ACCESS_REFUSED")
    )
    # One for each connection, many attempts.
    assert sorted(warnings(workerd)) == ["publisher disconnected", "unreachable"]

    user.write("right")
    workerd.wait_event("consuming")
    jobs = client.publish_jobs("jobs", ["a"])
    workerd.wait_event("done")
    oracle.check(jobs)
    assert "not-the-password" not in workerd.transcript()


def test_a_user_without_permissions_gets_in_once_it_has_them(
    broker: Broker, client: Client, daemon: StartDaemon, oracle: Oracle, user: User
) -> None:
    workerd = daemon(
        config(user.url, oracle.command(), broker={"password_file": str(user.password)})
    )
    refused = workerd.wait_event("unreachable")
    assert f"access to vhost '{broker.vhost}' refused" in refused["text"]
    workerd.wait_notify(lambda text: f"access to vhost '{broker.vhost}' refused" in text)

    user.permit()
    workerd.wait_event("consuming")
    jobs = client.publish_jobs("jobs", ["a"])
    workerd.wait_event("done")
    oracle.check(jobs)


@pytest.mark.parametrize("right", ["configure", "read"])
def test_a_queue_that_is_forbidden_is_consumed_once_it_is_permitted(
    broker: Broker,
    client: Client,
    daemon: StartDaemon,
    oracle: Oracle,
    user: User,
    right: str,
) -> None:
    if right == "read":
        # Without the right to read it, one that is missing could not be made either.
        client.declare("jobs")
    user.permit(**{right: "^(?!jobs$)"})
    settings = {"password_file": str(user.password)}
    workerd = daemon(config(user.url, oracle.command(), queues=TWO_QUEUES, broker=settings))
    workerd.wait_event("consuming", queue="others")
    workerd.wait_event("queue paused", queue="jobs")
    workerd.wait_notify(
        lambda text: (
            "STATUS=consuming others: " in text
            and "; jobs paused: ACCESS_REFUSED - " in text
            and "to queue 'jobs'" in text
        )
    )
    jobs = client.publish_jobs("others", ["a"])
    workerd.wait_event("done", job_id="a")

    user.permit()
    workerd.wait_event("consuming", queue="jobs")
    jobs += client.publish_jobs("jobs", ["b"])
    workerd.wait_event("done", job_id="b")
    oracle.check(jobs)
    # One for the declaration, one for the pause; many attempts.
    assert warnings(workerd) == ["declare failed", "queue paused"]


def test_a_queue_that_may_not_be_declared_but_is_there_is_used(
    broker: Broker, client: Client, daemon: StartDaemon, oracle: Oracle, user: User
) -> None:
    client.declare("jobs", x_queue_type="classic")
    user.permit(configure="^$")
    settings = {"password_file": str(user.password)}
    workerd = daemon(config(user.url, oracle.command(), broker=settings))
    workerd.wait_event("consuming")
    jobs = client.publish_jobs("jobs", ["a"])
    workerd.wait_event("done")
    oracle.check(jobs)
    assert "'jobs'" in workerd.events("declare failed", what="queue jobs")[0]["text"]


def test_a_virtual_host_that_is_deleted_and_made_again_is_worked_in_again(
    broker: Broker, client: Client, daemon: StartDaemon, oracle: Oracle
) -> None:
    workerd = daemon(config(broker.url, oracle.command(), broker={"reconnect_max": "800ms"}))
    workerd.wait_event("declared", what="delays")
    workerd.wait_ready()
    oracle.hold("a")
    jobs = client.publish_jobs("jobs", ["a"])
    workerd.wait_event("start", job_id="a")

    assert broker.recovers()
    broker.delete_vhost(broker.vhost)
    workerd.wait_event("disconnected")
    gone = workerd.wait_event("unreachable", count=2)
    assert f"vhost {broker.vhost} not found" in gone["text"]
    # Slowly, from the first attempt on.
    assert gone["retry_in"] == 0.8
    workerd.wait_notify(lambda text: text.endswith("not found; 1 running"))
    # The job had nothing to do with it, but its message is gone.
    oracle.release()
    workerd.wait_event("verdict kept", job_id="a")

    broker.add_vhost(broker.vhost)
    workerd.wait_event("consuming", count=2)
    with Client(broker.url) as later:
        jobs += later.publish_jobs("jobs", ["b"])
    workerd.wait_event("done", job_id="b")
    broker.await_depth("jobs")
    oracle.check(jobs)
    # RabbitMQ deletes the queues first.
    assert set(warnings(workerd)) <= {"consumer cancelled", "queue paused", "disconnected"}
    assert len(workerd.events("disconnected")) == 1
