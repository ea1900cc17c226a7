"""What `workerd check --connect` finds: login, permissions and queues at each broker.

It takes the steps that a starting daemon takes, so it declares what is missing and may be
declared. It reads no message and sends none that could arrive.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping

from workerd.aio import complete
from workerd.broker.connection import Connection
from workerd.config.model import Queue, Settings
from workerd.config.url import BrokerURL
from workerd.core import topology
from workerd.core.job import Message
from workerd.errors import BrokerError, ErrorKind, Unroutable

#: No queue can have this name, so what is sent to it comes back.
_NOWHERE = "workerd.check.offline.nowhere"
#: How many missing queues a line names.
_NAMED = 3


def check_broker(settings: Settings, environ: Mapping[str, str] = os.environ) -> list[str]:
    """Every problem at every configured broker, one line each."""
    return complete(_check_all(settings, environ))


async def _check_all(settings: Settings, environ: Mapping[str, str]) -> list[str]:
    found = await asyncio.gather(
        *(_check_one(settings, url, environ) for url in settings.broker.urls)
    )
    return [problem for problems in found for problem in problems]


async def _check_one(settings: Settings, url: BrokerURL, environ: Mapping[str, str]) -> list[str]:
    try:
        connection = await Connection.open(url, settings.broker, "workerd check", environ)
    except BrokerError as error:
        return [f"{url}: {error}{_login_remedy(url, error)}"]
    problems = connection.shortages(len(settings.worker.queues))
    try:
        problems += await _check_topology(connection, "the delay levels", topology.delay_levels())
        for name in settings.worker.queues:
            problems += await _check_queue(connection, settings.queues[name])
        problems += await _check_publishing(connection)
    except BrokerError as error:
        problems.append(str(error))
    finally:
        await connection.close(timeout=2.0)
    return [f"{url}: {problem}" for problem in problems]


def _login_remedy(url: BrokerURL, error: BrokerError) -> str:
    if error.code == 403:
        return "; check the user, and its password in broker.urls or broker.password_file"
    if error.code == 530 and "not found" in str(error):
        return f"; create it with rabbitmqctl add_vhost {url.vhost}"
    if error.code == 530:
        return f"; allow it with rabbitmqctl set_permissions -p {url.vhost} {url.user}"
    return ""


async def _check_queue(connection: Connection, queue: Queue) -> list[str]:
    problems = []
    if queue.declare != "wait":
        what = f"queue {queue.name}"
        problems += await _check_topology(connection, what, [topology.work_queue(queue)])
    problems += await _check_reading(connection, queue.name)
    what = f"the dead letters and due jobs of {queue.name}"
    steps = [*topology.dead_letters(queue), *topology.due_jobs(queue)]
    problems += await _check_topology(connection, what, steps)
    return problems + await _check_reading(connection, topology.due(queue.name))


async def _check_reading(connection: Connection, name: str) -> list[str]:
    if await _exists(connection, name):
        try:
            kind = await (await connection.channel()).kind_of(name)
        except BrokerError as error:
            return [f"queue {name}: {_refusal(error, 'read', name)}"]
        if problem := topology.no_work_queue(name, kind):
            return [problem]
    return []


async def _check_topology(connection: Connection, what: str, steps: topology.Steps) -> list[str]:
    """Whether these can be declared, or at least are there."""
    problems = []
    steps = list(steps)
    for objection in await connection.declare(steps):
        # What exists with other arguments is used as it is.
        if objection.kind is ErrorKind.CONFLICT:
            continue
        missing = [
            step.name
            for step in steps
            if isinstance(step, topology.DeclareQueue) and not await _exists(connection, step.name)
        ]
        if missing:
            names = ", ".join(missing[:_NAMED]) + (", …" if len(missing) > _NAMED else "")
            problems.append(
                f"{what}: {objection}; missing: {names}; have an administrator declare them, "
                "or grant the rights to configure, write and read them"
            )
    return problems


async def _exists(connection: Connection, queue: str) -> bool:
    try:
        channel = await connection.channel()
        await channel.count(queue)
        await channel.close()
    except BrokerError as error:
        if error.kind is not ErrorKind.MISSING:
            raise
        return False
    return True


async def _check_publishing(connection: Connection) -> list[str]:
    """Whether dead letters, and jobs that are to come back later, can be published."""
    problems = []
    for exchange in ("", topology.level_name(0)):
        channel = await connection.channel()
        try:
            await channel.confirm()
            await channel.publish(exchange, _NOWHERE, Message(message_id="check"))
        except Unroutable:
            await channel.close()
        except BrokerError as error:
            # A missing exchange is among the problems of the delay levels already.
            if error.kind is not ErrorKind.MISSING:
                text = _refusal(error, "write", exchange or "amq.default")
                problems.append(f"publishing: {text}")
    return problems


def _refusal(error: BrokerError, right: str, name: str) -> str:
    """The broker's words, and what to do about them. Raises BrokerError when it is away."""
    if error.kind is ErrorKind.AWAY:
        raise error
    return f"{error}; grant the right to {right} {name} with rabbitmqctl set_permissions"
