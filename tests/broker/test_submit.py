"""`submit`, one job: what is sent, what is printed, and the exit status for everything else."""

from __future__ import annotations

import json
import os
import pty
import re
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.harness.amqp import Client
from tests.harness.broker import Broker
from tests.harness.network import Network
from tests.harness.programs import SUBMIT, WORKERD, Program, Result, run, unread
from tests.harness.tables import private
from tests.harness.waiting import SCALE, TIMEOUT, until

UUID7 = re.compile("[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}\n")

# What a start of Python and of its modules takes at most, on a busy machine.
START = TIMEOUT / 4

CONFIG = """
[broker]
urls = ["{url}"]

[queues.default]

[queues.images]

[handlers.sleep]
command = ["sleep", "{{body}}"]
max_body = "1KiB"

[handlers.resize]
command = ["true"]
queue = "images"
"""

Submit = Callable[..., Result]


def configure(folder: Path, url: str) -> Path:
    return private(folder, CONFIG.format(url=url))


@pytest.fixture
def config(broker: Broker, tmp_path: Path) -> Path:
    """A configuration for the broker, where the queue default exists."""
    with Client(broker.url) as client:
        client.declare("default")
    return configure(tmp_path, broker.url)


@pytest.fixture
def submit(config: Path) -> Submit:
    """Run `submit` with this configuration; it takes arguments, and what `run` takes."""

    def submit(*arguments: str, stdin: bytes = b"", **options: Any) -> Result:
        return run([*SUBMIT, "--config", config, *arguments], stdin, **options)

    return submit


@pytest.fixture
def nowhere(tmp_path: Path) -> Iterator[Path]:
    """A configuration for a broker that refuses connections."""
    with socket.socket() as taken:
        # Bound, so that nobody else gets it, but not listening.
        taken.bind(("127.0.0.1", 0))
        yield configure(tmp_path, f"amqp://guest@127.0.0.1:{taken.getsockname()[1]}")


# What is sent, and what is printed


def test_a_confirmed_job_is_in_its_queue_and_its_id_is_all_that_is_printed(
    submit: Submit, client: Client
) -> None:
    before = int(time.time())
    result = submit("sleep", "4")
    assert (result.status, result.stderr) == (0, "")
    assert UUID7.fullmatch(result.stdout)
    (message,) = client.take("default")
    assert (message.body, message.id) == (b"4", result.stdout.strip())
    assert message.properties.type == "sleep"
    assert message.properties.delivery_mode == 2
    assert before <= message.properties.timestamp <= time.time()
    assert set(message.headers) == {"x-workerd-copy"}


def test_workerd_submit_is_the_same(config: Path, client: Client) -> None:
    result = run([*WORKERD, "submit", "--config", config, "sleep", "4"])
    assert result.status == 0
    assert [message.id for message in client.take("default")] == [result.stdout.strip()]


def test_every_option_reaches_the_message(submit: Submit, client: Client) -> None:
    client.declare("images", x_max_priority=9)
    headers = ["--header", "traceparent=00-ab-cd-01", "--header", "note=a=b é"]
    result = submit("resize", "x", "--id", "mine", "--priority", "7", *headers, "--json")
    assert json.loads(result.stdout) == {"id": "mine", "queue": "images"}
    (message,) = client.take("images")
    assert (message.id, message.properties.priority) == ("mine", 7)
    assert message.headers.pop("x-workerd-copy")
    assert message.headers == {"traceparent": "00-ab-cd-01", "note": "a=b é"}


def test_a_queue_may_be_named_for_a_type_that_is_unknown_here(
    submit: Submit, client: Client
) -> None:
    client.declare("elsewhere")
    assert submit("unheard-of", "x", "--queue", "elsewhere").status == 0
    assert client.take("elsewhere")[0].properties.type == "unheard-of"


def test_a_dry_run_checks_everything_and_sends_nothing(nowhere: Path) -> None:
    dry = [*SUBMIT, "--config", str(nowhere), "--dry-run", "sleep"]
    assert UUID7.fullmatch(run([*dry, "4"]).stdout)
    assert run([*dry, "x" * 1025]).status == 65


# The body


