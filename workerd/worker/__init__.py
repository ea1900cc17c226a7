"""A running worker: from a delivery to its settlement.

Start at `worker.Worker.perform`, the life of a job; then `executor` and `drain`.

    worker           the shell around the ledger: starts runs, settles deliveries
    executor         one attempt at a job: which handler has it, when it begins, how it ends
    drain            how a worker comes to rest, line by line
    stop             the wish to stop, and its one deadline
    outbox           what the broker must have confirmed before a job is settled
    publisher        confirmed publishing, on a connection of its own
    channels         the open channels: a delivery is settled on the one on which it came
    consumer         the consuming connection, a channel for each queue and for its due jobs
    subscription     what is consumed: a queue, or where its delayed jobs come due
    declarations     the queues that are declared, and those that are used as they are
    changes          waiting for a condition of the worker as a whole
    inspect          a look at the whole, for the status line, the local socket, the metrics
    status           the status line; warnings before the broker loses patience
    queue_depths     how many messages wait at the broker
    memory_pressure  one job is started at a time while the kernel is short of memory
    broker_ping      whether the broker still answers
"""
