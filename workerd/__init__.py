"""workerd: a worker daemon for RabbitMQ, managed by systemd.

Start at `worker.worker.Worker.perform`, the life of a job, and `worker.executor`, one attempt at
it; then `core.ledger`, which decides what a redelivery means, and `worker.drain`, how a worker
comes to rest. A package imports only what stands below it; its docstring says what is in it:

    cli          the command line: one file for each command
    daemon       the process: started, reloaded, ended; systemd
    submitting   sending jobs
    control      the local socket: asking a running instance, steering it, submitting through it
    check        what is wrong with a configuration, without a broker and at one
    deadletters  failed jobs, looked at and sent back
    worker       a running worker: from a delivery to its settlement
    handlers     what runs the jobs: a process for each, or warm ones
    broker       RabbitMQ, through pika
    runlog       what the ledger remembers, on disk
    core         what becomes of a job: pure
    config       the configuration

and the leaves, which any of them may use:

    errors       the tree of errors, and the exit status of each
    log          events with fields, without ever waiting
    log_formats  how events are written: to the journal, as JSON, for a console
    output       what a command prints: lines, tables and JSON, errors
    paths        where the files of an instance are
    ids          ids of jobs, and of their copies
    units        durations and sizes as people write them
    backoff      growing, jittered delays
    aio          the first of several to come; a loop that runs until something is done

docs/architecture.md has diagrams, where state lives, and recipes.
"""

__version__ = "0.1.0"