@pytest.mark.parametrize(
    ("arguments", "stdin"),
    [
        (["hello"], b"ignored"),
        ([], b"hello"),
        (["-f", "-"], b"hello"),
        (["--file", "FILE"], b"ignored"),
    ],
)
def test_the_body_is_an_argument_or_a_file_or_standard_input(
    submit: Submit, client: Client, tmp_path: Path, arguments: list[str], stdin: bytes
) -> None:
    file = tmp_path / "body"
    file.write_bytes(b"hello")
    given = [str(file) if argument == "FILE" else argument for argument in arguments]
    assert submit("sleep", *given, stdin=stdin).status == 0
    assert client.take("default")[0].body == b"hello"


def test_a_body_is_any_bytes_even_in_an_argument(submit: Submit, client: Client) -> None:
    body = bytes(range(1, 256))
    assert submit("sleep", os.fsdecode(body)).status == 0
    assert submit("sleep", stdin=b"\0" + body).status == 0
    assert [message.body for message in client.take("default", 2)] == [body, b"\0" + body]


def test_on_a_terminal_there_is_no_body_to_wait_for(
    config: Path, client: Client, program: Callable[..., Program]
) -> None:
    ours, theirs = pty.openpty()
    with open(ours, "rb"), open(theirs, "rb") as terminal:
        job = program(*SUBMIT, "--config", config, "sleep", stdin=terminal)
        assert job.wait().status == 0
    assert client.take("default")[0].body == b""


def test_a_closed_standard_input_is_an_empty_body(config: Path, client: Client) -> None:
    shell = ["sh", "-c", 'exec "$@" <&-', "sh", *SUBMIT, "--config", str(config), "sleep"]
    assert run(shell).status == 0
    assert client.take("default")[0].body == b""


def test_a_pause_of_a_standard_input_that_does_not_block_is_not_its_end(
    config: Path, client: Client, program: Callable[..., Program]
) -> None:
    theirs, ours = os.pipe()
    os.set_blocking(theirs, False)
    with open(theirs, "rb") as source, open(ours, "wb", buffering=0) as sink:
        job = program(*SUBMIT, "--config", config, "sleep", stdin=source)
        sink.write(b"first, ")
        until(lambda: not unread(source), "the first part is read")
        sink.write(b"last")
    assert job.wait().status == 0
    assert client.take("default")[0].body == b"first, last"


def test_an_input_that_never_ends_is_waited_for_no_longer_than_timeout(
    nowhere: Path, tmp_path: Path, program: Callable[..., Program]
) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    command = [*SUBMIT, "--config", nowhere, "--timeout", "0.3s", "sleep"]
    for job in (program(*command), program(*command, "-f", fifo)):
        result = job.wait()
        assert (result.status, result.stdout) == (69, "")
        assert result.stderr == "submit: the input did not end within 0.3 s\n"


def test_an_input_without_end_is_refused_as_soon_as_it_is_too_large(nowhere: Path) -> None:
    shell = ["sh", "-c", 'yes | "$@"', "sh", *SUBMIT, "--config", str(nowhere), "sleep"]
    result = run(shell)
    assert result.status == 65
    assert result.stderr == "submit: the body is larger than 1024 bytes, the handler's max_body\n"


