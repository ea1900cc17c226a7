"""`submit --in`, `--at`, `--ttl`, `--attempts`: what is sent, where it waits, when it comes."""

from __future__ import annotations

import datetime
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.harness.amqp import Client
from tests.harness.amqp import Message as Taken
from tests.harness.broker import Broker
from tests.harness.peer import Peer
from tests.harness.programs import SUBMIT, WORKERD, Program, Result, run
from tests.harness.tables import private
from tests.harness.waiting import SCALE, TIMEOUT, until
from workerd.core.job import COPY
from workerd.core.topology import MAX_DELAY, level_name

# What a start of Python and of its modules takes at most, on a busy machine.
START = TIMEOUT / 4
HOUR = 3600

CONFIG = """
[broker]
urls = ["{url}"]

[queues.default]
type = "classic"
max_priority = 9

[handlers.sleep]
command = ["sleep", "{{body}}"]
max_body = "1KiB"
retry = {{ max_attempts = 7 }}
"""

# docs/topology.md
SUBMITTER = r"^(amq\.default|default\.due|workerd\.delay\..*)$"

Submit = Callable[..., Result]


def configure(folder: Path, url: str) -> Path:
    return private(folder, CONFIG.format(url=url))


@pytest.fixture
def config(broker: Broker, tmp_path: Path) -> Path:
    """A configuration for a broker where nothing is declared yet."""
    return configure(tmp_path, broker.url)


@pytest.fixture
def submit(config: Path) -> Submit:
    """Run `submit sleep` with this configuration; it takes arguments, and what `run` takes."""

    def submit(*arguments: str, stdin: bytes = b"", **options: Any) -> Result:
        return run([*SUBMIT, "--config", config, "sleep", *arguments], stdin, **options)

    return submit


@pytest.fixture
def topology(config: Path) -> None:
    """Everything is declared, as an administrator would do it."""
    assert run([*WORKERD, "setup", "--config", config]).status == 0


@pytest.fixture
def nowhere(tmp_path: Path) -> list[str]:
    """The beginning of a command line, for a broker that does not exist."""
    return [*SUBMIT, "--config", str(configure(tmp_path, "amqp://guest@127.0.0.1:1")), "sleep"]


def iso(when: float) -> str:
    return datetime.datetime.fromtimestamp(when, datetime.UTC).isoformat()


def stamp(text: str) -> float:
    """The instant of a "due" that was printed."""
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", text)
    return datetime.datetime.fromisoformat(text).timestamp()


def delay_of(message: Taken) -> int:
    """The seconds of its delay, from the bits of its routing key."""
    *bits, queue = message.routing_key.split(".", 25)
    assert (len(bits), queue) == (25, "default")
    return int("".join(bits), 2)


def waiting(client: Client, near: int, count: int = 1) -> list[Taken]:
    """Take the messages that wait in the level which a delay of about this length enters first."""
    return client.take(level_name(near.bit_length() - 1), count)


# Into the delay levels


def test_a_delayed_job_comes_due_in_time_and_with_all_that_was_asked_for(
    submit: Submit, topology: None, client: Client
) -> None:
    before = time.time()
    wishes = ["--ttl", "1h", "--attempts", "3", "--priority", "7", "--header", "note=é"]
    result = submit("4", "--in", "2.5s", "--id", "mine", *wishes, "--json")
    sent = time.time()
    assert (result.status, result.stderr) == (0, "")
    printed = json.loads(result.stdout)
    due = stamp(printed.pop("due"))
    assert printed == {"id": "mine", "queue": "default"}
    assert before + 2.499 <= due <= sent + 2.5

    (message,) = client.take("default.due")
    came = time.time()
    assert due <= came <= sent + 3 + START
    assert client.ready("default") == 0
    assert (message.id, message.body, message.properties.type) == ("mine", b"4", "sleep")
    assert (message.properties.priority, message.properties.delivery_mode) == (7, 2)
    assert message.properties.expiration is None
    headers = {
        name: value
        for name, value in message.headers.items()
        if "death" not in name and name != "x-delivery-count"
    }
    expires = headers.pop("x-workerd-expires")
    assert headers.pop("x-workerd-copy")
    assert headers == {"note": "é", "x-workerd-max-attempts": 3}
    # An hour from the moment it came, which is in the second that follows `due`.
    assert due + HOUR - 0.01 <= expires / 1000 <= came + HOUR + 0.01


