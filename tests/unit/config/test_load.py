"""From configuration files to `Settings`, and everything that can be wrong on the way."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.harness.trixie import CHECKOUT
from workerd.config.load import load
from workerd.config.model import Broker, Handler, Queue, Retry, Settings
from workerd.config.url import BrokerURL
from workerd.errors import SettingsError

Write = Callable[..., Path]

SHIPPED = CHECKOUT / "etc" / "workerd.toml"
SLEEP = '[handlers.sleep]\ncommand = ["sleep", "{body}"]\n'


def problems(etc: Path, **options: Any) -> list[str]:
    """What `load` finds, without the folder of the files."""
    with pytest.raises(SettingsError) as caught:
        load(etc=etc, environ=options.pop("environ", {}), **options)
    assert str(caught.value) == "\n".join(caught.value.problems)
    return [problem.replace(f"{etc}/", "") for problem in caught.value.problems]


# Files and how they are laid over each other.


def test_without_any_file_there_are_defaults(tmp_path: Path) -> None:
    settings = load(etc=tmp_path / "nowhere", environ={})
    assert settings.broker.urls == (BrokerURL.parse("amqp://guest@localhost"),)
    assert settings.queues == {"default": Queue("default")}
    assert settings.worker.queues == ("default",)
    assert settings.handlers == {}
    assert settings.files == ()
    assert settings.origins == {}


def test_the_shipped_file_says_what_the_defaults_are(write: Write) -> None:
    settings = load(write(SHIPPED.read_text(), mode=0o644), environ={})
    assert settings.broker == Broker()
    assert settings.queues == {"default": Queue("default", default_handler="sleep")}
    assert settings.handlers == {"sleep": Handler("sleep", command=("sleep", "{body}"))}


def test_the_examples_in_the_shipped_file_are_valid(write: Write) -> None:
    commented_out = r"# (\[[a-z_.]+\]|[a-z_]+ = .*)$"
    lines = [re.sub(commented_out, r"\1", line) for line in SHIPPED.read_text().splitlines()]
    lines.remove('urls = ["amqp://guest@localhost"]')
    settings = load(write("\n".join(lines)), environ={})
    assert set(settings.handlers) == {"sleep", "resize", "render"}
    assert settings.queues["task_queue"].declare == "plain"
    assert settings.broker.urls[1].host == "rabbit2"


def test_later_files_override_key_by_key(write: Write, etc: Path) -> None:
    main = write(SLEEP + 'timeout = "1m"\nretry = { attempts = 2, delay = "1s" }\n')
    app = write('[handlers.sleep]\nretry.attempts = 3\ntimeout = "2m"\n', "conf.d/20-app.toml")
    write('[handlers.sleep]\ntimeout = "3m"\n', "instances/2.toml")
    settings = load(etc=etc, environ={})
    assert settings.handlers["sleep"].timeout == 120
    assert settings.handlers["sleep"].retry == Retry(attempts=3, delay=1)
    assert settings.files == (main, app)
    assert settings.origins["handlers.sleep.retry.attempts"] == app
    assert settings.origins["handlers.sleep.retry.delay"] == main
    assert "handlers.sleep.retry.jitter" not in settings.origins
    assert load(etc=etc, instance="2", environ={}).handlers["sleep"].timeout == 180


def test_arrays_are_replaced_and_exit_codes_are_not(write: Write, etc: Path) -> None:
    write(SLEEP + 'exit_codes = { 3 = "done", 65 = "retry" }\n')
    write('[handlers.sleep]\ncommand = ["true"]\nexit_codes.4 = "dead"\n', "conf.d/app.toml")
    handler = load(etc=etc, environ={}).handlers["sleep"]
    assert handler.command == ("true",)
    assert handler.exit_codes == {75: "retry", 65: "retry", 3: "done", 4: "dead"}


def test_conf_d_is_read_in_order_without_hidden_and_foreign_files(write: Write, etc: Path) -> None:
    write('[log]\nlevel = "debug"\n', "conf.d/10.toml")
    write('[log]\nlevel = "error"\n', "conf.d/9.toml")
    write("broken", "conf.d/.99.toml")
    write("broken", "conf.d/99.toml.dpkg-new")
    assert load(etc=etc, environ={}).log.level == "error"


def test_one_file_can_stand_for_all(write: Write, etc: Path) -> None:
    write("broken")
    only = write('[log]\nlevel = "debug"\n', "only.toml")
    settings = load(only, etc=etc, environ={})
    assert settings.log.level == "debug"
    assert settings.files == (only,)


def test_the_environment_overrides_the_broker(write: Write, etc: Path) -> None:
    write('[broker]\nurls = ["amqp://a"]\nheartbeat = 5\n')
    environ = {"WORKERD_BROKER_URL": "amqp://b, amqps://c"}
    broker = load(etc=etc, environ=environ).broker
    assert [url.host for url in broker.urls] == ["b", "c"]
    assert broker.heartbeat == 5
    assert load(etc=etc, environ={"WORKERD_BROKER_URL": ""}).broker.urls[0].host == "a"


def test_a_bad_broker_in_the_environment_is_named_by_the_variable(etc: Path) -> None:
    (problem,) = problems(etc, environ={"WORKERD_BROKER_URL": "amqp://u:s3cret@h:x"})
    assert problem.startswith("WORKERD_BROKER_URL: item 1: the port")
    assert "s3cret" not in problem


def test_the_queue_default_is_there_when_a_handler_needs_it(write: Write, etc: Path) -> None:
    write("[queues.mail]\n" + SLEEP)
    assert set(load(etc=etc, environ={}).queues) == {"mail", "default"}
    write("[queues.mail]\n" + SLEEP + 'queue = "mail"\n')
    assert set(load(etc=etc, environ={}).queues) == {"mail"}


def test_prefetch_follows_concurrency_unless_it_is_set(write: Write, etc: Path) -> None:
    write("[queues.a]\nconcurrency = 7\n[queues.b]\nconcurrency = 7\nprefetch = 1\n")
    queues = load(etc=etc, environ={}).queues
    assert (queues["a"].prefetch, queues["b"].prefetch) == (7, 1)


def test_every_key_of_a_handler_arrives(write: Write, etc: Path) -> None:
    write("""
        [handlers."image.resize"]
        python = "myapp.jobs:resize"
        interpreter = "/srv/app/venv/bin/python"
        timeout = 90.5
        kill_grace = "250ms"
        working_directory = "/srv/app"
        environment = { LANG = "C.UTF-8", EMPTY = "" }
        max_body = "2MiB"
        output_limit = 100
        processes = 3
        recycle_after = 0
        memory_limit = "1GiB"
        start_timeout = "1m"
        [handlers."image.resize".retry]
        attempts = 1
        delay = "2d"
        multiplier = 1
        max_delay = "365d"
        jitter = false
        max_attempts = 1
    """)
    settings = load(etc=etc, environ={})
    handler = settings.handlers["image.resize"]
    assert handler == Handler(
        "image.resize",
        python="myapp.jobs:resize",
        interpreter=Path("/srv/app/venv/bin/python"),
        timeout=90.5,
        kill_grace=0.25,
        working_directory=Path("/srv/app"),
        environment={"LANG": "C.UTF-8", "EMPTY": ""},
        max_body=2 << 20,
        output_limit=100,
        processes=3,
        recycle_after=None,
        memory_limit=1 << 30,
        start_timeout=60,
        retry=Retry(1, 172_800, 1.0, 31_536_000, False, 1),
    )
    assert handler.kind == "python"
    assert 'handlers."image.resize".retry.delay' in settings.origins
    assert "C.UTF-8" not in repr(handler)


# What is refused.


def test_every_problem_of_every_file_is_reported_at_once(write: Write, etc: Path) -> None:
    write(SLEEP + 'timeout = "soon"\n[queues.default]\nconcurency = 4\n')
    write('[handlers.sleep]\ntimeout = "1m"\n[log]\nlevel = "loud"\n', "conf.d/a.toml")
    write("[broker\n", "conf.d/b.toml")
    write("[worker]\nqueues = ['defualt']", "instances/1.toml")
    assert problems(etc) == [
        "workerd.toml: handlers.sleep.timeout: "
        'expected a duration such as "30s" or a number of seconds, found "soon"',
        'workerd.toml: queues.default.concurency: unknown key, did you mean "concurrency"?',
        "conf.d/a.toml: log.level: "
        'expected one of "debug", "info", "warning", "error", found "loud"',
        "conf.d/b.toml: not valid TOML: "
        "Expected ']' at the end of a table declaration (at line 1, column 8)",
        'instances/1.toml: worker.queues: no queue "defualt" is configured, '
        'did you mean "default"?',
    ]


@pytest.mark.parametrize(
    ("table", "line", "problem"),
    [
        ("broker", "heartbeat = 0", "heartbeat: expected a duration from 1s to 1h, found 0"),
        ("broker", "heartbeat = true", "expected a duration such as .*, found true"),
        ("broker", "heartbeat = nan", "expected a duration from .*, found nan"),
        ("broker", "ack_timeout = inf", "expected a duration from .*, found inf"),
        ("broker", f"ack_timeout = 1{'0' * 400}", "expected a duration from"),
        ("broker", "urls = []", "expected an array such as"),
        ("broker", 'password_file = "secret"', 'expected an absolute path .*, found "secret"'),
        ("broker", 'tls.keyfile = "/k"', 'tls.keyfile: unknown key, did you mean "key_file"'),
        ("broker", 'tls.key_file = "/k"', "tls.key_file: needs a cert_file"),
        ("broker", "tls = true", "tls: expected a table, found true"),
        ("broker", 'management_url = "rabbit1"', "expected a URL such as"),
        ("worker", 'queues = ["default", "default"]', '"default" is listed 2 times'),
        ("worker", "drain_timeout = -1", "expected a duration from 0s to 365d, found -1"),
        ("queues.default", "concurrency = 0", "a whole number from 1 to 65535, found 0"),
        ("queues.default", "concurrency = true", "a whole number .*, found true"),
        ("queues.default", "prefetch = 65536", "a whole number from 1 to 65535"),
        ("queues.default", "max_length = 0", "a whole number from 1"),
        ("queues.default", "max_priority = 5", "only a queue of type = "),
        ("queues.default", 'type = "classic"\nmax_priority = 256', "from 1 to 255"),
        ("queues.default", 'declare = "plain"\nmax_length = 5', "max_length: has no effect"),
        ("queues.default", 'default_handler = "slep"', 'no handler "slep" .*mean "sleep"'),
        ('queues."amq.x"', "", 'queues."amq.x": this name cannot be used'),
        ('queues."x.dead"', "", "cannot be used"),
        ('queues."x.due"', "", "cannot be used"),
        ('queues."x.#"', "", "cannot be used"),
        ('queues."*"', "", "cannot be used"),
        ('queues."workerd.x"', "", "cannot be used"),
        ('queues."a b"', "", "cannot be used"),
        ('queues."a\\nb"', "", r'queues."a\\nb": this name cannot be used'),
        (f"queues.{'x' * 201}", "", "cannot be used"),
        ('handlers."workerd.reply"', "", "cannot be used"),
        ("handlers.x", "", "handlers.x: needs one of .*, has none of them"),
        ("handlers.x", 'command = ["a"]\npython = "a:b"', "has command and python"),
        ("handlers.x", 'command = "sleep 5"', 'expected an array .*, found "sleep 5"'),
        ("handlers.x", "command = []", "expected an array"),
        ("handlers.x", 'command = ["{body}"]', "a program without placeholders or braces"),
        ("handlers.x", 'stream = ["{body}"]', "a program without placeholders or braces"),
        ("handlers.x", 'command = [""]', "a program without placeholders or braces"),
        ("handlers.x", 'command = ["a", 5, "{b}"]', "item 2: .*, found 5; item 3: unknown"),
        ("handlers.x", 'command = ["a", "\\u0000"]', "item 2: expected a string"),
        ("handlers.x", 'python = "myapp.jobs"', "expected a function such as"),
        ("handlers.x", 'python = "my app:f"', "expected a function such as"),
        ("handlers.sleep", 'queue = "defalt"', 'no queue "defalt" .*did you mean "default"'),
        ("handlers.sleep", "timeout = 0", "expected a duration from 1ms"),
        ("handlers.sleep", "kill_grace = 0", "expected a duration from 1ms"),
        ("handlers.sleep", "retry.attempts = 0", "a whole number from 1"),
        ("handlers.sleep", "retry.attempts = 26", "expected at most max_attempts, 25, found 26"),
        ("handlers.sleep", "retry.max_attempts = 4", "at most max_attempts, 4, found 5"),
        ("handlers.sleep", "retry.multiplier = 0.5", "a number from 1 to 1000, found 0.5"),
        ("handlers.sleep", 'retry.delay = "366d"', "a duration from 0s to 365d"),
        ("handlers.sleep", "retry.jitter = 1", "expected true or false, found 1"),
        ("handlers.sleep", 'exit_codes = { 0 = "done" }', "an exit status from 1 to 255"),
        ("handlers.sleep", 'exit_codes = { 075 = "done" }', "an exit status from 1 to 255"),
        ("handlers.sleep", 'exit_codes = { 75 = "die" }', "exit_codes.75: expected one of"),
        ("handlers.sleep", 'environment = { WORKERD_X = "" }', "not beginning with"),
        ("handlers.sleep", 'environment = { "A=B" = "" }', "the name of a variable"),
        ("handlers.sleep", "environment = { A = 1 }", "environment.A: expected a string"),
        ("handlers.sleep", 'max_body = "1MB"', 'expected a size such as "64KiB" .*, found "1MB"'),
        ("handlers.sleep", "max_body = 1.5", "expected a size such as"),
        ("handlers.sleep", "output_limit = true", "expected a size such as"),
        ("handlers.sleep", 'output_limit = "2GiB"', "a size from 0B to 1GiB"),
        ("handlers.sleep", "processes = 2", "processes: has no effect on a command handler"),
        ("handlers.sleep", 'interpreter = "/x"', "interpreter: has no effect on a command"),
        (
            "handlers.x",
            'stream = ["a"]\ndashes = true',
            "dashes: has no effect on a stream handler",
        ),
        ("log", 'jobs = "some"', 'expected one of "all", "failures"'),
        ("log", "output_lines = 1.0", "a whole number"),
        ("control", 'operators = ""', "expected the name of a group"),
        ("logs", "", 'logs: unknown key, did you mean "log"'),
    ],
)
def test_a_wrong_setting_is_one_problem(
    write: Write, etc: Path, table: str, line: str, problem: str
) -> None:
    sleep = SLEEP if table != "handlers.sleep" else ""
    own = 'command = ["sleep"]\n' if table == "handlers.sleep" else ""
    write(f"{sleep}[{table}]\n{own}{line}\n")
    (found,) = problems(etc)
    assert found.startswith("workerd.toml: " + table.split(".")[0])
    assert re.search(problem, found), found


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a b", "x" * 33, "1\n"])
def test_an_instance_needs_a_name_that_is_safe_in_a_path(etc: Path, name: str) -> None:
    (problem,) = problems(etc, instance=name)
    assert problem.startswith("instance name ")


def test_the_same_handler_or_queue_in_two_files_of_conf_d_is_refused(
    write: Write, etc: Path
) -> None:
    write("[queues.mail]\n" + SLEEP)
    write("[queues.mail]\n" + SLEEP, "conf.d/a.toml")
    write("[queues.mail]\n" + SLEEP, "conf.d/b.toml")
    assert problems(etc) == [
        f"conf.d/b.toml: {place}: is already in conf.d/a.toml"
        for place in ("queues.mail", "handlers.sleep")
    ]


def test_a_file_that_was_asked_for_has_to_exist(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"absent\.toml: No such file"):
        load(tmp_path / "absent.toml", environ={})


def test_a_file_that_is_not_text_is_refused(write: Write, etc: Path) -> None:
    write("").write_bytes(b"\xff")
    (problem,) = problems(etc)
    assert problem.startswith("workerd.toml: not valid TOML")


def test_a_file_that_everyone_could_write_is_refused(write: Write, etc: Path) -> None:
    write("", mode=0o666)
    (problem,) = problems(etc)
    assert problem == "workerd.toml: workerd.toml is writable for everyone: chmod go-w workerd.toml"


@pytest.mark.parametrize(
    "setting",
    ['urls = ["amqp://u:s3cret@h"]', 'management_url = "http://u:s3cret@h:15672"'],
)
def test_a_password_in_a_file_that_everyone_can_read_is_refused(
    write: Write, etc: Path, setting: str
) -> None:
    write(f"[broker]\n{setting}\n", mode=0o644)
    (problem,) = problems(etc)
    assert "holds a password that everyone can read: chmod o-r" in problem
    assert "s3cret" not in problem
    write(f"[broker]\n{setting}\n", mode=0o640)
    load(etc=etc, environ={})


def test_the_password_of_guest_is_no_secret(write: Write, etc: Path) -> None:
    write('[broker]\nurls = ["amqp://guest:guest@localhost"]\n', mode=0o644)
    load(etc=etc, environ={})


def test_no_part_of_a_url_shows_in_a_problem(write: Write, etc: Path) -> None:
    write("""
        [broker]
        urls = "amqp://u:s3cret@h"
        management_url = "u:s3cret@h"
        password_file = "amqp://u:s3cret@h"
        [handlers.x]
        command = ["x", "{"]
        environment = { PASSWORD = ["s3cret"] }
    """)
    assert "s3cret" not in "".join(problems(etc))


def test_a_password_file_that_everyone_can_read_is_found_early(write: Write, etc: Path) -> None:
    password = write("s3cret", "password", 0o644)
    write(f'[broker]\npassword_file = "{password}"\n')
    (problem,) = problems(etc)
    assert "everyone can read" in problem


def test_settings_made_in_code_have_the_same_defaults(tmp_path: Path) -> None:
    assert Settings().broker == load(etc=tmp_path, environ={}).broker