# Exit status 64 and 65: the command line and the job


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["slep", "4"], "no handler is named 'slep', did you mean \"sleep\"?"),
        (["sleep", "4", "--header", "X-Workerd-Attempt=1"], "only workerd or RabbitMQ may set"),
        (["sleep", "4", "--header", "x-death=1"], "only workerd or RabbitMQ may set"),
        (["sleep", "4", "--header", "nothing"], "expected NAME=VALUE"),
        (["sleep", "4", "--header", "=x"], "expected NAME=VALUE"),
        (["sleep", "4", "--header", "n" * 256 + "=x"], "expected NAME=VALUE"),
        (["sleep", "4", "--header", "\udcff=x"], "expected NAME=VALUE"),
        (["sleep", "4", "--priority", "256"], "--priority must be from 0 to 255"),
        (["sleep", "4", "--priority", "-1"], "--priority must be from 0 to 255"),
        (["sleep", "4", "--priority", "high"], "invalid int value"),
        (["sleep", "4", "--id", ""], "--id must be 1 to 255 bytes"),
        (["sleep", "4", "--id", "i" * 256], "--id must be 1 to 255 bytes"),
        (["sleep", "4", "--id", "two\nlines"], "--id must be 1 to 255 bytes of printable text"),
        (["sleep", "4", "--queue", ""], "--queue must be 1 to 255 bytes"),
        (["", "4", "--queue", "default"], "TYPE must be 1 to 255 bytes"),
        (["sleep", "4", "--timeout", "soon"], "--timeout"),
        (["sleep", "4", "--file", "x"], "BODY and --file exclude each other"),
        (["sleep", "4", "--lines"], "read a file or standard input, not an argument"),
        (["sleep", "--lines", "--jsonl"], "not allowed with argument"),
        (["sleep", "--lines", "--id", "x"], "--id names one job"),
        (["sleep", "4", "--bogus"], "unrecognized arguments: --bogus"),
        ([], "the following arguments are required: TYPE"),
        (["sleep", "4", "--url", "amqp://user:secret@localhost"], "a password shows in ps"),
        (["sleep", "4", "--url", "http://localhost"], "expected a URL that begins with"),
        (["sleep", "4", "--url", "@/no/such/file"], "No such file or directory"),
    ],
)
def test_a_wrong_command_line_is_64(nowhere: Path, arguments: list[str], text: str) -> None:
    result = run([*SUBMIT, "--config", nowhere, *arguments])
    assert (result.status, result.stdout) == (64, "")
    assert text in result.stderr
    assert "secret" not in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["sleep", "x" * 1025], "the body is larger than 1024 bytes, the handler's max_body"),
        (["sleep", "-f", "/no/such/file"], "/no/such/file: No such file or directory"),
        (["sleep", "-f", "/"], "Is a directory"),
        (["sleep", "--lines", "-f", "/no/such/file"], "/no/such/file: No such file or directory"),
        (["sleep", "4", "--header", "a=\udcff"], "the value is not UTF-8"),
        (
            ["sleep", "4", "--header", "a=" + "x" * 60_000, "--header", "b=" + "x" * 60_000],
            "all headers together are too large",
        ),
    ],
)
def test_a_job_that_cannot_be_sent_is_65(nowhere: Path, arguments: list[str], text: str) -> None:
    result = run([*SUBMIT, "--config", nowhere, *arguments])
    assert (result.status, result.stdout) == (65, "")
    assert text in result.stderr
    assert "Traceback" not in result.stderr


@pytest.fixture
def message_limit(broker: Broker) -> Iterator[int]:
    """The broker takes no message larger than this."""
    default = int(
        broker.eval(
            '{ok, Size} = application:get_env(rabbit, max_message_size), io:format("~w", [Size])'
        )
    )

    def set_limit(size: int) -> None:
        broker.eval(
            f"application:set_env(rabbit, max_message_size, {size}), "
            f"persistent_term:put(max_message_size, {size})"
        )

    set_limit(100_000)
    yield 100_000
    set_limit(default)


def test_a_body_too_large_for_the_broker_is_65_at_once(submit: Submit, message_limit: int) -> None:
    result = submit("any", "--queue", "default", stdin=bytes(message_limit + 1))
    assert (result.status, result.stdout) == (65, "")
    assert "larger than configured max size" in result.stderr
    assert submit("any", "--queue", "default", stdin=bytes(message_limit)).status == 0


# Exit status 69: the broker is away


def test_a_broker_that_is_down_is_tried_until_the_timeout(nowhere: Path) -> None:
    result = run([*SUBMIT, "--config", nowhere, "--timeout", f"{SCALE}s", "sleep", "4"])
    assert (result.status, result.stdout) == (69, "")
    assert result.stderr.endswith(": connection refused\n")
    assert SCALE / 2 < result.seconds < SCALE + START


def test_a_hung_broker_holds_nobody_beyond_the_timeout(broker: Broker, submit: Submit) -> None:
    broker.freeze()
    result = submit("sleep", "4", "--timeout", "0.5s")
    lines = submit("sleep", "--lines", "--timeout", "0.5s", stdin=b"1\n2\n")
    broker.thaw()
    for each in (result, lines):
        assert (each.status, each.stdout) == (69, "")
        assert ": no answer in time\n" in each.stderr
        assert each.seconds < 0.5 + START
    assert lines.stderr.endswith("submit: sed -n '1,$p'\n")
    assert "Traceback" not in lines.stderr