def test_the_delay_is_what_is_left_when_it_is_published(
    submit: Submit, topology: None, client: Client
) -> None:
    assert submit("4", "--in", "1h").status == 0
    (message,) = waiting(client, HOUR)
    # Whole seconds, rounded up: a start of less than one costs nothing.
    assert HOUR - START <= delay_of(message) <= HOUR


@pytest.mark.parametrize(
    ("zone", "offset"), [("CET-1CEST,M3.5.0,M10.5.0/3", None), ("IST-5:30", 5.5)]
)
def test_a_time_without_an_offset_is_of_the_submitters_zone(
    nowhere: list[str], zone: str, offset: float | None
) -> None:
    wanted = datetime.datetime.now() + datetime.timedelta(days=30)
    text = wanted.strftime("%Y-%m-%d %H:%M:%S")
    command = [*nowhere, "4", "--dry-run", "--json", "--at", text]
    due = stamp(json.loads(run(command, env={"TZ": zone}).stdout)["due"])
    as_if_utc = datetime.datetime.fromisoformat(f"{text}+00:00").timestamp()
    hours = (as_if_utc - due) / 3600
    assert hours == offset if offset else hours in (1, 2)


def test_a_job_for_a_time_waits_for_it(submit: Submit, topology: None, client: Client) -> None:
    due = int(time.time()) + 2 * HOUR
    result = submit("4", "--at", iso(due), "--json")
    assert stamp(json.loads(result.stdout)["due"]) == due
    (message,) = waiting(client, 2 * HOUR)
    assert 2 * HOUR - START - 1 <= delay_of(message) <= 2 * HOUR


def test_the_longest_delay_can_be_had(submit: Submit, topology: None, client: Client) -> None:
    assert submit("4", "--in", str(MAX_DELAY)).status == 0
    (message,) = client.take("workerd.delay.24")
    assert MAX_DELAY - START <= delay_of(message) <= MAX_DELAY


@pytest.mark.parametrize(
    "when", [["--in", "0"], ["--at", "2020-02-29 12:00"], ["--at", "1969-12-31T23:59:59Z"]]
)
def test_a_job_that_is_due_already_goes_to_its_queue_at_once(
    submit: Submit, client: Client, when: list[str]
) -> None:
    # Nothing that delays is there.
    client.declare("default")
    result = submit("4", *when, "--json", "--ttl", "1h")
    assert (result.status, result.stderr) == (0, "")
    assert list(json.loads(result.stdout)) == ["id", "queue"]
    (message,) = client.take("default")
    assert message.id == json.loads(result.stdout)["id"]
    # What is past counts as now for its time to live as well.
    assert message.headers["x-workerd-expires"] / 1000 >= time.time() + HOUR - START


def test_a_job_that_comes_due_while_its_body_is_awaited_is_sent_at_once(
    config: Path, topology: None, client: Client, program: Callable[..., Program]
) -> None:
    due = time.time() + 0.5
    job = program(*SUBMIT, "--config", config, "sleep", "--at", iso(due))
    until(lambda: time.time() > due, "it is due")
    job.write(b"4")
    job.close_input()
    assert job.wait().status == 0
    assert client.take("default")[0].body == b"4"


@pytest.mark.parametrize("options", [["--direct"], ["--in", "1h"], ["--url"], []], ids=" ".join)
def test_a_job_whose_confirm_was_lost_is_published_again_as_the_same_copy(
    options: list[str], peer: Callable[..., Peer], tmp_path: Path
) -> None:
    """So that a host runs it once: on every way to the broker, not on that of an instance alone."""
    broker = peer(lost_confirms=2)
    config = configure(tmp_path, broker.url)
    options = [*options, broker.url] if options == ["--url"] else options
    result = run([*SUBMIT, "--config", config, "sleep", "4", *options])
    assert result.status == 0, result.stderr
    copies = [(each.message_id, each.headers[COPY], each.timestamp) for each in broker.published]
    assert len(copies) == 3
    assert len(set(copies)) == 1
    assert copies[0][0] == result.stdout.strip()


def test_without_a_delay_nothing_more_is_asked_of_the_broker(
    peer: Callable[..., Peer], tmp_path: Path
) -> None:
    def asked(*options: str) -> list[str]:
        broker = peer()
        config = configure(tmp_path, broker.url)
        result = run([*SUBMIT, "--config", config, "sleep", "4", *options])
        assert result.status == 0, result.stderr
        names = [each.NAME for each in broker.asked]
        return names[names.index("Channel.Open") : names.index("Connection.Close")]

    # Publishing is no question.
    plain = ["Channel.Open", "Confirm.Select", "Channel.Close"]
    assert asked() == plain
    assert asked("--ttl", "1h", "--attempts", "3") == plain
    assert asked("--in", "1h") == [plain[0], "Queue.Declare", *plain[1:]]


