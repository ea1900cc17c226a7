"""What pika is told of a broker: address, login, TLS, limits."""

from __future__ import annotations

import errno
import ssl
from collections.abc import Mapping

import pika

from workerd import __version__
from workerd.broker.errors import CONNECT_TIMEOUT
from workerd.broker.pika_patches import Parameters
from workerd.config.model import TLS, Broker
from workerd.config.passwords import password_for
from workerd.config.url import BrokerURL
from workerd.errors import BrokerError, ErrorKind, SettingsError


def parameters(url: BrokerURL, broker: Broker, name: str, environ: Mapping[str, str]) -> Parameters:
    """Put together what pika needs; ``name`` is what the broker's tools show.

    Reads the password and the certificates now. Raises BrokerError(REFUSED) when one of them
    cannot be read.
    """
    try:
        password = password_for(broker, url, environ).reveal()
        # Loading the system's authorities takes longer than all the rest of a `submit`.
        tls = None
        if url.tls:
            tls = pika.SSLOptions(tls_context(broker.tls), broker.tls.server_name or url.host)
    except (SettingsError, OSError) as error:
        raise BrokerError(ErrorKind.REFUSED, str(error)) from error
    heartbeat = max(1, round(broker.heartbeat))
    return Parameters(
        host=url.host,
        port=url.port,
        virtual_host=url.vhost,
        credentials=pika.PlainCredentials(url.user, password),
        heartbeat=heartbeat,
        ssl_options=tls,
        connection_attempts=1,
        stack_timeout=CONNECT_TIMEOUT,
        # Never `capabilities` here: pika would announce these instead of its own, and the
        # broker would send neither confirms nor cancel notifications.
        client_properties={"connection_name": name, "product": "workerd", "version": __version__},
        # A write into a dead network ends when the heartbeat would have noticed.
        tcp_options={"TCP_USER_TIMEOUT": heartbeat * 2000, "TCP_NODELAY": 1},
    )


def tls_context(tls: TLS) -> ssl.SSLContext:
    """Read the certificates and the key, as they are now. Raises OSError, with the file's name."""
    file = tls.ca_file
    try:
        context = ssl.create_default_context(cafile=str(file) if file else None)
        if tls.cert_file:
            file = tls.cert_file
            file.open("rb").close()  # OpenSSL's error does not say which of the two is missing
            file = tls.key_file or file
            file.open("rb").close()
            context.load_cert_chain(tls.cert_file, tls.key_file, password=_no_passphrase)
    except ssl.SSLError as error:
        # OpenSSL's own words are for its developers, and do not say in which file.
        if file == tls.ca_file:
            text = f"{file}: holds no certificate in PEM form"
        elif error.reason == "KEY_VALUES_MISMATCH":
            text = f"{file}: the key belongs to another certificate than {tls.cert_file}"
        else:
            text = f"{tls.cert_file} or {file}: holds no certificate, or no key, in PEM form"
        raise OSError(text) from error
    except OSError as error:
        raise OSError(f"{file}: {error.strerror}") from error
    return context


def _no_passphrase() -> str:
    """Stand in for OpenSSL's own prompt, which would wait for whoever sits at the terminal."""
    text = "the key has a passphrase, which nobody is there to type: openssl pkey -in OLD -out NEW"
    raise OSError(errno.EACCES, text)
