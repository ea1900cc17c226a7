"""The configuration files, read and laid over each other into one `Settings`; start at `load`."""

import grp
import os
import pwd
import stat
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import tomli

from workerd.config.fields import build, merge, read
from workerd.config.model import Broker, Queue, Settings
from workerd.config.passwords import exposed
from workerd.config.permissions import objections, readable_by_all
from workerd.config.text import dotted, toml
from workerd.config.validate import broken_rules
from workerd.errors import SettingsError
from workerd.paths import is_instance

ETC = Path("/etc/workerd")
URL_VARIABLE = "WORKERD_BROKER_URL"

Layer = dict[str, Any]


def load(
    config: Path | None = None,
    instance: str = "1",
    environ: Mapping[str, str] = os.environ,
    etc: Path = ETC,
) -> Settings:
    """Read the configuration of an instance, or `config` instead of all its files.

    Later files override earlier ones key by key: `workerd.toml`, `conf.d/*.toml` in order,
    `instances/<instance>.toml`, and WORKERD_BROKER_URL last. Only `config` has to exist.
    Raises SettingsError with every problem of every file.
    """
    settings, problems = load_with_problems(config, instance, environ, etc)
    if problems:
        raise SettingsError(*problems)
    return settings


def load_with_problems(
    config: Path | None = None,
    instance: str = "1",
    environ: Mapping[str, str] = os.environ,
    etc: Path = ETC,
) -> tuple[Settings, list[str]]:
    """As `load`; what is wrong has its default in the settings, and is among the problems."""
    problems: list[str] = []
    if not is_instance(instance):
        expected = '1 to 32 letters, digits and "_", "." or "-"'
        problems.append(f"instance name {toml(instance)}: expected {expected}")
        instance = "1"
    if config is not None:
        layers = {config: _read_file(config, problems)}
    else:
        layers = _read_all(etc, instance, problems)

    merged: Layer = {}
    origins: dict[str, Path | str] = {}
    for file, layer in layers.items():
        merge(merged, layer, origins, file)
    if environ.get(URL_VARIABLE):
        layer = _read_environment(environ[URL_VARIABLE], problems)
        merge(merged, layer, origins, URL_VARIABLE)

    settings = _complete(build(Settings, merged, origins=origins, files=tuple(layers)))
    problems += broken_rules(settings)
    # The file need not be there yet, nor be open to everyone who reads the configuration.
    password_file = settings.broker.password_file
    with suppress(OSError):
        if password_file and readable_by_all(password_file.stat().st_mode):
            problems.append(exposed(password_file))
    return settings, problems


def _read_all(etc: Path, instance: str, problems: list[str]) -> dict[Path, Layer]:
    """The files of an instance, in the order in which they override each other."""
    main, own = etc / "workerd.toml", etc / "instances" / f"{instance}.toml"
    dropped = _dropped_in(etc / "conf.d", problems)
    layers = {
        file: _read_file(file, problems)
        for file in (main, *dropped, own)
        if file in dropped or os.path.lexists(file)
    }
    problems += _configured_twice({file: layers[file] for file in dropped})
    return layers


def _read_file(file: Path, problems: list[str]) -> Layer:
    """Read what one file sets; everything that is wrong with the file goes to `problems`."""
    try:
        with file.open("rb") as stream:
            mode = os.fstat(stream.fileno()).st_mode
            content = stream.read()
    except OSError as error:
        problems.append(f"{file}: {error.strerror}{_who_may_read(file)}")
        return {}
    problems += [f"{file}: {reason}" for reason in objections(file)]
    try:
        table = tomli.loads(content.decode())
    except ValueError as error:
        problems.append(f"{file}: not valid TOML: {error}")
        return {}
    layer = read(
        Settings, table, (), lambda path, text: problems.append(f"{file}: {dotted(path)}: {text}")
    )
    if readable_by_all(mode) and _holds_a_password(layer):
        problems.append(exposed(file))
    return layer


def _who_may_read(file: Path) -> str:
    """What to do for the right to read a file that its group can read."""
    try:
        status = file.stat()
        if os.access(file, os.R_OK) or not status.st_mode & stat.S_IRGRP:
            return ""
        group = grp.getgrgid(status.st_gid).gr_name
        user = pwd.getpwuid(os.geteuid()).pw_name
    except (OSError, KeyError):
        return ""
    return f"; its group can read it, so ask an administrator: adduser {user} {group}"


def _read_environment(urls: str, problems: list[str]) -> Layer:
    table = {"broker": {"urls": [url.strip() for url in urls.split(",")]}}
    return read(Settings, table, (), lambda _, text: problems.append(f"{URL_VARIABLE}: {text}"))


def _dropped_in(directory: Path, problems: list[str]) -> list[Path]:
    """The files of conf.d in order, without the hidden ones that editors leave behind."""
    try:
        names = os.listdir(directory)
    except FileNotFoundError:
        return []
    except OSError as error:
        problems.append(f"{directory}: {error.strerror}")
        return []
    visible = (name for name in names if name.endswith(".toml") and not name.startswith("."))
    return [directory / name for name in sorted(visible)]


def _configured_twice(layers: Mapping[Path, Layer]) -> list[str]:
    """Find handlers and queues that two files of conf.d both configure: their packages clash."""
    problems = []
    first: dict[str, Path] = {}
    for file, layer in layers.items():
        for table in ("queues", "handlers"):
            for name in layer.get(table, {}):
                place = dotted((table, name))
                if first.setdefault(place, file) != file:
                    problems.append(f"{file}: {place}: is already in {first[place]}")
    return problems


def _complete(settings: Settings) -> Settings:
    """Add what needs no words in a file: the queue `default`, and which queues to consume."""
    queues = dict(settings.queues)
    wanted = not queues or any(entry.queue == "default" for entry in settings.handlers.values())
    if wanted and "default" not in queues:
        queues["default"] = Queue("default")
    consumed = settings.worker.queues or tuple(queues)
    return replace(settings, queues=queues, worker=replace(settings.worker, queues=consumed))


def _holds_a_password(layer: Layer) -> bool:
    broker = build(Broker, layer.get("broker", {}))
    passwords = [(url.user, url.password.reveal()) for url in broker.urls if url.password]
    if broker.management_url is not None:
        parts = urlsplit(broker.management_url.reveal())
        passwords += [(parts.username or "", parts.password)] if parts.password else []
    # RabbitMQ lets guest in from its own host alone, and everybody knows that password.
    return any(entry != ("guest", "guest") for entry in passwords)