def test_a_dry_run_tells_when_the_job_would_come_due(nowhere: list[str]) -> None:
    before = time.time()
    result = run([*nowhere, "4", "--in", "10m", "--json", "--dry-run", "--ttl", "1m"])
    assert result.status == 0
    assert before + 599 <= stamp(json.loads(result.stdout)["due"]) <= time.time() + 600
    assert run([*nowhere, "4", "--in", "10m", "--dry-run", "--id", "one"]).stdout == "one\n"


# What can be asked for


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--in", "10m", "--at", "18:30"], "not allowed with argument"),
        (["--in", "soon"], "argument --in: expected a duration"),
        (["--in", "-5s"], "argument --in: expected"),
        (["--in", str(MAX_DELAY + 1)], "a job can be delayed by 388 days at most"),
        (["--in", "9" * 400 + "d"], "a job can be delayed by 388 days at most"),
        (["--at", "2199-01-01 00:00"], "a job can be delayed by 388 days at most"),
        (["--at", "noon"], "--at 'noon': expected a time such as \"18:30\""),
        (["--at", "2026-02-30 10:00"], "--at '2026-02-30 10:00': no such time: day"),
        (["--at", ""], "--at '': expected a time such as"),
        (["--in", "10m", "--queue", "q" * 206], "a queue whose name has at most 205 bytes"),
        (["--ttl", "0"], "--ttl must be more than nothing"),
        (["--ttl", "36501d"], "at most a hundred years"),
        (["--ttl", "9" * 400 + "d"], "at most a hundred years"),
        (["--ttl", "never"], "argument --ttl: expected a duration"),
        (["--attempts", "0"], "--attempts must be from 1 to 1000"),
        (["--attempts", "-1"], "--attempts must be from 1 to 1000"),
        (["--attempts", "1001", "--queue", "default"], "--attempts must be from 1 to 1000"),
        (["--attempts", "many"], "invalid int value"),
        (["--attempts", "8"], "--attempts must be at most 7, the retry.max_attempts of 'sleep'"),
    ],
)
def test_a_wish_that_cannot_be_granted_is_64(
    nowhere: list[str], arguments: list[str], text: str
) -> None:
    result = run([*nowhere, "4", *arguments, "--dry-run"])
    assert (result.status, result.stdout) == (64, "")
    assert text in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("name", ["sleep", "unheard-of"])
def test_the_limit_of_attempts_is_the_handlers_where_it_is_configured(
    broker: Broker, config: Path, client: Client, name: str
) -> None:
    client.declare("default")
    most = "7" if name == "sleep" else "1000"
    command = [*SUBMIT, "--config", str(config), name, "4", "--queue", "default"]
    assert run([*command, "--attempts", most]).status == 0
    (message,) = client.take("default")
    assert message.headers["x-workerd-max-attempts"] == int(most)


@pytest.mark.parametrize("body", [["4"], ["--lines"]])
def test_a_time_to_live_counts_from_the_submission(
    submit: Submit, client: Client, body: list[str]
) -> None:
    client.declare("default")
    before = time.time()
    assert submit(*body, "--ttl", "1.5h", stdin=b"4\n").status == 0
    (message,) = client.take("default")
    assert message.properties.expiration is None
    expires = message.headers["x-workerd-expires"] / 1000
    assert before + 1.5 * HOUR - 0.001 <= expires <= time.time() + 1.5 * HOUR


# Nothing there that delays


@pytest.fixture(params=[["4"], ["--lines"]], ids=["one", "lines"])
def submit_delayed(request: pytest.FixtureRequest, submit: Submit) -> Callable[[], Result]:
    """A function that submits a job, or a line, to be delayed by an hour."""
    return lambda: submit(*request.param, "--in", "1h", stdin=b"4\n5\n")


REMEDY = (
    "; a delay needs it: start a worker of 'default' once, or have 'workerd setup' declare it\n"
)


def test_a_missing_queue_for_due_jobs_is_73_before_anything_is_sent(
    topology: None, client: Client, submit_delayed: Callable[[], Result]
) -> None:
    client.channel.queue_delete("default.due")
    result = submit_delayed()
    assert (result.status, result.stdout) == (73, "")
    assert result.stderr.startswith("submit: NOT_FOUND - no queue 'default.due' in vhost")
    assert REMEDY in result.stderr
    assert client.ready(level_name(11)) == 0


