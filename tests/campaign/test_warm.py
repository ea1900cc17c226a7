"""Many jobs through warm processes that are killed at random: `pytest -m campaign -rP`.

What a worker does with reports is done here in small: a failed attempt is followed by the next,
and what could not start is tried again.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import re
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.harness.amqp import Client
from tests.harness.broker import Broker
from tests.harness.daemon import Daemon
from tests.harness.pools import Warm, in_loop, job, logged, pool, python
from tests.harness.processes import MissingTool
from tests.harness.tables import toml
from tests.harness.trixie import CHECKOUT
from tests.harness.waiting import SEEDS, TIMEOUT
from workerd.config.model import Handler
from workerd.core.job import ATTEMPT, Outcome
from workerd.handlers.warm import respawn

JOBS = 1_000 if SEEDS <= 2 else 10_000

pytestmark = pytest.mark.campaign


def in_python(folder: Path, seconds: float = 0.0) -> Handler:
    code = f"""
    import os, time
    journal = os.open({str(folder / "journal")!r}, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    def f(job):
        os.write(journal, f"{{job.id}} {{job.attempt}}\\n".encode())
        time.sleep({seconds})
        return job.id
    """
    return python(folder, code, processes=4, recycle_after=200)


def in_javascript(folder: Path, seconds: float = 0.0) -> Handler:
    if shutil.which("node") is None:
        raise MissingTool("no node is installed")
    text = (CHECKOUT / "docs" / "protocol.md").read_text()
    (code,) = re.findall(r"```javascript\n(.*?)```", text, re.DOTALL)
    handle = (
        f'async (job) => {{ fs.appendFileSync("{folder}/journal", '
        "`${job.id} ${job.attempt}\\n`);"
        f" await new Promise((wake) => setTimeout(wake, {1000 * seconds})); return job.id; }};"
    )
    was = "async (job, body) => body.toString().toUpperCase();"
    assert was in code
    (folder / "handler.js").write_text(code.replace(was, handle))
    stream = ("node", str(folder / "handler.js"))
    return Handler("test", stream=stream, processes=4, recycle_after=200)


@pytest.mark.parametrize("seed", range(SEEDS))
@pytest.mark.parametrize("make", [in_python, in_javascript])
def test_a_killed_process_costs_its_job_one_attempt_and_no_job_is_lost_or_done_twice(
    make: object, seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert callable(make)
    monkeypatch.setattr(respawn, "FIRST_PAUSE", 0.05)
    monkeypatch.setattr(respawn, "LONGEST_PAUSE", 0.05)
    chance = random.Random(seed)
    depth = 1 if seed % 2 else 4
    crashes: Counter[str] = Counter()
    kills = 0

    async def one(warm: Warm, name: str) -> None:
        while True:
            headers = {ATTEMPT: crashes[name]} if crashes[name] else {}
            report = await warm.do(job(message_id=name, headers=headers))
            if report.outcome is Outcome.DONE:
                assert report.output == name.encode()
                return
            if report.outcome is Outcome.UNAVAILABLE:
                await asyncio.sleep(0.05)
                continue
            assert (report.outcome, report.reason, report.signal) == (
                Outcome.FAILED,
                "crashed",
                "SIGKILL",
            )
            crashes[name] += 1

    async def kill(warm: Warm) -> None:
        nonlocal kills
        while kills < JOBS // 20:
            await asyncio.sleep(chance.uniform(0.002, 0.04))
            ready = [child for child in warm.children if child.is_ready]
            if ready:
                kills += 1
                at_work = [child for child in ready if child.assignments]
                os.kill(chance.choice(at_work or ready).pid, signal.SIGKILL)

    async def scenario() -> None:
        names = iter([f"job-{number}" for number in range(JOBS)])

        async def slot(warm: Warm) -> None:
            for name in names:
                await one(warm, name)

        async with pool(make(tmp_path), depth=depth) as warm:
            killer = asyncio.ensure_future(kill(warm))
            await asyncio.gather(*(slot(warm) for _ in range(16)))
            killer.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await killer

    with logged() as events:
        in_loop(scenario())
    runs = Counter((tmp_path / "journal").read_text().splitlines())
    last = Counter(line.split()[0] for line in runs)
    print(f"depth {depth}: {kills} kills, {sum(crashes.values())} failed attempts of {JOBS} jobs")
    # None is lost, and no attempt was made twice.
    assert set(last) == {f"job-{number}" for number in range(JOBS)}
    assert set(runs.values()) == {1}
    # Each attempt that was charged has had its one process killed.
    assert 0 < sum(crashes.values()) <= kills
    assert all(last[name] <= 1 + crashes[name] for name in last)
    assert not [event for event in events if "broke" in str(event.get("error"))]


@pytest.mark.parametrize("seed", range(SEEDS))
@pytest.mark.parametrize("make", [in_python, in_javascript])
def test_under_a_daemon_each_attempt_that_a_kill_has_cost_is_followed_by_the_next(
    make: Callable[..., Handler],
    seed: int,
    broker: Broker,
    client: Client,
    daemon: Callable[..., Daemon],
    tmp_path: Path,
) -> None:
    handler = make(tmp_path, seconds=0.01)
    program: dict[str, Any] = {"python": handler.python, "interpreter": str(handler.interpreter)}
    if handler.stream:
        program = {"stream": list(handler.stream)}
    worker = daemon(
        toml(
            {
                "broker": {"urls": [broker.url]},
                "log": {"level": "debug", "format": "json"},
                "queues.default": {"concurrency": 4, "prefetch": 64, "default_handler": "job"},
                "handlers.job": {
                    **program,
                    "working_directory": str(tmp_path),
                    "processes": 4,
                    "retry": {"attempts": 25, "delay": "1s", "multiplier": 1.0},
                },
            }
        )
    )
    worker.wait_event("consuming", queue="default.due")
    chance = random.Random(seed)
    names = [f"job-{number}" for number in range(JOBS)]
    publisher = threading.Thread(target=_publish, args=(broker.url, names))
    publisher.start()
    kills = 0
    while publisher.is_alive() or broker.queues()["default"].ready:
        # One that is killed before it is ready costs nobody anything, and pauses the handler.
        ready = {each["child"] for each in worker.events("child ready")}
        pids = [pid for pid in worker.children() if pid in ready]
        if len(pids) > 1:
            kills += 1
            with contextlib.suppress(ProcessLookupError):
                os.kill(chance.choice(pids), signal.SIGKILL)
        time.sleep(chance.uniform(0.01, 0.1))
    publisher.join()
    worker.wait_event("done", count=JOBS, timeout=4 * TIMEOUT)
    failed = worker.events("failed")
    print(f"{kills} kills, {len(failed)} failed attempts of {JOBS} jobs")
    assert {(each["reason"], each["signal"]) for each in failed} == {("crashed", "SIGKILL")}
    assert len(failed) <= kills
    # None is lost, none done twice, and each kill has cost its job one attempt.
    attempts = Counter(each["job_id"] for each in failed)
    done = {each["job_id"]: each["attempt"] for each in worker.events("done")}
    assert done == {name: 1 + attempts[name] for name in names}
    runs = Counter((tmp_path / "journal").read_text().splitlines())
    assert set(runs.values()) == {1}
    broker.await_depth("default")
    assert not client.ready("default.dead")


def _publish(url: str, names: list[str]) -> None:
    with Client(url) as client:
        client.publish_jobs("default", names)
