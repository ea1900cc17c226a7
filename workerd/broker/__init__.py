"""RabbitMQ, through pika: the only package that imports it.

A `Connection` is one AMQP connection, a `Channel` one channel of it. Neither is ever reopened
or reused: when one ends, its ``ended`` future says why, and its owner makes a new one.
Everything runs in one asyncio loop; nothing here decides what becomes of a job.

    connection    one connection, and the endless supply of them
    channel       one channel: declaring, consuming, settling, confirmed publishing
    confirms      which published messages of a channel the broker has taken
    parameters    address, login, TLS and limits, as pika wants them
    errors        what errors of pika, RabbitMQ and the network mean, as `BrokerError`
    frames        deliveries, read out of the bytes of a broker without pika
    codec         AMQP properties to and from `Message`; headers that no sender can break
    acks          acknowledgements in as few frames as can be
    pika_patches  where pika is slow or fragile, and what is done instead
"""
