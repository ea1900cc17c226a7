"""TLS: broker and daemon prove who they are, and what is wrong with a proof is told."""

from __future__ import annotations

import base64
import contextlib
import shutil
import socket
import ssl
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.harness.amqp import Client
from tests.harness.broker import Broker
from tests.harness.daemon import Daemon
from tests.harness.oracle import Oracle
from tests.harness.peer import Peer
from tests.harness.tables import config
from tests.harness.waiting import TIMEOUT

StartBroker = Callable[..., Broker]
StartDaemon = Callable[..., Daemon]
Serve = Callable[[ssl.SSLContext | None], Peer]

NEW_KEY = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]


class Authority:
    """A certificate authority of one's own; `file` is what those who trust it need."""

    def __init__(self, folder: Path, name: str = "ca") -> None:
        self._folder = folder
        self.file = folder / f"{name}.pem"
        self._key = folder / f"{name}.key"
        openssl("req", "-x509", *NEW_KEY, "-days", "1", "-subj", f"/CN={name}",
                "-keyout", self._key, "-out", self.file)  # fmt: skip

    def issue(self, name: str, host: str = "localhost", days: int = 1) -> Pair:
        """A new certificate for `host` and its key, in files called `name`, whatever these were."""
        certificate, key = self._folder / f"{name}.pem", self._folder / f"{name}.key"
        request, names = self._folder / "request.pem", self._folder / "names.cnf"
        names.write_text(f"subjectAltName=DNS:{host}\n")
        openssl("req", *NEW_KEY, "-subj", f"/CN={name}", "-keyout", key, "-out", request)
        openssl("x509", "-req", "-in", request, "-CA", self.file, "-CAkey", self._key,
                "-days", days, "-extfile", names, "-out", certificate)  # fmt: skip
        return Pair(certificate, key)


class Pair(NamedTuple):
    """A certificate and its key."""

    certificate: Path
    key: Path

    @property
    def serial(self) -> str:
        return openssl("x509", "-in", self.certificate, "-noout", "-serial").strip().split("=")[1]

    def install(self, installed: Pair) -> None:
        """Copy it to where another one was, which is in use."""
        for new, old in zip(self, installed, strict=True):
            shutil.copy(new, old)


