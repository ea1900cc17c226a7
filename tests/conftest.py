"""The fixtures of every test. What they hand out is documented in `tests/harness`.

A test that needs a tool which this machine lacks is skipped with the reason; where `CI` is set, it
fails. Markers follow from the fixtures a test asks for, so that `-m pure` needs no upkeep.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

# The pika that was asked for comes before the installed one, here as in the daemon.
sys.path[:0] = filter(
    None, [os.environ.get("WORKERD_TEST_PIKA"), str(Path(__file__).resolve().parents[1])]
)

from tests.harness import processes, system  # noqa: E402
from tests.harness.amqp import Client  # noqa: E402
from tests.harness.broker import Broker, SharedBroker  # noqa: E402
from tests.harness.daemon import Daemon  # noqa: E402
from tests.harness.journald import Journald  # noqa: E402
from tests.harness.network import Network  # noqa: E402
from tests.harness.oracle import Oracle  # noqa: E402
from tests.harness.peer import Peer  # noqa: E402
from tests.harness.programs import Program  # noqa: E402
from tests.harness.system import Machine  # noqa: E402
from tests.harness.waiting import QUICK, TIMEOUT, until  # noqa: E402
from tests.harness.wire import Wire  # noqa: E402

VERSION = os.environ.get("WORKERD_TEST_RABBITMQ", "3.10")

MARKERS = {
    "pure": "starts no server and no daemon",
    "broker": "needs RabbitMQ",
    "network": "needs root and network namespaces",
    "system": "boots a Debian",
    "pika": "looks into pika's inside; runs on every pika",
    "campaign": "takes random moments; WORKERD_TEST_SEEDS says how many",
}

# The same examples every time, so that what is red is red for everybody; a campaign seeks new ones.
hypothesis.settings.register_profile(
    "workerd", derandomize="WORKERD_TEST_SEEDS" not in os.environ, database=None, deadline=None
)
hypothesis.settings.register_profile(
    "quick", hypothesis.settings.get_profile("workerd"), max_examples=10
)
hypothesis.settings.load_profile("quick" if QUICK else "workerd")

# How long what a daemon left behind may take to notice that it is gone.
ORPHANS_MAY_LIVE = TIMEOUT / 10

failed = pytest.StashKey[bool]()
witnesses = pytest.StashKey[list[tuple[str, Callable[[], str]]]]()


def pytest_configure(config: pytest.Config) -> None:
    for name, meaning in MARKERS.items():
        config.addinivalue_line("markers", f"{name}: {meaning}")
    processes.adopt_orphans()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        fixtures = set(getattr(item, "fixturenames", ()))
        if fixtures & {"shared_broker", "own_broker"}:
            item.add_marker("broker")
        if "network" in fixtures:
            item.add_marker("network")
        if "machine" in fixtures:
            item.add_marker("system")
        if not fixtures & {"shared_broker", "own_broker", "network", "daemon", "machine"}:
            item.add_marker("pure")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    outcome: Any = yield
    report = outcome.get_result()
    missing = call.excinfo is not None and isinstance(call.excinfo.value, processes.MissingTool)
    if missing and not os.environ.get("CI"):
        assert call.excinfo is not None
        report.outcome = "skipped"
        report.longrepr = (str(item.path), item.location[1] or 0, str(call.excinfo.value))
    if report.skipped and os.environ.get("CI"):
        report.outcome = "failed"
    if report.failed:
        item.stash[failed] = True
        for title, tell in item.stash.get(witnesses, []):
            report.sections.append((title, tell()))


@pytest.fixture
def testify(request: pytest.FixtureRequest) -> Callable[[str, Callable[[], str]], None]:
    """Register what to show if the test fails: a title, and a function that returns the text."""
    told: list[tuple[str, Callable[[], str]]] = request.node.stash.setdefault(witnesses, [])
    return lambda title, tell: told.append((title, tell))


@pytest.fixture(scope="session")
def shared_broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SharedBroker]:
    shared = SharedBroker(VERSION, lambda: tmp_path_factory.mktemp("rabbitmq"))
    yield shared
    shared.close()


@pytest.fixture
def broker(
    shared_broker: SharedBroker, testify: Callable[[str, Callable[[], str]], None]
) -> Iterator[Broker]:
    """A running RabbitMQ with a virtual host of the test's own: `broker.url`.

    It may be killed, frozen, stopped and started: a kill and a start take as long as a new one.
    """
    broker = shared_broker.ready()
    testify("rabbitmq", lambda: broker.logs[-4000:])
    yield broker
    shared_broker.check()


@pytest.fixture
def own_broker(
    tmp_path: Path, testify: Callable[[str, Callable[[], str]], None]
) -> Iterator[Callable[..., Broker]]:
    """A function that starts a RabbitMQ for this test alone; it takes what `Broker` takes."""
    brokers: list[Broker] = []

    def start(version: str = VERSION, **options: Any) -> Broker:
        number = len(brokers) + 1
        broker = Broker(tmp_path / f"rabbitmq-{number}", version, **options)
        brokers.append(broker)
        testify(f"rabbitmq {number}", lambda: broker.logs[-4000:])
        broker.start()
        return broker

    yield start
    for broker in brokers:
        broker.close()


@pytest.fixture
def client(broker: Broker) -> Iterator[Client]:
    """A connection to the virtual host of the test."""
    with Client(broker.url) as client:
        yield client


@pytest.fixture
def peer() -> Iterator[Callable[..., Peer]]:
    """A function that starts a scripted AMQP peer; it takes what `Peer` takes."""
    peers: list[Peer] = []

    def start(**options: Any) -> Peer:
        peers.append(Peer(**options))
        return peers[-1]

    yield start
    for started in peers:
        started.close()


@pytest.fixture
def wire(broker: Broker) -> Iterator[Wire]:
    """A wire to the broker that can be slow, held and cut: `wire.url`."""
    wire = Wire(broker.url)
    yield wire
    wire.close()


@pytest.fixture
def daemon(
    tmp_path: Path,
    request: pytest.FixtureRequest,
    testify: Callable[[str, Callable[[], str]], None],
) -> Iterator[Callable[..., Daemon]]:
    """A function that starts the daemon: `daemon(config_text, instance="1", **options)`.

    The options are those of `Daemon`. Whatever still runs at the test's end is stopped; a daemon
    that leaves a process behind fails the test.
    """
    daemons: list[Daemon] = []

    def start(config: str, instance: str = "1", **options: Any) -> Daemon:
        path = tmp_path / f"workerd-{instance}.toml"
        path.write_text(config)
        daemon = Daemon(path, instance, **options)
        daemons.append(daemon)
        testify(f"workerd {instance}", daemon.transcript)
        return daemon

    yield start
    is_failed = request.node.stash.get(failed, False)
    try:
        for daemon in daemons:
            if not is_failed and daemon.running:
                daemon.stop()
    finally:
        for daemon in daemons:
            daemon.close()
        left = _left_behind()
    assert is_failed or not left, f"workerd left behind: {left}"


def _left_behind() -> list[str]:
    """Kill every orphan that does not end by itself, and return their command lines."""
    try:
        until(lambda: not processes.strays(), "no strays", ORPHANS_MAY_LIVE)
    except AssertionError:
        strays = processes.strays()
        commands = [processes.command_line(pid) for pid in strays]
        processes.kill_trees(strays)
        return commands
    return []


@pytest.fixture
def program() -> Iterator[Callable[..., Program]]:
    """A function that starts a program; it takes what `Program` takes. Ended with the test."""
    programs: list[Program] = []

    def start(*command: str | Path, **options: Any) -> Program:
        programs.append(Program(command, **options))
        return programs[-1]

    yield start
    for each in programs:
        each.close()


@pytest.fixture
def oracle(tmp_path: Path) -> Iterator[Oracle]:
    """The judge of what ran: `oracle.command()` is the handler, `oracle.check(ids)` the verdict."""
    folder = tmp_path / "oracle"
    folder.mkdir()
    oracle = Oracle(str(folder))
    yield oracle
    oracle.release()


@pytest.fixture
def network() -> Iterator[Network]:
    """Two network namespaces joined by a cable that can be broken."""
    network = Network()
    yield network
    network.close()


@pytest.fixture(scope="session")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Debian package."""
    base = tmp_path_factory.getbasetemp()
    # One for all processes of the test run.
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    return system.build(shared / "package")


@pytest.fixture(scope="module")
def booted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    machine = Machine(tmp_path_factory.mktemp("machine"), system.RELEASES[VERSION])
    yield machine
    machine.close()


@pytest.fixture
def machine(
    booted: Machine, testify: Callable[[str, Callable[[], str]], None]
) -> Iterator[Machine]:
    """A Debian with RabbitMQ that has booted, for the tests of one file. No workerd runs in it."""
    since = booted.mark()
    testify("journal", lambda: booted.transcript(since))
    yield booted
    booted.tidy()


@pytest.fixture
def journald() -> Iterator[Journald]:
    """A journal of the test's own, not yet started."""
    journald = Journald()
    yield journald
    journald.close()
