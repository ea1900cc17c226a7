"""workerd: a worker daemon for RabbitMQ, managed by systemd."""

__version__ = "0.1.0"