def test_missing_delay_levels_are_73(client: Client, submit_delayed: Callable[[], Result]) -> None:
    client.declare("default.due")
    result = submit_delayed()
    assert (result.status, result.stdout) == (73, "")
    assert result.stderr.startswith("submit: NOT_FOUND - no exchange 'workerd.delay.11' in vhost")
    assert REMEDY in result.stderr


def test_a_delay_level_without_its_queue_is_73(
    client: Client, submit_delayed: Callable[[], Result]
) -> None:
    client.declare("default.due")
    client.channel.exchange_declare("workerd.delay.11", "topic", durable=True)
    result = submit_delayed()
    assert (result.status, result.stdout) == (73, "")
    assert result.stderr.startswith("submit: no queue 'workerd.delay.11'; a delay needs it")
    assert REMEDY in result.stderr


def test_a_delay_level_that_takes_nothing_is_75(
    client: Client, submit_delayed: Callable[[], Result]
) -> None:
    client.declare("default.due")
    level = client.declare("workerd.delay.11", x_max_length=0, x_overflow="reject-publish")
    client.channel.exchange_declare(level, "topic", durable=True)
    client.channel.queue_bind(level, level, "#")
    result = submit_delayed()
    assert (result.status, result.stdout) == (75, "")
    assert result.stderr.startswith("submit: the broker refused it: workerd.delay.11 is full\n")


def test_a_missing_work_queue_is_told_as_ever(submit: Submit) -> None:
    assert submit("4", "--in", "0").stderr == "submit: no queue 'default'\n"


def test_who_may_write_to_the_delay_levels_may_delay(
    broker: Broker, topology: None, client: Client, tmp_path: Path
) -> None:
    broker.add_user("later", configure="^$", write=SUBMITTER, read="^$")
    broker.add_user("now", configure="^$", write=r"^amq\.default$", read="^$")

    def submit(user: str, *arguments: str) -> Result:
        config = configure(tmp_path, broker.url.replace("guest:guest", f"{user}:{user}"))
        return run([*SUBMIT, "--config", config, "sleep", *arguments], b"4\n")

    for body in ("4", "--lines"):
        result = submit("now", body, "--in", "1h")
        assert (result.status, result.stdout) == (77, "")
        assert "access to exchange 'workerd.delay.11' in vhost" in result.stderr
        assert submit("now", body).status == 0
        assert submit("later", body, "--in", "1h").status == 0
        assert submit("later", body).status == 0
    waiting(client, HOUR, 2)
    client.take("default", 4)


# Many lines


def test_all_lines_come_due_at_one_time(submit: Submit, topology: None, client: Client) -> None:
    lines = [f"job {number}" for number in range(300)]
    result = submit("--lines", "--in", "3s", "--json", stdin="\n".join(lines).encode())
    assert (result.status, result.stderr) == (0, "")
    printed = [json.loads(line) for line in result.stdout.splitlines()]
    assert len({each["due"] for each in printed}) == 1
    # On a slow day the last of them are sent when it is time already.
    late = client.drain("default")
    messages = [*client.take("default.due", 300 - len(late)), *late]
    bodies = {message.id: message.body.decode() for message in messages}
    assert [bodies[each["id"]] for each in printed] == lines


def test_a_slow_producers_lines_are_not_delayed_by_its_slowness(
    config: Path, topology: None, client: Client, program: Callable[..., Program]
) -> None:
    job = program(*SUBMIT, "--config", config, "sleep", "--lines", "--json", "--in", "1h")
    job.write(b"4\n")
    due = stamp(json.loads(*job.wait_lines(1))["due"])
    until(lambda: due - time.time() < HOUR - 1.5, "so much is left")
    job.write(b"4\n")
    lines = job.wait_lines(2)
    job.close_input()
    assert job.wait().status == 0
    assert {stamp(json.loads(line)["due"]) for line in lines} == {due}
    first, second = map(delay_of, waiting(client, HOUR, 2))
    assert second <= HOUR - 1 <= first + START


def test_lines_that_come_after_the_time_go_to_the_queue_at_once(
    config: Path, topology: None, client: Client, program: Callable[..., Program]
) -> None:
    job = program(*SUBMIT, "--config", config, "sleep", "--lines", "--json", "--in", f"{SCALE:g}s")
    job.write(b"1\n")
    due = stamp(json.loads(*job.wait_lines(1))["due"])
    until(lambda: time.time() > due, "it is due")
    job.write(b"2\n")
    job.wait_lines(2)
    [message] = client.take("default")
    assert message.body == b"2"
    job.close_input()
    assert job.wait().status == 0
