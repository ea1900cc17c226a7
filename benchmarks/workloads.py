"""What is measured, between whom, and what workerd aims at.

A workload is played in rounds, in each of which every contender has one turn: A B C A B C. A turn
has a virtual host, a folder and processes of its own, and gives one figure for each metric.
"""

from __future__ import annotations

import contextlib
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import crews
from benchmarks.crews import COMMANDS, PROCESSES, Worker
from benchmarks.rig import QUEUE, SENT, TIMEOUT, Crew, Message, Rig
from tests.harness.processes import MissingTool
from tests.harness.programs import SUBMIT
from tests.harness.tables import Table
from tests.harness.trixie import CHECKOUT
from tests.harness.waiting import until

Sample = dict[str, float]


@dataclass(frozen=True)
class Contender:
    """Somebody who takes part: `play` is one turn."""

    name: str
    setting: str
    play: Callable[[Rig], Sample]


@dataclass(frozen=True)
class Choice:
    """A contender whose best setting is found first, by the first metric."""

    name: str
    candidates: tuple[Contender, ...]


@dataclass(frozen=True)
class Metric:
    name: str
    unit: str
    more_is_better: bool = False
    digits: int = 0


@dataclass(frozen=True)
class Aim:
    """What `who` is to reach: `factor` times what `against` has, or the figure itself."""

    metric: str
    who: str
    factor: float
    against: str | None = None


@dataclass(frozen=True)
class Workload:
    name: str
    title: str
    metrics: tuple[Metric, ...]
    contenders: tuple[Contender | Choice, ...]
    aims: tuple[Aim, ...]
    #: For what varies little or takes long.
    rounds_at_most: int = 100


# Many jobs


def throughput(worker: Worker, job: str, count: int, warm_up: int) -> Contender:
    """So many jobs that wait in the queue, from the first start to the last acknowledgement.

    The processes run, are connected and warm; they are frozen (SIGSTOP) while the queue is filled.
    So neither their start nor the publishing is in the figure, for nobody.
    """

    def play(rig: Rig) -> Sample:
        jobs = rig.jobs(count)
        crew = worker.start(rig, job)
        with rig.channel() as channel:
            rig.load(worker.messages(rig, job, warm_up))
            rig.empty(channel, crew)
            messages = worker.messages(rig, job, jobs)
            crew.freeze()
            rig.load(messages)
            until(lambda: sum(rig.left()) == jobs, f"{jobs} jobs in the queue", TIMEOUT)
            with profiled(rig, worker, crew):
                began = time.monotonic()
                crew.thaw()
                ended = rig.empty(channel, crew)
        check(rig, crew, worker, job, warm_up + jobs)
        return {"rate": jobs / (ended - began)}

    return Contender(worker.name, worker.setting, play)


def check(rig: Rig, crew: Crew, worker: Worker, job: str, jobs: int) -> None:
    """Raise AssertionError unless every job ran once, and well."""
    crew.check()
    assert rig.dead() == 0, f"{rig.dead()} jobs have failed:\n{crew.tail()}"
    if job == "noop":
        ran = len(rig.noted())
        assert ran == jobs, f"{jobs} jobs, of which {ran} ran:\n{crew.tail()}"
    elif worker.name.startswith("workerd"):
        done = crew.log.read_bytes().count(b'"event": "done"')
        assert done == jobs, f"{jobs} jobs, of which {done} are done:\n{crew.tail()}"


