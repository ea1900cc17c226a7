"""Login, permissions and virtual hosts: what only an administrator can mend."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.harness.amqp import Client
from tests.harness.broker import Broker
from tests.harness.daemon import Daemon
from tests.harness.oracle import Oracle
from tests.harness.tables import config

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
        self.create("right")
        self.write("right")

    def create(self, password: str) -> None:
        self._call("add_user", password)

    def delete(self) -> None:
        self._call("delete_user")

    def change_password(self, password: str) -> None:
        self._call("change_password", password)

    def write(self, password: str) -> None:
        """Write the password file of the daemon."""
        self.password.write_text(f"{password}\n")
        self.password.chmod(0o600)

    def permit(self, configure: str = ".*", write: str = ".*", read: str = ".*") -> None:
        self._call("set_permissions", self._broker.vhost, configure, write, read)

    def forbid(self) -> None:
        """Take away every right in the virtual host, the one to enter it as well."""
        self._call("clear_permissions", self._broker.vhost)

    def _call(self, function: str, *arguments: str) -> None:
        terms = ", ".join(f'<<"{each}">>' for each in (self.name, *arguments, "tests"))
        self._broker.eval(f"rabbit_auth_backend_internal:{function}({terms})")


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
    workerd.wait_event("publisher disconnected", level="warning")
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
    workerd.wait_event("consuming", queue="jobs.due")
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
    workerd.wait_event("consuming", queue="jobs", count=2)
    with Client(broker.url) as later:
        jobs += later.publish_jobs("jobs", ["b"])
    workerd.wait_event("done", job_id="b")
    broker.await_depth("jobs")
    oracle.check(jobs)
    # RabbitMQ deletes the queues first.
    assert set(warnings(workerd)) <= {"consumer cancelled", "queue paused", "disconnected"}
    assert len(workerd.events("disconnected")) == 1


def test_permissions_that_are_revoked_while_consuming_are_waited_for(
    broker: Broker, client: Client, daemon: StartDaemon, oracle: Oracle, user: User
) -> None:
    user.permit()
    settings = {"password_file": str(user.password), "reconnect_max": "400ms"}
    workerd = daemon(config(user.url, oracle.command(), broker=settings))
    workerd.wait_event("consuming", queue="jobs.due")
    workerd.wait_ready()
    oracle.hold("a")
    jobs = client.publish_jobs("jobs", ["a"])
    workerd.wait_event("start")

    user.forbid()
    broker.close_all_connections()
    refused = workerd.wait_event("unreachable", count=3)
    assert f"access to vhost '{broker.vhost}' refused" in refused["text"]
    # Slowly, from the first attempt on, and told once.
    assert {entry["retry_in"] for entry in workerd.events("unreachable")} == {0.4}
    assert set(warnings(workerd)) <= {"disconnected", "publisher disconnected"}
    assert len(workerd.events("disconnected")) == 1

    user.permit()
    workerd.wait_event("rejoined")
    oracle.release()
    workerd.wait_event("done")
    broker.await_depth("jobs")
    oracle.check(jobs)


def test_a_queue_that_is_forbidden_while_it_is_consumed_is_waited_for_and_the_other_goes_on(
    broker: Broker, client: Client, daemon: StartDaemon, oracle: Oracle, user: User
) -> None:
    user.permit()
    settings = {"password_file": str(user.password)}
    workerd = daemon(config(user.url, oracle.command(), queues=TWO_QUEUES, broker=settings))
    workerd.wait_event("consuming", queue="jobs.due")
    for queue in TWO_QUEUES:
        workerd.wait_event("consuming", queue=queue)
    oracle.hold("a")
    jobs = client.publish_jobs("jobs", ["a"])
    workerd.wait_event("start", job_id="a")

    user.permit(read="^(?!jobs$)")
    broker.close_all_connections()
    paused = workerd.wait_event("queue paused", queue="jobs")
    assert "ACCESS_REFUSED" in paused["text"]
    with Client(broker.url) as later:
        jobs += later.publish_jobs("others", ["b"])
    workerd.wait_event("done", job_id="b")

    user.permit()
    workerd.wait_event("rejoined", job_id="a")
    oracle.release()
    workerd.wait_event("done", job_id="a")
    broker.await_depth("jobs")
    oracle.check(jobs)
    assert len(workerd.events("queue paused")) == 1


def test_a_dead_letter_that_may_not_be_written_keeps_its_job_until_it_may(
    broker: Broker, client: Client, daemon: StartDaemon, oracle: Oracle, user: User
) -> None:
    user.permit()
    settings = {"password_file": str(user.password)}
    workerd = daemon(config(user.url, oracle.command(status=1), broker=settings))
    workerd.wait_event("consuming", queue="jobs.due")
    workerd.wait_ready()
    # The default exchange has this name where rights are concerned.
    user.permit(write="^(?!amq[.]default$)")
    jobs = client.publish_jobs("jobs", ["a"])
    refused = workerd.wait_event("dead letter refused")
    assert "ACCESS_REFUSED" in refused["text"]
    broker.await_depth("jobs", unacked=1)

    user.permit()
    workerd.wait_event("dead letter")
    broker.await_depth("jobs")
    assert [letter.id for letter in client.look("jobs.dead")] == jobs
    oracle.check(jobs, dead=jobs)
    assert warnings(workerd).count("dead letter refused") == 1


def test_a_rotated_password_is_used_at_the_next_attempt(
    broker: Broker, client: Client, daemon: StartDaemon, oracle: Oracle, user: User
) -> None:
    user.permit()
    settings = {"password_file": str(user.password), "reconnect_max": "400ms"}
    workerd = daemon(config(user.url, oracle.command(), broker=settings))
    workerd.wait_ready()
    oracle.hold("a")
    jobs = client.publish_jobs("jobs", ["a"])
    workerd.wait_event("start")

    user.change_password("new")
    broker.close_all_connections()
    refused = workerd.wait_event("unreachable", count=2)
    assert refused["text"].startswith("ACCESS_REFUSED - ")
    assert refused["retry_in"] == 0.4
    user.write("new")
    workerd.wait_event("rejoined")
    oracle.release()
    workerd.wait_event("done")
    broker.await_depth("jobs")
    oracle.check(jobs)


def test_a_user_that_is_deleted_and_made_again_is_let_in_again(
    broker: Broker, client: Client, daemon: StartDaemon, oracle: Oracle, user: User
) -> None:
    user.permit()
    settings = {"password_file": str(user.password), "reconnect_max": "400ms"}
    workerd = daemon(config(user.url, oracle.command(), broker=settings))
    workerd.wait_ready()
    oracle.hold("a")
    jobs = client.publish_jobs("jobs", ["a"])
    workerd.wait_event("start")

    # RabbitMQ ends the connections of a deleted user by itself.
    user.delete()
    workerd.wait_event("disconnected")
    assert workerd.wait_event("unreachable")["text"].startswith("ACCESS_REFUSED - ")
    user.create("another")
    user.permit()
    user.write("another")
    workerd.wait_event("rejoined")
    oracle.release()
    workerd.wait_event("done")
    broker.await_depth("jobs")
    oracle.check(jobs)


def test_a_worker_needs_no_more_rights_than_are_documented(
    broker: Broker, client: Client, daemon: StartDaemon, oracle: Oracle, user: User
) -> None:
    text = config(broker.url, oracle.command(status=1))
    administrators = daemon(text)
    administrators.wait_event("consuming", queue="jobs.due")
    assert administrators.stop() == 0
    user.permit("^$", r"^(amq\.default|workerd\.delay\..*)$", r"^jobs(\.due)?$")
    workerd = daemon(
        config(
            user.url,
            oracle.command(status=1),
            broker={"password_file": str(user.password)},
            handler={"retry": {"attempts": 2, "delay": "1s"}},
        )
    )
    workerd.wait_event("consuming", queue="jobs.due")
    client.publish("jobs", message_id="a")
    assert workerd.wait_event("dead letter", job_id="a")["attempt"] == 2
    assert set(warnings(workerd)) == {"declare failed", "failed", "dead letter"}
