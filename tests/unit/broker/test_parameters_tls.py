"""The files of `[broker] tls`, read without a broker and without anybody at the terminal."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.harness.programs import WORKERD
from tests.harness.tables import private
from tests.harness.terminal import Terminal
from workerd.broker.parameters import tls_context
from workerd.check.offline import check
from workerd.config.model import TLS, Broker, Settings
from workerd.config.url import BrokerURL


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Certificates one and two with their keys, a key with a passphrase, and a file of text."""
    made = tmp_path_factory.mktemp("tls")
    curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256")
    for name, protection in (
        ("one", ["-nodes"]),
        ("two", ["-nodes"]),
        ("locked", ["-passout", "pass:secret"]),
    ):
        out = ("-keyout", made / f"{name}.key", "-out", made / f"{name}.pem")
        command = ["openssl", "req", "-x509", *curve, *protection, "-subj", "/CN=x", *out]
        subprocess.run([*map(str, command)], check=True, capture_output=True)
    (made / "text").write_text("text")
    return made


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        ({"cert_file": "one.pem", "key_file": "one.key", "ca_file": "two.pem"}, None),
        (
            {"cert_file": "locked.pem", "key_file": "locked.key"},
            "locked.key: the key has a passphrase, which nobody is there to type: openssl pkey ",
        ),
        (
            {"cert_file": "one.pem", "key_file": "two.key"},
            "two.key: the key belongs to another certificate than ",
        ),
        ({"cert_file": "one.pem", "key_file": "text"}, "text: holds no certificate, or no key, "),
        ({"cert_file": "one.pem"}, "one.pem: holds no certificate, or no key, in PEM form"),
        ({"cert_file": "one.pem", "key_file": "absent"}, "absent: No such file or directory"),
        ({"ca_file": "text"}, "text: holds no certificate in PEM form"),
        ({"ca_file": "absent"}, "absent: No such file or directory"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_by_check_too(
    folder: Path, files: dict[str, str], problem: str | None
) -> None:
    paths: dict[str, Any] = {key: folder / name for key, name in files.items()}
    tls = TLS(**paths)
    broker = Broker(urls=(BrokerURL(tls=True),), tls=tls)
    found = check(Settings(broker=broker))
    if problem is None:
        assert found == []
        tls_context(tls)
    else:
        assert problem in found[0]
        assert found[0].startswith("broker.tls: ")
        with pytest.raises(OSError, match=problem[:20]):
            tls_context(tls)


def test_a_passphrase_is_asked_of_nobody(folder: Path, tmp_path: Path) -> None:
    config = private(
        tmp_path,
        '[broker]\nurls = ["amqps://guest@127.0.0.1:1"]\n'
        f'tls = {{ cert_file = "{folder}/locked.pem", key_file = "{folder}/locked.key" }}\n',
    )
    for words in (["check"], ["submit", "--direct", "x", "y"], ["queues"]):
        terminal = Terminal([*WORKERD, words[0], "--config", config, *words[1:]])
        try:
            assert terminal.wait_exit() in (77, 78)
        finally:
            terminal.close()
        assert "the key has a passphrase" in terminal.output
        assert "Enter PEM" not in terminal.output
