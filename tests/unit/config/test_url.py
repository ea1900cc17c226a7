"""Broker URLs, and secrets that stay secret."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workerd.config.url import BrokerURL, Secret, redact


def test_what_a_url_leaves_out_has_the_defaults_of_rabbitmq() -> None:
    assert BrokerURL.parse("amqp://localhost") == BrokerURL(
        tls=False, host="localhost", port=5672, user="guest", password=None, vhost="/"
    )
    assert BrokerURL.parse("amqps://rabbit1").port == 5671


def test_every_part_is_decoded() -> None:
    assert BrokerURL.parse("amqps://j%40b:p%2Fw@[::1]:1234/a%2Fb") == BrokerURL(
        tls=True, host="::1", port=1234, user="j@b", password=Secret("p/w"), vhost="a/b"
    )


@pytest.mark.parametrize("end", ["", "/", "/%2F"])
def test_no_path_means_the_default_vhost(end: str) -> None:
    assert BrokerURL.parse("amqp://h" + end).vhost == "/"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("http://h", "begins with"),
        ("localhost", "begins with"),
        ("amqp://", "host is missing"),
        ("amqp://u:s3cret@", "host is missing"),
        ("amqp://u:s3cret@h:99999", "port"),
        ("amqp://u:s3cret@h:0", "port"),
        ("amqp://u:s3c/ret@h", "port is not a number"),
        ("amqp://u:s3c#ret@h", "port is not a number"),
        ("amqp://u@h/v?heartbeat=s3cret", "nothing may follow the vhost"),
        ("amqp://u@h/a/s3cret", "nothing may follow the vhost"),
        ("amqp://u:s3 cret@h", "without spaces"),
        ("amqp://u:s3crét@h", "printable ASCII"),
        ("amqp://u:s3cret@[h", "not a URL"),
        ("amqp://u:s3cret%FF@h", "UTF-8"),
    ],
)
def test_a_bad_url_is_refused_without_quoting_it(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as caught:
        BrokerURL.parse(text)
    assert "s3c" not in str(caught.value)
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


def test_a_url_prints_without_its_password() -> None:
    url = BrokerURL.parse("amqp://u:s3cret@h/v")
    assert str(url) == "amqp://u@h:5672/v"
    assert "s3cret" not in repr(url)


@given(st.booleans(), st.text(min_size=1), st.text(min_size=1), st.integers(1, 65_535))
def test_a_printed_url_reads_back(tls: bool, user: str, vhost: str, port: int) -> None:
    url = BrokerURL(tls=tls, host="::1", port=port, user=user, vhost=vhost)
    assert BrokerURL.parse(str(url)) == url


def test_a_secret_shows_only_when_revealed() -> None:
    secret = Secret("s3cret")
    assert secret.reveal() == "s3cret"
    assert f"{secret} {secret!r} {[secret]}" == "*** *** [***]"
    assert secret == Secret("s3cret")
    assert len({secret, Secret("s3cret"), Secret("other")}) == 2
    assert "s3cret" not in str(dataclasses.asdict(BrokerURL(password=secret)))


def test_redacting_keeps_everything_but_the_password() -> None:
    assert redact("http://u:p@h:15672/x") == "http://u:***@h:15672/x"
    assert redact("http://u@h/x") == "http://u@h/x"
    assert redact("http://h:1/x") == "http://h:1/x"
