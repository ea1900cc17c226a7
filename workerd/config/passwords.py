"""Passwords of brokers: where they are, and who else can read them."""

import os
from collections.abc import Mapping
from pathlib import Path

from workerd.config.model import Broker
from workerd.config.permissions import readable_by_all
from workerd.config.url import BrokerURL, Secret
from workerd.errors import SettingsError

CREDENTIAL = "broker-password"


def password_for(broker: Broker, url: BrokerURL, environ: Mapping[str, str] = os.environ) -> Secret:
    """The password for a broker's URL, read afresh so that a changed one counts at once.

    The URL's own comes first, then `password_file`, then systemd's credential
    `broker-password`, then the well-known one of the user guest. Raises SettingsError.
    """
    if url.password is not None:
        return url.password
    if broker.password_file is not None:
        return _read_password(broker.password_file, private=True)
    credential = Path(environ.get("CREDENTIALS_DIRECTORY") or "/nonexistent", CREDENTIAL)
    if os.path.lexists(credential):
        return _read_password(credential, private=False)
    if url.user == "guest":
        return Secret("guest")
    raise SettingsError(
        f"no password for {url}: set broker.password_file, "
        f"or give the service a credential {CREDENTIAL} (LoadCredential=)"
    )


def _read_password(file: Path, private: bool) -> Secret:
    try:
        # Some editors begin a file with a byte order mark, and end its lines with CR LF.
        with file.open(encoding="utf-8-sig", newline="") as stream:
            mode = os.fstat(stream.fileno()).st_mode
            password = stream.read().removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError:
        raise SettingsError(f"{file}: the password is not UTF-8 text") from None
    except OSError as error:
        raise SettingsError(f"{file}: {error.strerror}") from error
    if private and readable_by_all(mode):
        raise SettingsError(exposed(file))
    if not password:
        raise SettingsError(f"{file}: the password is empty")
    return Secret(password)


def exposed(file: Path) -> str:
    """The problem of a password file that everyone can read."""
    return f"{file}: holds a password that everyone can read: chmod o-r {file}"