def openssl(*arguments: str | Path | int) -> str:
    command = ["openssl", *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def server(pair: Pair, clients: Authority | None = None) -> ssl.SSLContext:
    """What a broker goes by; `clients` is who vouches for those that may connect."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(*pair)
    if clients:
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(clients.file)
    return context


def at(peer: Peer, host: str = "localhost") -> str:
    return peer.url.replace("amqp://127.0.0.1", f"amqps://{host}")


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


@pytest.fixture
def serve() -> Iterator[Callable[[ssl.SSLContext | None], Peer]]:
    """A function that starts a broker which speaks TLS as this says."""
    peers: list[Peer] = []

    def start(tls: ssl.SSLContext | None) -> Peer:
        peers.append(Peer(tls=tls))
        return peers[-1]

    yield start
    for peer in peers:
        peer.close()


def test_a_broker_that_is_not_trusted_is_told_plainly_and_found_when_the_ca_is_mended(
    tmp_path: Path, daemon: StartDaemon, oracle: Oracle, authority: Authority, serve: Serve
) -> None:
    trusted = tmp_path / "trusted.pem"
    shutil.copy(Authority(tmp_path, "wrong").file, trusted)
    peer = serve(server(authority.issue("broker")))
    settings = {"tls.ca_file": str(trusted), "reconnect_max": "400ms"}
    workerd = daemon(
        config(at(peer), oracle.command(), broker=settings, worker={"ready_wait": "500ms"})
    )
    workerd.wait_ready()
    refused = workerd.wait_event("unreachable", count=2)
    assert refused["text"] == "TLS: unable to get local issuer certificate"
    # Only a human can mend it.
    assert refused["retry_in"] == 0.4
    workerd.wait_notify(
        lambda text: f"STATUS=waiting for broker localhost in 0s: {refused['text']}" in text
    )

    shutil.copy(authority.file, trusted)
    jobs = peer.publish("jobs", "a")
    workerd.wait_event("done")
    oracle.check(jobs)


def test_a_certificate_that_is_its_own_authority_is_told_plainly(
    tmp_path: Path, daemon: StartDaemon, authority: Authority, serve: Serve
) -> None:
    own = Authority(tmp_path, "own")
    peer = serve(server(Pair(own.file, tmp_path / "own.key")))
    workerd = daemon(config(at(peer), ["true"], broker={"tls.ca_file": str(authority.file)}))
    refused = workerd.wait_event("unreachable")
    assert refused["text"].startswith("TLS: self")


def test_a_certificate_for_another_host_is_told_plainly_unless_that_name_is_configured(
    daemon: StartDaemon, oracle: Oracle, authority: Authority, serve: Serve
) -> None:
    peer = serve(server(authority.issue("broker", "rabbit.test")))
    trust = {"tls.ca_file": str(authority.file)}
    refusing = daemon(config(at(peer), ["true"], broker=trust))
    refused = refusing.wait_event("unreachable")
    assert refused["text"].startswith("TLS: Hostname mismatch")

    named = {**trust, "tls.server_name": "rabbit.test"}
    workerd = daemon(config(at(peer), oracle.command(), broker=named), "2")
    jobs = peer.publish("jobs", "a")
    workerd.wait_event("done")
    oracle.check(jobs)


def test_an_expired_certificate_is_told_plainly_and_its_successor_is_trusted(
    daemon: StartDaemon, oracle: Oracle, authority: Authority, serve: Serve
) -> None:
    tls = server(authority.issue("broker", days=-1))
    peer = serve(tls)
    trust = {"tls.ca_file": str(authority.file), "reconnect_max": "400ms"}
    workerd = daemon(config(at(peer), oracle.command(), broker=trust))
    refused = workerd.wait_event("unreachable")
    assert refused["text"] == "TLS: certificate has expired"
    assert refused["retry_in"] == 0.4

    tls.load_cert_chain(*authority.issue("broker"))
    jobs = peer.publish("jobs", "a")
    workerd.wait_event("done")
    oracle.check(jobs)


def test_rotated_certificates_of_both_sides_are_used_at_the_next_connection(
    tmp_path: Path, daemon: StartDaemon, oracle: Oracle, authority: Authority, serve: Serve
) -> None:
    tls = server(authority.issue("broker"), clients=authority)
    peer = serve(tls)
    own = authority.issue("client")
    first = own.serial
    trusted = tmp_path / "trusted.pem"
    shutil.copy(authority.file, trusted)
    files = {"ca_file": trusted, "cert_file": own.certificate, "key_file": own.key}
    settings = {f"tls.{name}": str(path) for name, path in files.items()}
    workerd = daemon(config(at(peer), oracle.command(), broker=settings))
    jobs = peer.publish("jobs", "a")
    workerd.wait_event("done", job_id="a")
    assert set(peer.client_certificates) == {first}
    oracle.hold("b")
    jobs += peer.publish("jobs", "b")
    workerd.wait_event("start", job_id="b")

    successor = Authority(tmp_path, "successor")
    shutil.copy(successor.file, trusted)
    tls.load_cert_chain(*successor.issue("broker"))
    tls.load_verify_locations(successor.file)
    successor.issue("new").install(own)
    peer.drop_connections()
    workerd.wait_event("rejoined")
    oracle.release()
    workerd.wait_event("done", job_id="b")
    assert own.serial != first
    assert set(peer.client_certificates) == {first, own.serial}
    oracle.check(jobs)


@pytest.mark.parametrize("fault", ["none", "expired", "stranger"])
def test_a_broker_that_does_not_take_our_certificate_is_told_plainly(
    tmp_path: Path,
    daemon: StartDaemon,
    oracle: Oracle,
    authority: Authority,
    serve: Serve,
    fault: str,
) -> None:
    peer = serve(server(authority.issue("broker"), clients=authority))
    settings = {"tls.ca_file": str(authority.file), "reconnect_max": "400ms"}
    if fault != "none":
        theirs = authority if fault == "expired" else Authority(tmp_path, "stranger")
        own = theirs.issue("client", days=-1 if fault == "expired" else 1)
        settings |= {"tls.cert_file": str(own.certificate), "tls.key_file": str(own.key)}
    workerd = daemon(config(at(peer), oracle.command(), broker=settings))
    refused = workerd.wait_event("unreachable")
    meaning = {"none": "certificate required", "expired": "expired", "stranger": "unknown ca"}
    assert refused["text"].startswith("TLS: ")
    assert meaning[fault] in refused["text"]
    assert refused["retry_in"] == 0.4

    if fault != "none":
        authority.issue("good").install(own)
        jobs = peer.publish("jobs", "a")
        workerd.wait_event("done")
        oracle.check(jobs)


def test_a_certificate_file_that_is_missing_or_broken_is_told_plainly_and_read_again(
    tmp_path: Path, daemon: StartDaemon, oracle: Oracle, authority: Authority, serve: Serve
) -> None:
    peer = serve(server(authority.issue("broker")))
    trusted = tmp_path / "trusted.pem"
    trusted.write_text("")
    settings = {"tls.ca_file": str(trusted), "reconnect_max": "400ms"}
    workerd = daemon(config(at(peer), oracle.command(), broker=settings))
    refused = workerd.wait_event("unreachable")
    assert str(trusted) in refused["text"]
    assert refused["retry_in"] == 0.4

    # Half of it, as somebody writes it.
    whole = authority.file.read_text()
    trusted.write_text(whole[: len(whole) // 2])
    workerd.wait_event("unreachable", since=workerd.mark(), text=lambda text: str(trusted) in text)
    trusted.unlink()
    missing = workerd.wait_event("unreachable", text=lambda text: "No such file" in text)
    assert str(trusted) in missing["text"]

    trusted.write_text(whole)
    jobs = peer.publish("jobs", "a")
    workerd.wait_event("done")
    oracle.check(jobs)


def test_a_broker_without_tls_is_never_spoken_to_without_it(
    daemon: StartDaemon, authority: Authority
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(TIMEOUT)
        url = f"amqps://guest:guest@localhost:{listener.getsockname()[1]}"
        settings = {"tls.ca_file": str(authority.file)}
        workerd = daemon(config(url, ["true"], broker=settings))
        for _ in range(4):
            connection, _ = listener.accept()
            with connection:
                connection.settimeout(TIMEOUT)
                # A TLS handshake, and nothing of AMQP.
                assert connection.recv(1 << 16)[:2] == b"\x16\x03"
                connection.sendall(b"AMQP\x00\x00\x09\x01")
                with contextlib.suppress(ConnectionResetError):
                    rest = connection.recv(1 << 16)
                    assert b"AMQP" not in rest
                    assert b"guest" not in rest
        refused = workerd.wait_event("unreachable")
        assert refused["text"].startswith("TLS: wrong version number")
        assert workerd.stop() == 0


def test_rabbitmq_with_certificates_on_both_sides_is_worked_with(
    own_broker: StartBroker, daemon: StartDaemon, oracle: Oracle, authority: Authority
) -> None:
    theirs, own = authority.issue("broker"), authority.issue("client")
    # In the configuration itself, since not every broker sees these files.
    options = [
        "{verify, verify_peer}",
        "{fail_if_no_peer_cert, true}",
        f"{{cacerts, [{binary(authority.file)}]}}",
        f"{{cert, {binary(theirs.certificate)}}}",
        f"{{key, {{'PrivateKeyInfo', {binary(theirs.key)}}}}}",
    ]
    broker = own_broker(tls=f"[{', '.join(options)}]")
    files = {"ca_file": authority.file, "cert_file": own.certificate, "key_file": own.key}
    settings = {f"tls.{name}": str(path) for name, path in files.items()}
    url = broker.url.replace("amqp:", "amqps:").replace(
        f"127.0.0.1:{broker.port}", f"localhost:{broker.amqps_port}"
    )
    workerd = daemon(config(url, oracle.command(), broker=settings))
    workerd.wait_ready()
    with Client(broker.url) as client:
        jobs = client.publish_jobs("jobs", ["a"])
    workerd.wait_event("done")
    broker.await_depth("jobs")
    oracle.check(jobs)


def binary(file: Path) -> str:
    """What a PEM file holds, as an Erlang binary."""
    lines = file.read_text().splitlines()
    content = base64.b64decode("".join(line for line in lines if not line.startswith("-----")))
    return f"<<{','.join(map(str, content))}>>"
