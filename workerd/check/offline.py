"""What `workerd check` finds without a broker: programs, functions and time limits.

Checking a Python function imports the application's code, so the command line calls
`drop_to_service_user` first.
"""

import os
import pwd
from collections.abc import Iterator

from workerd.check.programs import Environ, check_programs
from workerd.config.model import Handler, Settings
from workerd.config.permissions import group_id, service_account
from workerd.config.text import toml
from workerd.units import format_duration


def check(settings: Settings, environ: Environ = os.environ, run: bool = True) -> list[str]:
    """Every problem that shows without a broker, one line each; ``run``: functions are imported."""
    problems = []
    operators = settings.control.operators
    if operators is not None and group_id(operators) is None:
        where = settings.where("control", "operators")
        problems.append(f"{where}: there is no group {toml(operators)}: groupadd {operators}")
    problems += _unknown_users(settings)
    problems += _unreadable_password(settings)
    problems += _unusable_tls(settings)
    problems += [
        _outlasts_the_broker(settings, handler)
        for handler in settings.handlers.values()
        if handler.timeout >= settings.broker.ack_timeout
    ]
    return problems + check_programs(settings, environ, run)


def _unknown_users(settings: Settings) -> Iterator[str]:
    for name in settings.worker.trust_users:
        try:
            pwd.getpwnam(name)
        except KeyError:
            yield f"{settings.where('worker', 'trust_users')}: there is no user {toml(name)}"


def _unreadable_password(settings: Settings) -> Iterator[str]:
    file = settings.broker.password_file
    account = service_account()
    if file is None or not _is_for_us():
        return
    try:
        file.open("rb").close()
    except OSError as error:
        name = account.pw_name if account else "whoever runs the daemon"
        why = f"{error.strerror}; {name} has to read it"
        yield f"{settings.where('broker', 'password_file')}: {file}: {why}"


def _unusable_tls(settings: Settings) -> Iterator[str]:
    if not any(url.tls for url in settings.broker.urls) or not _is_for_us():
        return
    from workerd.broker.parameters import tls_context

    try:
        tls_context(settings.broker.tls)
    except OSError as error:
        yield f"{settings.where('broker', 'tls')}: {error}"


def _is_for_us() -> bool:
    """Whether this user's daemon would read the secrets, and not only that of the service."""
    account = service_account()
    return account is None or account.pw_uid == os.geteuid()


def _outlasts_the_broker(settings: Settings, handler: Handler) -> str:
    where = settings.where("handlers", handler.name, "timeout")
    limit = format_duration(settings.broker.ack_timeout)
    return (
        f"{where}: {format_duration(handler.timeout)} is not below broker.ack_timeout, {limit}: "
        "the broker would take the job back while it runs; shorten it, or raise RabbitMQ's "
        "consumer_timeout and set ack_timeout to the same"
    )
