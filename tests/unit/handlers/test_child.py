"""The Python child: what a function gets and gives, prints and raises."""

from __future__ import annotations

import ast
import json
import os
import sys
from pathlib import Path

import pytest

from tests.harness.commands import open_descriptors
from tests.harness.pools import do, do_all, job, python
from tests.harness.trixie import CHECKOUT
from tests.harness.waiting import SCALE
from workerd.core.job import Outcome
from workerd.handlers import child
from workerd.handlers.warm.pool import CHILD

BASE = Path(sys.base_prefix, "bin", f"python{sys.version_info.major}.{sys.version_info.minor}")


@pytest.mark.parametrize("file", [CHILD, Path(child.__file__)], ids=lambda file: file.name)
def test_the_child_needs_nothing_but_an_old_python(file: Path) -> None:
    tree = ast.parse(file.read_text(), feature_version=(3, 8))
    imported = {
        name.partition(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [])
        + [alias.name for alias in node.names if isinstance(node, ast.Import)]
    }
    assert imported <= sys.stdlib_module_names


def test_a_function_gets_the_job(tmp_path: Path) -> None:
    code = """
    def f(job):
        assert job.json() == [1, "ä"]
        return {name: getattr(job, name) for name in (
            "id", "type", "queue", "attempt", "max_attempts", "redelivered", "content_type",
            "content_encoding", "headers")}
    """
    given = job(
        '[1, "ä"]'.encode(),
        redelivered=True,
        type="resize",
        content_type="application/json",
        headers={
            "text": "grün",
            "bytes": b"\xff",
            "number": 2**62,
            "table": {"deep": [1.5, float("inf"), None, True]},
            b"\xfe": 1,
            "x-workerd-attempt": 2,
        },
    )
    report = do(python(tmp_path, code), given)
    assert report.outcome is Outcome.DONE, report
    assert json.loads(report.output) == {
        "id": "job-1",
        "type": "resize",
        "queue": "work",
        "attempt": 3,
        "max_attempts": 5,
        "redelivered": True,
        "content_type": "application/json",
        "content_encoding": None,
        "headers": {
            "text": "grün",
            "bytes": "\\xff",
            "number": 2**62,
            "table": {"deep": [1.5, "inf", None, True]},
            "\\xfe": 1,
        },
    }


@pytest.mark.parametrize(
    ("value", "output"),
    [
        ("None", b""),
        ("b'\\xff\\n'", b"\xff\n"),
        ("bytearray(b'x')", b"x"),
        ("'grün'", "grün".encode()),
        ("[1, {'a': None}]", b'[1, {"a": null}]'),
        ("True", b"true"),
    ],
)
def test_what_a_function_returns_is_the_result(tmp_path: Path, value: str, output: bytes) -> None:
    report = do(python(tmp_path, f"def f(job): return {value}"), job())
    assert (report.outcome, report.output) == (Outcome.DONE, output)


@pytest.mark.parametrize("value", ["object()", "(x for x in ())", "'\\udc00'"])
def test_a_result_that_cannot_be_told_is_a_failure(tmp_path: Path, value: str) -> None:
    report = do(python(tmp_path, f"def f(job): return {value}"), job())
    assert (report.outcome, report.reason) == (Outcome.FAILED, "error")
    assert "Error" in report.error


def test_an_asynchronous_function_is_awaited_in_one_loop_for_all_jobs(tmp_path: Path) -> None:
    code = """
    import asyncio
    loops = set()
    async def straggle():
        try:
            await asyncio.sleep(600)
        finally:
            print("cancelled")
    async def f(job):
        loops.add(asyncio.get_running_loop())
        asyncio.ensure_future(straggle())
        await asyncio.sleep(0.01)
        return [len(loops), len(asyncio.all_tasks())]
    """
    ran = do_all(python(tmp_path, code), job(), job())
    # Itself and its own straggler: that of the first job is gone.
    assert ran.report.output == b"[1, 2]"
    assert ran.lines() == ["cancelled", "cancelled"]


def test_retry_and_reject_say_so(tmp_path: Path) -> None:
    code = """
    from workerd import Reject, Retry
    def f(job):
        if job.body == b"later":
            raise Retry("the disk is full", delay=30)
        raise Reject("no such photo")
    """
    # Here there is no workerd, there it is installed.
    for environment in ({}, {"PYTHONPATH": str(CHECKOUT)}):
        settings = python(tmp_path, code, interpreter=BASE, environment=environment)
        report = do(settings, job(b"later"))
        assert (report.outcome, report.reason) == (Outcome.FAILED, "retry")
        assert (report.retry_after, report.note) == (30, "the disk is full")
        assert report.error.endswith("workerd.Retry: the disk is full")
        report = do(settings, job())
        assert (report.outcome, report.reason) == (Outcome.REJECTED, "rejected")
        assert report.error == report.note == "no such photo"


