"""The address of a broker, and secrets that do not show when they are printed."""

from dataclasses import dataclass
from urllib.parse import quote, unquote, urlsplit

_SPECIAL = 'special characters in the user, password and vhost are written as "%XX"'


class Secret:
    """A text that prints as `***`; only `reveal()` gives it away."""

    # Not a dataclass: dataclasses.asdict() would lay the text open.
    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        self._text = text

    def reveal(self) -> str:
        return self._text

    def __repr__(self) -> str:
        return "***"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and self._text == other._text

    def __hash__(self) -> int:
        return hash(self._text)


@dataclass(frozen=True, slots=True)
class BrokerURL:
    """One broker's address; `password` is None when the URL carries none.

    Follows RabbitMQ's URI specification (https://www.rabbitmq.com/docs/uri-spec), except that
    "amqp://host/" means the vhost "/", as in pika, and that parameters are refused.
    """

    tls: bool = False
    host: str = "localhost"
    port: int = 5672
    user: str = "guest"
    password: Secret | None = None
    vhost: str = "/"

    @classmethod
    def parse(cls, text: str) -> "BrokerURL":
        """Read "amqp://user:password@host:port/vhost"; raises ValueError, never quoting the text.

        Whatever is wrong with it, a part of the text could be a piece of a password.
        """
        if not text.isascii() or not text.isprintable() or " " in text:
            raise ValueError(f"a URL consists of printable ASCII without spaces; {_SPECIAL}")
        try:
            parts = urlsplit(text)
        except ValueError:
            raise ValueError(f"not a URL; {_SPECIAL}") from None
        if parts.scheme not in ("amqp", "amqps"):
            raise ValueError('expected a URL that begins with "amqp://" or "amqps://"')
        try:
            port = parts.port
        except ValueError:
            raise ValueError(f"the port is not a number from 1 to 65535; {_SPECIAL}") from None
        if parts.query or parts.fragment or parts.path.count("/") > 1:
            raise ValueError(f"nothing may follow the vhost; {_SPECIAL}")
        if port == 0 or not parts.hostname:
            raise ValueError("the host is missing" if port != 0 else "the port 0 does not exist")
        tls = parts.scheme == "amqps"
        password = _decode(parts.password or "")
        return cls(
            tls=tls,
            host=parts.hostname,
            port=port or (5671 if tls else 5672),
            user=_decode(parts.username or "") or "guest",
            password=Secret(password) if password else None,
            vhost=_decode(parts.path[1:]) or "/",
        )

    def __str__(self) -> str:
        scheme = "amqps" if self.tls else "amqp"
        host = f"[{self.host}]" if ":" in self.host else self.host
        user, vhost = quote(self.user, safe=""), quote(self.vhost, safe="")
        return f"{scheme}://{user}@{host}:{self.port}/{vhost}"


def redact(url: str) -> str:
    """A URL of any scheme with its password, if it has one, replaced by `***`."""
    scheme, separator, rest = url.partition("://")
    userinfo, at, place = rest.rpartition("@")
    user, colon, _ = userinfo.partition(":")
    return f"{scheme}{separator}{user}{colon and ':***'}{at}{place}"


def _decode(text: str) -> str:
    try:
        return unquote(text, errors="strict")
    except UnicodeDecodeError:
        raise ValueError('a "%XX" sequence is not valid UTF-8') from None