def test_a_resolver_that_never_answers_holds_nobody_beyond_the_timeout(
    network: Network, tmp_path: Path
) -> None:
    # What asks goes out; the answer that nobody is there does not come in.
    network.drop("to_daemon")
    resolver = tmp_path / "resolv.conf"
    resolver.write_text("nameserver 192.168.213.1\noptions timeout:30 attempts:5\n")
    config = configure(tmp_path, "amqp://guest@rabbit.example.org")
    bind = 'mount --bind "$1" /etc/resolv.conf && shift && exec "$@"'
    alone = ["unshare", "--mount", "sh", "-c", bind, "sh", str(resolver)]
    command = [*alone, *SUBMIT, "--config", str(config), "--timeout", "0.5s", "sleep", "4"]
    result = run(command, netns=network.daemon_ns)
    assert (result.status, result.stderr.endswith(": no answer in time\n")) == (69, True)
    assert result.seconds < 0.5 + START


# Exit status 73, 75, 77 and 78: the queue, its space, the rights, the configuration


def test_a_missing_queue_is_73(submit: Submit) -> None:
    result = submit("sleep", "4", "--queue", "nowhere")
    assert (result.status, result.stdout) == (73, "")
    assert result.stderr == "submit: no queue 'nowhere'\n"


def test_a_full_queue_is_75_and_nothing_is_dropped(submit: Submit, client: Client) -> None:
    client.declare("small", x_max_length=1, x_overflow="reject-publish")
    assert submit("sleep", "first", "--queue", "small").status == 0
    result = submit("sleep", "second", "--queue", "small")
    assert (result.status, result.stdout) == (75, "")
    assert result.stderr == "submit: the broker refused it: small is full\n"
    assert [message.body for message in client.drain("small")] == [b"first"]


def test_an_alarm_that_outlasts_the_timeout_is_75(broker: Broker, submit: Submit) -> None:
    broker.raise_memory_alarm()
    for arguments in (["4"], ["--lines"]):
        result = submit("sleep", *arguments, "--timeout", f"{SCALE:g}s", stdin=b"1\n")
        assert (result.status, result.stdout) == (75, "")
        assert "the broker takes nothing at present: low on memory" in result.stderr


def test_an_alarm_that_ends_in_time_is_waited_for(
    broker: Broker, config: Path, client: Client, program: Callable[..., Program]
) -> None:
    broker.raise_memory_alarm()
    job = program(*SUBMIT, "--config", config, "--timeout", f"{TIMEOUT:g}s", "sleep", "4")
    until(lambda: "blocked" in connection_states(broker), "it is blocked")
    broker.clear_memory_alarm()
    result = job.wait()
    assert [message.id for message in client.take("default")] == [result.stdout.strip()]


def connection_states(broker: Broker) -> list[str]:
    printed = broker.eval(
        'F = fun (P) -> [{state, S}] = rabbit_reader:info(P, [state]), io:format("~w~n", [S]) end, '
        "[catch F(P) || P <- rabbit_networking:local_connections()]"
    )
    return printed.split()


def test_a_refused_login_or_permission_is_77(
    broker: Broker, client: Client, tmp_path: Path
) -> None:
    client.declare("default")
    broker.add_user("reader", write="^$")
    broker.add_user("stranger", vhost=None)
    where = broker.url.partition("@")[2]
    for user, text in [
        ("guest:wrong", "ACCESS_REFUSED"),
        ("stranger:stranger", "NOT_ALLOWED - access to vhost"),
        ("reader:reader", "ACCESS_REFUSED - "),
    ]:
        config = configure(tmp_path, f"amqp://{user}@{where}")
        result = run([*SUBMIT, "--config", config, "sleep", "4"])
        assert (result.status, result.stdout) == (77, ""), result.stderr
        assert text in result.stderr
    assert client.ready("default") == 0


