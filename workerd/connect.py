"""What `workerd check --connect` finds: login, permissions and queues at each broker.

It takes the steps that a starting daemon takes, so it declares what is missing and may be
declared. It reads no message and sends none that could arrive.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping

from workerd import topology
from workerd.broker import Channel, Link
from workerd.errors import Kind, Trouble, Unroutable
from workerd.job import Message
from workerd.options import Queue, Settings
from workerd.url import BrokerURL

#: No queue can have this name, so what is sent to it comes back.
_NOWHERE = "workerd.check.nowhere"


def check_broker(settings: Settings, environ: Mapping[str, str] = os.environ) -> list[str]:
    """Every problem at every configured broker, one line each."""
    return asyncio.run(_check_all(settings, environ))


async def _check_all(settings: Settings, environ: Mapping[str, str]) -> list[str]:
    found = await asyncio.gather(
        *(_check_one(settings, url, environ) for url in settings.broker.urls)
    )
    return [problem for problems in found for problem in problems]


async def _check_one(settings: Settings, url: BrokerURL, environ: Mapping[str, str]) -> list[str]:
    try:
        link = await Link.open(url, settings.broker, "workerd check", environ)
    except Trouble as trouble:
        return [f"{url}: {trouble}{_login_remedy(trouble)}"]
    problems = []
    try:
        problems += await _check_topology(link, "the delay levels", topology.delay_levels())
        for name in settings.worker.queues:
            problems += await _check_queue(link, settings.queues[name])
        problems += await _check_publishing(link)
    except Trouble as trouble:
        problems.append(str(trouble))
    finally:
        await link.close(timeout=2.0)
    return [f"{url}: {problem}" for problem in problems]


async def _check_queue(link: Link, queue: Queue) -> list[str]:
    problems = []
    refusals: list[Trouble] = []
    if queue.declare != "wait":
        # What exists with other arguments is used as it is.
        refusals = await link.declare([topology.work_queue(queue)])
    try:
        channel = await link.channel()
        ready, _ = await channel.count(queue.name)
        # An empty queue is asked for a message, which needs the right to read it; from a
        # full one a message would have to be taken and given back.
        if ready == 0:
            await channel.peek(queue.name)
        await channel.close()
    except Trouble as trouble:
        missing = trouble.kind is Kind.MISSING
        if not (missing and queue.declare == "wait"):
            # That it is missing says less than why it could not be declared.
            why = refusals[0] if missing and refusals else trouble
            problems.append(f"queue {queue.name}: {why}")
    what = f"the dead letters and due jobs of {queue.name}"
    steps = [*topology.dead_letters(queue), *topology.due_jobs(queue)]
    return problems + await _check_topology(link, what, steps)


async def _check_topology(link: Link, what: str, steps: topology.Steps) -> list[str]:
    """Whether these can be declared, or at least are there."""
    problems = []
    steps = list(steps)
    for objection in await link.declare(steps):
        if objection.kind is Kind.CONFLICT:
            continue
        missing = [
            step.name
            for step in steps
            if isinstance(step, topology.DeclareQueue) and not await _exists(link, step.name)
        ]
        if missing:
            problems.append(
                f"{what}: {objection}; missing: {', '.join(missing)}; "
                "declare them with an administrator's URL, or grant the right to configure them"
            )
    return problems


async def _exists(link: Link, queue: str) -> bool:
    try:
        channel = await link.channel()
        await channel.count(queue)
        await channel.close()
    except Trouble as trouble:
        if trouble.kind is Kind.AWAY:
            raise
        return False
    return True


async def _check_publishing(link: Link) -> list[str]:
    channel: Channel = await link.channel()
    try:
        await channel.confirm()
        await channel.publish("", _NOWHERE, Message(message_id="check"))
    except Unroutable:
        await channel.close()
    except Trouble as trouble:
        if trouble.kind is Kind.AWAY:
            raise
        return [f"publishing: {trouble}; grant the right to write to the exchange amq.default"]
    return []


def _login_remedy(trouble: Trouble) -> str:
    if trouble.kind is not Kind.REFUSED:
        return ""
    return (
        "; check the user, its password and its rights to the vhost (rabbitmqctl list_permissions)"
    )