def test_an_application_may_have_a_workerd_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "workerd.py").write_text("mine = 'mine'")
    code = "import workerd\ndef f(job): return workerd.mine"
    assert do(python(tmp_path, code, interpreter=BASE), job()).output == b"mine"


def test_a_failure_has_its_traceback_without_ours(tmp_path: Path) -> None:
    code = "def f(job):\n    raise ValueError('wrong')\n"
    report = do(python(tmp_path, code), job())
    assert (report.outcome, report.reason) == (Outcome.FAILED, "error")
    assert report.error.startswith("Traceback (most recent call last):\n")
    assert f'"{tmp_path}/app.py", line 2, in f\n' in report.error
    assert report.error.endswith("\nValueError: wrong")
    assert "child.py" not in report.error


def test_the_working_directory_is_where_modules_are_looked_for_first(tmp_path: Path) -> None:
    # A name that the folder of the child itself has, too.
    (tmp_path / "process.py").write_text("where = 'here'")
    code = "import process, sys, os\ndef f(job): return [process.where, sys.path[0], os.getcwd()]"
    report = do(python(tmp_path, code), job())
    assert json.loads(report.output) == ["here", str(tmp_path), str(tmp_path)]


def test_an_application_sees_nothing_of_its_child(tmp_path: Path) -> None:
    code = """
    import os, sys
    def f(job):
        assert sys.stdin.read() == ""
        variables = [name for name in os.environ if "WORKERD" in name]
        inherited = [fd for fd in range(1024) if fd > 2 and _inheritable(fd)]
        return [sys.argv, variables, inherited]
    def _inheritable(fd):
        try:
            return os.get_inheritable(fd)
        except OSError:
            return False
    """
    environ = {"PATH": os.defpath, "WORKERD_BROKER_URL": "amqp://secret", "NOTIFY_SOCKET": "x"}
    # Those that whoever started the tests has left open are shed by the daemon, not here.
    foreign = {fd for fd in map(int, open_descriptors()) if os.get_inheritable(fd)}
    report = do(python(tmp_path, code), job(), environ=environ)
    arguments, variables, inherited = json.loads(report.output)
    assert (arguments, variables) == (["app:f"], ["WORKERD_PROTOCOL"])
    assert set(inherited) <= foreign


def test_prints_and_records_are_lines_of_the_job_in_order_and_with_their_level(
    tmp_path: Path,
) -> None:
    code = """
    import logging, sys
    from concurrent.futures import ThreadPoolExecutor
    def f(job):
        print("one")
        logging.debug("two")
        logging.getLogger("app.part").warning("three\\n%s", "lines")
        job.log.info("four")
        print("five", file=sys.stderr)
        ThreadPoolExecutor().submit(print, "six").result()
        try:
            1 / 0
        except ZeroDivisionError:
            logging.exception("seven")
        print("eight", end="")
    """
    for name in ("a", "b"):
        ran = do_all(python(tmp_path, code), job(message_id=name))
        said = [e for e in ran.events if e["event"] == "output" and e.get("job_id") == name]
        shown = [(e["stream"], e["level"], e["text"]) for e in said]
        assert shown[:7] == [
            ("stdout", "info", "one"),
            ("log", "debug", "two"),
            ("log", "warning", "three"),
            ("log", "warning", "lines"),
            ("log", "info", "four"),
            ("stderr", "info", "five"),
            ("stdout", "info", "six"),
        ]
        assert ("log", "error", "seven") in shown
        assert ("log", "error", "ZeroDivisionError: division by zero") in shown
        assert ("stdout", "info", "eight") in shown
        assert said[2]["logger"] == "app.part"
        assert ran.report.output == b""


def test_what_is_said_is_bounded_like_a_commands_output(tmp_path: Path) -> None:
    code = """
    import logging
    def f(job):
        for number in range(1000):
            print("p", number)
            logging.warning("r %d", number)
    """
    ran = do_all(python(tmp_path, code), job(), output_lines=4)
    assert ran.lines() == ["p 0", "p 1", "p 998", "p 999"]
    assert ran.lines("log") == ["r 0", "r 1", "r 998", "r 999"]
    assert (ran.omitted(), ran.omitted("log")) == (996, 996)


def test_nothing_that_is_said_can_forge_a_line(tmp_path: Path) -> None:
    code = """
    import logging
    def f(job):
        print('{"frame":1,"outcome":"done"}')
        logging.error("\\x1b[31m\\u2028 \\udc80")
    """
    ran = do_all(python(tmp_path, code), job())
    assert ran.lines() == ['{"frame":1,"outcome":"done"}']
    assert ran.lines("log") == ["\\x1b[31m\\u2028 \\udc80"]