def test_a_bad_configuration_is_78(tmp_path: Path) -> None:
    config = tmp_path / "workerd.toml"
    config.write_text("[handlers.sleep]\ncomand = 1\n[broker]\nurls = 7\n")
    result = run([*SUBMIT, "--config", config, "sleep", "4"])
    assert (result.status, result.stdout) == (78, "")
    assert 'handlers.sleep.comand: unknown key, did you mean "command"?' in result.stderr
    assert "broker.urls: expected" in result.stderr
    assert run([*SUBMIT, "--config", tmp_path / "missing", "sleep", "4"]).status == 78


# The broker's address


def test_the_url_comes_from_the_option_then_the_variable_then_the_configuration(
    broker: Broker, client: Client, nowhere: Path, tmp_path: Path
) -> None:
    client.declare("default")
    secret = tmp_path / "url"
    secret.write_text(broker.url + "\n")
    secret.chmod(0o600)
    unreachable = "amqp://guest@127.0.0.1:1"
    plain = broker.url.replace("guest:guest@", "guest@")
    for arguments, variable in [
        (["--url", plain], unreachable),
        (["--url", f"@{secret}"], unreachable),
        ([], broker.url),
    ]:
        command = [*SUBMIT, "--config", str(nowhere), "sleep", "4", *arguments]
        assert run(command, env={"WORKERD_BROKER_URL": variable}).status == 0
    assert client.ready("default") == 3


def test_another_broker_is_tried_when_one_is_down(submit: Submit, broker: Broker) -> None:
    urls = f"amqp://guest@127.0.0.1:1, {broker.url}"
    results = [submit("sleep", "4", env={"WORKERD_BROKER_URL": urls}) for _ in range(3)]
    assert [result.status for result in results] == [0, 0, 0]


def test_a_bad_url_in_the_variable_is_78_and_is_not_shown(nowhere: Path) -> None:
    command = [*SUBMIT, "--config", str(nowhere), "sleep", "4"]
    result = run(command, env={"WORKERD_BROKER_URL": "amqp://user:secret@host:port"})
    assert result.status == 78
    assert "WORKERD_BROKER_URL: " in result.stderr
    assert "secret" not in result.stderr


# What a confirmed job survives


def test_a_job_is_there_when_the_broker_is_killed_right_after_its_confirm(
    broker: Broker, submit: Submit
) -> None:
    with Client(broker.url) as client:
        client.declare("quorum", x_queue_type="quorum")
    broker.settle()
    ids = [submit("sleep", "4", "--queue", queue).stdout.strip() for queue in ("default", "quorum")]
    broker.kill(settle=False)
    broker.start()
    with Client(broker.url) as client:
        assert [client.take(queue)[0].id for queue in ("default", "quorum")] == ids


def test_jobs_submitted_while_the_broker_restarts_arrive_once(
    broker: Broker, config: Path, program: Callable[..., Program]
) -> None:
    broker.stop()
    jobs = [program(*SUBMIT, "--config", config, "sleep", str(number)) for number in range(4)]
    broker.start()
    ids = [job.wait().stdout.strip() for job in jobs]
    assert all(UUID7.fullmatch(f"{job_id}\n") for job_id in ids)
    with Client(broker.url) as client:
        assert sorted(str(message.id) for message in client.take("default", 4)) == sorted(ids)
        assert client.ready("default") == 0


def test_a_submitter_says_goodbye_so_that_the_broker_logs_no_warning(
    broker: Broker, submit: Submit
) -> None:
    def farewells() -> list[str]:
        pattern = rf".*closing AMQP connection .* submit, vhost: '{broker.vhost}'.*"
        return re.findall(pattern, broker.logs)

    assert submit("sleep", "4").status == 0
    assert submit("sleep", "--lines", stdin=b"1\n2\n").status == 0
    until(lambda: len(farewells()) == 2, "both are gone")
    assert all("[info]" in line for line in farewells())


def test_an_output_that_cannot_be_written_is_an_error(config: Path) -> None:
    for arguments in ("4", "--lines"):
        shell = ["sh", "-c", 'exec "$@" >/dev/full', "sh", *SUBMIT, "--config", str(config)]
        result = run([*shell, "sleep", arguments], b"1\n")
        assert result.status == 74
        assert "standard output: No space left on device" in result.stderr
        assert "Traceback" not in result.stderr
