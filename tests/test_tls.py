"""TLS: the broker has to prove who it is."""

from __future__ import annotations

import shutil
import ssl
import subprocess
from collections.abc import Callable
from pathlib import Path

from tests.harness.config import config
from tests.harness.daemon import Daemon
from tests.harness.oracle import Oracle
from tests.harness.peer import Peer

StartDaemon = Callable[..., Daemon]


def certificate(folder: Path, name: str, host: str) -> tuple[Path, Path]:
    """A certificate for `host` that is its own authority, and its key."""
    certificate, key = folder / f"{name}.pem", folder / f"{name}.key"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt"]
    command += ["ec_paramgen_curve:prime256v1", "-nodes", "-days", "1", "-subj", f"/CN={host}"]
    command += ["-addext", f"subjectAltName=DNS:{host}"]
    subprocess.run([*command, "-out", certificate, "-keyout", key], check=True, capture_output=True)
    return certificate, key


def test_a_broker_that_is_not_trusted_is_told_plainly_and_found_when_the_ca_is_mended(
    tmp_path: Path, daemon: StartDaemon, oracle: Oracle
) -> None:
    right, key = certificate(tmp_path, "right", "localhost")
    wrong, _ = certificate(tmp_path, "wrong", "localhost")
    trusted = tmp_path / "ca.pem"
    shutil.copy(wrong, trusted)
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(right, key)
    peer = Peer(tls=tls)
    url = peer.url.replace("amqp://127.0.0.1", "amqps://localhost")
    settings = {"tls.ca_file": str(trusted), "reconnect_max": "400ms"}
    workerd = daemon(config(url, oracle.command(), broker=settings, worker={"ready_wait": "500ms"}))
    workerd.wait_ready()
    refused = workerd.wait_event("unreachable", count=2)
    assert refused["text"].startswith("TLS: self")
    # Only a human can mend it.
    assert refused["retry_in"] == 0.4
    workerd.wait_notify(
        lambda text: f"STATUS=waiting for broker localhost in 0s: {refused['text']}" in text
    )

    shutil.copy(right, trusted)
    jobs = peer.publish("jobs", "a")
    workerd.wait_event("done")
    oracle.check(jobs)
    peer.close()


def test_a_certificate_for_another_host_is_told_plainly(
    tmp_path: Path, daemon: StartDaemon
) -> None:
    other, key = certificate(tmp_path, "other", "rabbit.test")
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(other, key)
    peer = Peer(tls=tls)
    url = peer.url.replace("amqp://127.0.0.1", "amqps://localhost")
    workerd = daemon(config(url, ["true"], broker={"tls.ca_file": str(other)}))
    refused = workerd.wait_event("unreachable")
    assert refused["text"].startswith("TLS: Hostname mismatch")
    peer.close()
