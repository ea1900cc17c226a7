"""RabbitMQ, through pika: the only package that imports it.

A `Link` is one AMQP connection, a `Channel` one channel of it. Neither is ever reopened
or reused: when one ends, its ``ended`` future says why, and its owner makes a new one.
Everything runs in one asyncio loop; nothing here decides what becomes of a job.
"""

import logging

from workerd.broker.channel import Channel
from workerd.broker.codec import Incoming
from workerd.broker.faults import ack_timeout_in, diagnose, is_noise
from workerd.broker.link import Link, links
from workerd.broker.timeouts import CONFIRM_TIMEOUT

__all__ = [
    "CONFIRM_TIMEOUT",
    "Channel",
    "Incoming",
    "Link",
    "ack_timeout_in",
    "diagnose",
    "is_noise",
    "links",
]

# pika logs every failed attempt with a traceback; the same facts reach our log as events.
logging.getLogger("pika").setLevel(logging.CRITICAL + 1)
