"""What must hold between settings, once each of them is right on its own."""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import get_args

from workerd.config.model import UNUSED, Handler, HandlerKind, Queue, Settings
from workerd.config.text import did_you_mean, toml

Problems = Iterator[str]


def broken_rules(settings: Settings) -> Problems:
    """One line for every rule that the configuration as a whole breaks."""
    tls = settings.broker.tls
    if tls.key_file and not tls.cert_file:
        yield f"{settings.where('broker', 'tls', 'key_file')}: needs a cert_file that it belongs to"
    where = settings.where("worker", "queues")
    for name, count in Counter(settings.worker.queues).items():
        if name not in settings.queues:
            yield f"{where}: {_unknown('queue', name, settings.queues)}"
        if count > 1:
            yield f"{where}: {toml(name)} is listed {count} times"
    for queue in settings.queues.values():
        yield from _queue(settings, queue)
    for handler in settings.handlers.values():
        yield from _handler(settings, handler)


def _queue(settings: Settings, queue: Queue) -> Problems:
    def where(key: str) -> str:
        return settings.where("queues", queue.name, key)

    default = queue.default_handler
    if default is not None and default not in settings.handlers:
        yield f"{where('default_handler')}: {_unknown('handler', default, settings.handlers)}"
    if queue.max_priority is not None and queue.type != "classic":
        yield f'{where("max_priority")}: only a queue of type = "classic" has a max_priority'
    if queue.declare != "create":
        for key in ("max_length", "max_priority"):
            if getattr(queue, key) is not None:
                yield f'{where(key)}: has no effect unless declare = "create"'


def _handler(settings: Settings, handler: Handler) -> Problems:
    def where(key: str) -> str:
        return settings.where("handlers", handler.name, key)

    def given(key: str) -> bool:
        # By its origin, not its value: one that was refused has been reported already.
        return settings.origin("handlers", handler.name, key) is not None

    kinds: list[HandlerKind] = [key for key in get_args(HandlerKind) if given(key)]
    if len(kinds) == 1:
        for key in filter(given, sorted(UNUSED[kinds[0]])):
            yield f"{where(key)}: has no effect on a {kinds[0]} handler"
    else:
        several = f"has {' and '.join(kinds)}" if kinds else "has none of them"
        here = settings.where("handlers", handler.name)
        yield f"{here}: needs one of command, python and stream, {several}"
    if handler.queue not in settings.queues:
        yield f"{where('queue')}: {_unknown('queue', handler.queue, settings.queues)}"
    retry = handler.retry
    if retry.attempts > retry.max_attempts:
        here = settings.where("handlers", handler.name, "retry", "attempts")
        limit = retry.max_attempts
        yield f"{here}: expected at most max_attempts, {limit}, found {retry.attempts}"


def _unknown(what: str, name: str, known: Mapping[str, object]) -> str:
    return f"no {what} {toml(name)} is configured{did_you_mean(name, known)}"
