"""RabbitMQ, through pika: the only package that imports it.

A `Connection` is one AMQP connection, a `Channel` one channel of it. Neither is ever reopened
or reused: when one ends, its ``ended`` future says why, and its owner makes a new one.
Everything runs in one asyncio loop; nothing here decides what becomes of a job.
"""