def test_the_level_of_the_log_is_that_of_the_root_logger(tmp_path: Path) -> None:
    code = """
    import logging
    def f(job):
        logging.debug("no")
        logging.info("yes")
    """
    ran = do_all(python(tmp_path, code), job(), level="info")
    assert ran.lines("log") == ["yes"]


def test_an_applications_own_logging_may_be_configured(tmp_path: Path) -> None:
    code = """
    import logging, logging.config
    logging.config.dictConfig({"version": 1, "root": {"handlers": []}})
    def f(job):
        job.log.warning("still there")
    """
    assert do_all(python(tmp_path, code), job()).lines("log") == ["still there"]


HOSTILE = {
    "SystemExit": ("raise SystemExit(3)", "SystemExit: 3"),
    "exit 0": ("import sys; sys.exit()", "SystemExit"),
    "KeyboardInterrupt": ("raise KeyboardInterrupt", "KeyboardInterrupt"),
    "recursion": ("f(job)", "RecursionError"),
    "memory": ("b'x' * (1 << 62)", "MemoryError"),
    "generator exit": ("raise GeneratorExit", "GeneratorExit"),
    "no text": (
        "class E(Exception):\n        def __str__(self): raise SystemExit\n    raise E",
        "E",
    ),
    "no cause": (
        "class E(Exception):\n        @property\n        def __cause__(self): raise SystemExit\n"
        "    raise E",
        "E, and showing it ended in SystemExit",
    ),
    "no class": (
        "class E(BaseException):\n        __reduce__ = None\n        lock = __import__"
        "('threading').Lock()\n    raise E",
        "E",
    ),
    "huge": ("raise ValueError('x' * 50_000_000)", "xxx"),
    "deep chain": (
        "error = None\n    for _ in range(50):\n        try:\n            raise ValueError("
        "'y' * 1000) from error\n        except ValueError as e: error = e\n    raise error",
        "yyy",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_whatever_a_function_raises_is_a_failed_attempt_with_a_bounded_text(
    tmp_path: Path, name: str
) -> None:
    line, expected = HOSTILE[name]
    code = f"def f(job):\n    if job.body: return 'well'\n    {line}\n"
    settings = python(tmp_path, code)
    report = do(settings, job())
    assert (report.outcome, report.reason) == (Outcome.FAILED, "error")
    assert expected in report.error
    assert len(report.error) <= child.MAX_TEXT
    assert do_all(settings, job(), job(b"next")).report.output == b"well"


def test_a_child_that_lost_its_ground_is_replaced(tmp_path: Path) -> None:
    code = "import os\ndef f(job):\n    print(os.getpid())\n    raise eval(job.body)\n"
    ran = do_all(python(tmp_path, code), job(b"ValueError"), job(b"SystemExit"), job(b"ValueError"))
    first, second, third = ran.lines()
    assert first == second != third
    (left,) = [e for e in ran.events if e["event"] == "child leaves" and e["reason"] == "last"]
    assert left["child"] == int(first)


@pytest.mark.parametrize("status", [0, 3])
def test_a_function_that_ends_the_process_has_failed(tmp_path: Path, status: int) -> None:
    code = f"""
    import os, sys
    def f(job):
        if job.body: return "well"
        print("last words", file=sys.stderr)
        os._exit({status})
    """
    settings = python(tmp_path, code)
    report = do(settings, job())
    assert (report.outcome, report.reason) == (Outcome.FAILED, "crashed")
    assert (report.exit_status, report.error) == (status, "last words")
    assert do_all(settings, job(), job(b"next")).report.output == b"well"


def test_sigterm_in_the_moment_before_a_function_begins_is_not_lost(tmp_path: Path) -> None:
    code = """
    import os, signal, time, workerd
    names = workerd.Retry.__init__.__globals__
    class Job(names["Job"]):
        def __init__(self, *arguments):
            os.kill(os.getpid(), signal.SIGTERM)
            super().__init__(*arguments)
    names["Job"] = Job
    def f(job):
        time.sleep(600)
    """
    report = do(python(tmp_path, code), job())
    assert (report.reason, report.signal) == ("crashed", "SIGTERM")


def test_a_function_has_its_grace_to_put_things_in_order(tmp_path: Path) -> None:
    code = """
    import asyncio, time
    def f(job):
        try:
            time.sleep(600)
        finally:
            print("in order")
    async def g(job):
        try:
            await asyncio.sleep(600)
        finally:
            await asyncio.sleep(0.01)
            print("in order")
    """
    for function in ("f", "g"):
        ran = do_all(python(tmp_path, code, function, timeout=0.2 * SCALE, kill_grace=600.0), job())
        assert (ran.report.outcome, ran.report.reason) == (Outcome.FAILED, "timeout")
        assert ran.report.signal == "SIGTERM"
        assert ran.lines() == ["in order"]
