"""What pika is told of a broker: address, login, TLS, limits."""

from __future__ import annotations

import ssl
from collections.abc import Mapping

import pika
import pika.exceptions

from workerd import __version__
from workerd.broker.errors import CONNECT_TIMEOUT
from workerd.config.model import TLS, Broker
from workerd.config.passwords import password_for
from workerd.config.url import BrokerURL
from workerd.errors import BrokerError, ErrorKind, SettingsError


def parameters(
    url: BrokerURL, broker: Broker, name: str, environ: Mapping[str, str]
) -> pika.ConnectionParameters:
    try:
        password = password_for(broker, url, environ).reveal()
        # Loading the system's authorities takes longer than all the rest of a `submit`.
        tls = _tls_options(url, broker.tls) if url.tls else None
    except (SettingsError, OSError) as error:
        raise BrokerError(ErrorKind.REFUSED, str(error)) from error
    heartbeat = max(1, round(broker.heartbeat))
    return pika.ConnectionParameters(
        host=url.host,
        port=url.port,
        virtual_host=url.vhost,
        credentials=pika.PlainCredentials(url.user, password),
        heartbeat=heartbeat,
        ssl_options=tls,
        connection_attempts=1,
        socket_timeout=CONNECT_TIMEOUT,
        stack_timeout=CONNECT_TIMEOUT,
        # Never `capabilities` here: pika would announce these instead of its own, and the
        # broker would send neither confirms nor cancel notifications.
        client_properties={"connection_name": name, "product": "workerd", "version": __version__},
        # A write into a dead network ends when the heartbeat would have noticed.
        tcp_options={"TCP_USER_TIMEOUT": heartbeat * 2000, "TCP_NODELAY": 1},
    )


def _tls_options(url: BrokerURL, tls: TLS) -> pika.SSLOptions:
    """Raises OSError, which says in which file the fault is."""
    files = [tls.ca_file]
    try:
        context = ssl.create_default_context(cafile=str(tls.ca_file) if tls.ca_file else None)
        if tls.cert_file:
            files = [tls.cert_file, tls.key_file]
            context.load_cert_chain(tls.cert_file, tls.key_file)
    except OSError as error:
        names = " or ".join(str(file) for file in files if file)
        raise OSError(f"{names}: {error.strerror}") from error
    return pika.SSLOptions(context, tls.server_name or url.host)