@contextlib.contextmanager
def profiled(rig: Rig, worker: Worker, crew: Crew) -> Iterator[None]:
    """With --profile: py-spy on the daemon meanwhile, as stacks with their number of samples."""
    if rig.profile is None or worker.name != "workerd":
        yield
        return
    rig.profile.unlink(missing_ok=True)
    options = ["--format", "raw", "--rate", "500", "--nonblocking", "--output", str(rig.profile)]
    program = str(Path(sys.executable).parent / "py-spy")
    command = [program, "record", *options, "--pid", str(crew.pid)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as spy:
        assert spy.stdout is not None
        said = spy.stdout.readline()  # that it samples
        yield
        spy.send_signal(signal.SIGINT)
        said += spy.communicate(timeout=TIMEOUT)[0]
    assert rig.profile.exists(), said.decode()


def spawned(count: int) -> Contender:
    """Programs without a broker: what the kernel and Python can do."""

    def play(rig: Rig) -> Sample:
        jobs = rig.jobs(count)
        command = [sys.executable, "-m", "benchmarks.peers.spawn", str(jobs), str(COMMANDS)]
        return {"rate": jobs / float(run(rig, command))}

    return Contender("posix_spawn", "4 at once, pipes, no broker", play)


# Few jobs


RATE = 50.0


def latency(worker: Worker, job: str) -> Contender:
    """From publishing to the first instruction of the job, at 50 jobs a second."""

    def play(rig: Rig) -> Sample:
        jobs, warm_up = (150 if rig.quick else 250), 25
        crew = worker.start(rig, job)
        messages = worker.messages(rig, job, warm_up + jobs)
        with rig.channel() as channel:
            due = time.monotonic()
            for body, properties in messages:
                time.sleep(max(due - time.monotonic(), 0.0))
                due = max(due + 1 / RATE, time.monotonic())
                sent = body.replace(SENT.encode(), str(time.time_ns()).encode())
                channel.basic_publish("", QUEUE, sent, properties)
            rig.empty(channel, crew)
        crew.check()
        late = [int(line) / 1e6 for line in rig.noted().split()]
        assert len(late) == len(messages), f"{len(late)} of {len(messages)} ran:\n{crew.tail()}"
        hundredths = statistics.quantiles(late[warm_up:], n=100)
        return {"p50": hundredths[49], "p99": hundredths[98]}

    return Contender(worker.name, worker.setting, play)


# Submitting


def cold_submit(name: str, setting: str, command: Sequence[str | Path]) -> Contender:
    """One job, from the start of the program to its end, when the broker has confirmed it.

    An instance that consumes another queue runs meanwhile, whoever submits.
    """

    def play(rig: Rig) -> Sample:
        rig.declare()
        tables: dict[str, Table] = {
            "worker": {"queues": ["other"]},
            "queues.other": {"type": rig.queue_type},
        }
        file = crews.configuration(rig, tables=tables)
        crews.run_workerd(rig, file, "other")
        seconds = []
        for _ in range(1 + rig.jobs(10)):
            began = time.monotonic()
            run(rig, [*(file if word == "CONFIG" else word for word in command)])
            seconds.append(time.monotonic() - began)
        assert rig.left()[0] == len(seconds), f"{rig.left()} jobs are in the queue"
        return {"time": statistics.median(seconds[1:]) * 1000}

    return Contender(name, setting, play)


def bulk(name: str, setting: str, command: Sequence[str | Path]) -> Contender:
    """Many lines, each a job, from the start of the program to its end."""

    def play(rig: Rig) -> Sample:
        rig.declare()
        file = crews.configuration(rig)
        jobs = rig.jobs(50_000)
        lines = rig.turn_folder / "lines"
        lines.write_text("".join(f"photo-{number:06}.jpg\n" for number in range(jobs)))
        began = time.monotonic()
        run(rig, [*(file if word == "CONFIG" else word for word in command)], lines)
        seconds = time.monotonic() - began
        assert rig.left() == (jobs, 0), f"{rig.left()} jobs are in the queue"
        return {"rate": jobs / seconds}

    return Contender(name, setting, play)


def run(rig: Rig, command: Sequence[str | Path], stdin: Path | None = None) -> str:
    """Run a program to its end; returns what it printed."""
    with contextlib.ExitStack() as stack:
        source = stack.enter_context(stdin.open("rb")) if stdin else subprocess.DEVNULL
        result = subprocess.run(
            command,
            stdin=source,
            capture_output=True,
            env=rig.environment(),
            cwd=CHECKOUT,
            timeout=TIMEOUT,
            check=False,
        )
    assert result.returncode == 0, f"{command} ended with {result.returncode}: {result.stderr!r}"
    return result.stdout.decode()


# Beside the work


def idle(worker: Worker, job: str, name: str | None = None) -> Contender:
    """The memory of all its processes when they have worked and do nothing."""

    def play(rig: Rig) -> Sample:
        crew = worker.start(rig, job)
        with rig.channel() as channel:
            rig.load(worker.messages(rig, job, 200))
            rig.empty(channel, crew)
        time.sleep(2)  # for what a worker does behind a job
        crew.check()
        return {"memory": crew.pss()}

    return Contender(name or worker.name, worker.setting, play)


def outage(worker: Worker) -> Contender:
    """The broker is restarted under work: from its first answer to the next start of a job."""

    def play(rig: Rig) -> Sample:
        crew = worker.start(rig, "slow")
        rig.load(worker.messages(rig, "slow", 400))
        until(lambda: rig.noted().count(b"\n") >= 10, "the first jobs", TIMEOUT)
        rig.broker.settle()
        rig.broker.restart()
        back = time.time_ns()

        def next_start() -> int | None:
            return next((at for at in map(int, rig.noted().split()) if at > back), None)

        first = until(next_start, "the next job", TIMEOUT)
        assert first is not None
        crew.check()
        crew.close()
        assert rig.broker.recovers(), "RabbitMQ has not recovered"
        return {"seconds": (first - back) / 1e9}

    return Contender(worker.name, worker.setting, play)


def backlog(worker: Worker) -> Contender:
    """A long queue of large jobs: the daemon's memory and speed at its beginning and at its end."""

    def play(rig: Rig) -> Sample:
        jobs = rig.jobs(100_000)
        free = shutil.disk_usage(rig.folder).free
        if free < jobs * 50_000:
            raise MissingTool(f"only {free / 1e9:.0f} GB are free below {rig.folder}")
        worker.start(rig, "noop").close()  # it declares the queue
        until(lambda: rig.broker.queues()[QUEUE].consumers == 0, "no consumer", TIMEOUT)
        body = b"x" * 16_000

        def messages() -> Iterator[Message]:
            for start in range(0, jobs, 1_000):
                for _, properties in worker.messages(rig, "noop", min(1_000, jobs - start)):
                    yield body, properties

        rig.load(messages())
        crew = worker.start(rig, "noop")
        seen: list[tuple[float, int, float]] = []
        with rig.channel() as channel:
            rig.empty(channel, crew, lambda left: seen.append((time.monotonic(), left, crew.rss())))
        check(rig, crew, worker, "noop", jobs)

        def between(most: float, least: float) -> list[tuple[float, int, float]]:
            part = [each for each in seen if least * jobs <= each[1] <= most * jobs]
            assert len(part) >= 3, "too quick to be measured"
            return part

        def speed(part: list[tuple[float, int, float]]) -> float:
            return (part[0][1] - part[-1][1]) / (part[-1][0] - part[0][0])

        def memory(part: list[tuple[float, int, float]]) -> float:
            return statistics.median(each[2] for each in part)

        first, last = between(0.9, 0.7), between(0.25, 0.05)
        return {
            "rate": speed(between(0.9, 0.05)),
            "speed": speed(last) / speed(first),
            "memory": memory(last),
            "growth": memory(last) / memory(first),
        }

    return Contender(worker.name, worker.setting, play)


# The table


#: Python jobs: as many processes for everybody, and what each of them needs to be quick.
WORKERD = tuple(crews.workerd_python(prefetch) for prefetch in (64, 128, 256))
WORKERD_TWICE = tuple(crews.workerd_python(prefetch, instances=2) for prefetch in (64, 128, 256))
DRAMATIQ = (
    crews.dramatiq("8 threads, prefetch 16: its defaults", threads=8),
    crews.dramatiq("1 thread, prefetch 128", threads=1, prefetch=128),
    crews.dramatiq("2 threads, prefetch 64", threads=2, prefetch=64),
    crews.dramatiq("4 threads, prefetch 128", threads=4, prefetch=128),
    crews.dramatiq("8 threads, prefetch 128", threads=8, prefetch=128),
)
CELERY = (
    crews.celery("prefetch multiplier 4: its default", multiplier=4),
    crews.celery("prefetch multiplier 64", multiplier=64),
    crews.celery("prefetch multiplier 256", multiplier=256),
)
#: Commands: four at once; what is prefetched waits in the daemon.
COMMAND = tuple(crews.workerd_commands(prefetch) for prefetch in (4, 16, 64))
COMMAND_TWICE = tuple(crews.workerd_commands(prefetch, instances=2) for prefetch in (4, 16, 64))
PIKA = crews.plain_pika("2 processes, prefetch 64", prefetch=64)

# Few jobs and none: everybody's defaults.
WORKERD_DEFAULT = crews.workerd_python()
WORKERD_COMMANDS = crews.workerd_commands()
DRAMATIQ_DEFAULT = crews.dramatiq("2 processes, 8 threads", threads=8)
DRAMATIQ_SMALL = crews.dramatiq("2 processes, 1 thread", threads=1)
CELERY_DEFAULT = crews.celery("2 processes", multiplier=4)

RATE_OF_JOBS = Metric("rate", "jobs/s", more_is_better=True)


def many(workers: Sequence[Worker], job: str, count: int, warm_up: int) -> Choice:
    name = workers[0].name
    return Choice(name, tuple(throughput(each, job, count, warm_up) for each in workers))


WORKLOADS = (
    Workload(
        "python",
        f"20,000 Python jobs that do nothing, {PROCESSES} processes",
        (RATE_OF_JOBS,),
        (
            many(WORKERD, "noop", 20_000, 500),
            many(WORKERD_TWICE, "noop", 20_000, 500),
            many(DRAMATIQ, "noop", 20_000, 500),
            many(CELERY, "noop", 20_000, 500),
            throughput(PIKA, "noop", 20_000, 500),
        ),
        tuple(
            Aim("rate", who, factor, against)
            for who in (WORKERD[0].name, WORKERD_TWICE[0].name)
            for factor, against in ((1.2, "dramatiq"), (5.0, "celery"), (0.75, "pika"))
        ),
    ),
    Workload(
        "commands",
        f"3,000 programs that read 100 bytes and end, {COMMANDS} at once",
        (RATE_OF_JOBS,),
        (
            many(COMMAND, "read", 3_000, 100),
            many(COMMAND_TWICE, "read", 3_000, 100),
            throughput(crews.amqp_consume("4 processes, -p 1"), "read", 3_000, 100),
            spawned(3_000),
        ),
        tuple(
            Aim("rate", who, factor, against)
            for who in (COMMAND[0].name, COMMAND_TWICE[0].name)
            for factor, against in ((1.15, "amqp-consume"), (0.85, "posix_spawn"))
        ),
    ),
    Workload(
        "latency",
        "from publishing to the start of a Python job, 50 jobs a second",
        (Metric("p50", "ms", digits=2), Metric("p99", "ms", digits=2)),
        tuple(
            latency(each, "stamp")
            for each in (WORKERD_DEFAULT, DRAMATIQ_DEFAULT, CELERY_DEFAULT, PIKA)
        ),
        (Aim("p50", "workerd", 1.3, "pika"), Aim("p99", "workerd", 1.0, "dramatiq")),
    ),
    Workload(
        "latency-commands",
        "from publishing to the start of a command, 50 jobs a second",
        (Metric("p50", "ms", digits=2), Metric("p99", "ms", digits=2)),
        (
            latency(WORKERD_COMMANDS, "clock"),
            latency(crews.amqp_consume("4 processes, -p 1"), "clock"),
        ),
        (Aim("p50", "workerd", 1.2, "amqp-consume"),),
    ),
    Workload(
        "submit",
        "one job from a script: the whole program, confirmed",
        (Metric("time", "ms"),),
        (
            cold_submit(
                "submit --direct",
                "",
                [*SUBMIT, "--config", "CONFIG", "--direct", "job", "1"],
            ),
            cold_submit("submit", "through the local socket", [*SUBMIT, "job", "1"]),
            cold_submit(
                "pika",
                "a script with a confirm",
                [sys.executable, "-m", "benchmarks.peers.pika_submit", QUEUE, "1"],
            ),
        ),
        (
            Aim("time", "submit --direct", 1.15, "pika"),
            Aim("time", "submit", 0.35, "pika"),
        ),
    ),
    Workload(
        "bulk",
        "50,000 lines, a job each: the whole program, all confirmed",
        (RATE_OF_JOBS,),
        (
            bulk(
                "submit --lines", "", [*SUBMIT, "--config", "CONFIG", "job", "--lines", "-f", "-"]
            ),
            bulk(
                "pika",
                "1,000 unconfirmed at a time",
                [sys.executable, "-m", "benchmarks.peers.pika_bulk", QUEUE],
            ),
        ),
        (Aim("rate", "submit --lines", 0.6, "pika"),),
    ),
    Workload(
        "idle",
        "memory of all processes that have nothing to do (PSS)",
        (Metric("memory", "MB", digits=1),),
        (
            idle(WORKERD_DEFAULT, "noop"),
            idle(WORKERD_COMMANDS, "read", "workerd, commands only"),
            idle(DRAMATIQ_SMALL, "noop"),
            idle(CELERY_DEFAULT, "noop"),
        ),
        (
            Aim("memory", "workerd", 1.0, "dramatiq"),
            Aim("memory", "workerd, commands only", 25.0),
        ),
        rounds_at_most=2,
    ),
    Workload(
        "outage",
        "a restarted broker: from its first answer to the next start of a job",
        (Metric("seconds", "s", digits=2),),
        tuple(
            outage(each)
            for each in (
                WORKERD_DEFAULT,
                crews.dramatiq("2 processes, 8 threads, restart delay 500 ms", threads=8),
                CELERY_DEFAULT,
                crews.plain_pika("2 processes, tries every 50 ms", prefetch=4),
            )
        ),
        (Aim("seconds", "workerd", 1.0),),
        rounds_at_most=3,
    ),
    Workload(
        "backlog",
        "100,000 jobs of 16 kB in the queue: memory and speed at the last beside the first",
        (
            RATE_OF_JOBS,
            Metric("memory", "MB", digits=1),
            Metric("speed", "× the first", True, 2),
            Metric("growth", "× the first", digits=2),
        ),
        (backlog(WORKERD[-1]),),
        (Aim("speed", "workerd", 0.9), Aim("growth", "workerd", 1.1)),
        rounds_at_most=3,
    ),
)
