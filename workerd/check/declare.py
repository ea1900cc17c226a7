"""`workerd setup`: every queue and exchange of the configuration, declared by an administrator."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from workerd.aio import complete
from workerd.broker.connection import Connection
from workerd.config.model import Settings
from workerd.core import topology
from workerd.core.topology import BindExchange, BindQueue, DeclareExchange, DeclareQueue, Step
from workerd.errors import EX_NOPERM, EX_OK, BrokerError, ErrorKind
from workerd.output import print_json, print_line

State = Literal["declared", "there", "bound", "differs", "failed"]


@dataclass(frozen=True, slots=True)
class Result:
    """The state after one step; ``text`` has the broker's words where the broker objected."""

    step: Step
    state: State
    text: str = ""

    @property
    def name(self) -> str:
        """The name of the step's object, for people."""
        match self.step:
            case DeclareQueue(name):
                return f"queue {name}"
            case DeclareExchange(name):
                return f"exchange {name}"
            case BindQueue(queue, exchange):
                return f"binding of queue {queue} to {exchange}"
            case BindExchange(destination, source):
                return f"binding of exchange {destination} to {source}"


def parts(settings: Settings) -> Iterator[tuple[str, topology.Steps]]:
    """All that the configured queues need, part by part, in the order in which it can be made."""
    yield "delay levels", topology.delay_levels()
    for queue in settings.queues.values():
        # First what its messages go to.
        yield f"dead letters of {queue.name}", topology.dead_letters(queue)
        if queue.declare != "wait":
            yield f"queue {queue.name}", [topology.work_queue(queue)]
        yield f"due jobs of {queue.name}", topology.due_jobs(queue)


async def take(connection: Connection, steps: topology.Steps) -> list[Result]:
    """Take each step, whatever the others come to. Raises BrokerError when the broker is away."""
    return [await _take(connection, step) for step in steps]


async def _take(connection: Connection, step: Step) -> Result:
    try:
        was_there = await _exists(connection, step)
        channel = await connection.channel()
        await channel.declare(step)
        await channel.close()
    except BrokerError as error:
        if error.kind is ErrorKind.AWAY:
            raise
        return Result(step, "differs" if error.kind is ErrorKind.CONFLICT else "failed", str(error))
    if isinstance(step, BindQueue | BindExchange):
        return Result(step, "bound")
    return Result(step, "there" if was_there else "declared")


async def _exists(connection: Connection, step: Step) -> bool:
    """Whether a queue or an exchange is there. The broker does not say so of a binding."""
    if isinstance(step, BindQueue | BindExchange):
        return False
    channel = await connection.channel()
    try:
        await channel.find(step)
    except BrokerError as error:
        if error.kind is ErrorKind.MISSING:
            return False
        raise
    await channel.close()
    return True


def setup(settings: Settings, environ: Mapping[str, str], as_json: bool) -> int:
    """Declare everything, print what is there then; returns the exit status.

    Raises BrokerError.
    """
    return complete(_setup(settings, environ, as_json))


async def _setup(settings: Settings, environ: Mapping[str, str], as_json: bool) -> int:
    # Any of them: they are of one cluster.
    connection = await Connection.to_any(settings.broker, "workerd setup", environ)
    failed = False
    try:
        for part, steps in parts(settings):
            results = await take(connection, steps)
            failed = failed or any(result.state == "failed" for result in results)
            _print_results(part, results, as_json)
    finally:
        await connection.close(timeout=2.0)
    return EX_NOPERM if failed else EX_OK


def _print_results(part: str, results: list[Result], as_json: bool) -> None:
    if as_json:
        for result in results:
            line = {"part": part, "object": result.name, "state": result.state}
            print_json({**line, "text": result.text or None})
        return
    states = Counter(result.state for result in results)
    counts = [
        f"{states[state]} {state}" for state in ("declared", "there", "bound") if states[state]
    ]
    if counts:
        print_line(f"{part}: {', '.join(counts)}")
    for result in results:
        if result.text:
            print_line(f"{part}: {result.state}: {result.name}: {result.text}")
