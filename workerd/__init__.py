"""workerd: a worker daemon for RabbitMQ, managed by systemd.

Start at `worker.Worker.perform`, the life of a job; then `ledger`, which decides what a
redelivery means, and `drain`, how a worker comes to rest. Modules import only what stands
below them:

    cli         the command line: puts the parts together, turns errors into exit statuses
    daemon      `workerd run`: a running worker and its exit status
    submit      `submit`: one job, confirmed by the broker; direct: without an instance; bulk: many
    jobspec     what a submission asks for; order: the message, and where it goes
    submit_command    the options of `submit`
    check       `workerd check`: what is wrong without a broker; connect: at the broker
    run_once    `workerd run-once`: one job, without a broker
    show        `workerd check --show`
    instances   what the instances of this host say of themselves; ask: how they are asked
    status_command, steer_command, queues_command, logs_command    their command lines
    watch       `workerd status --watch`: the terminal; screen: what it shows
    metrics_command    `workerd metrics`; exposition: as Prometheus reads it; scrapes: over HTTP
    dead        dead letters sent back and dropped; dead_command: its command line
    letterbox   dead letters looked at; letters: what they say; sheets: how they are shown
    setup       `workerd setup`: everything declared by an administrator

    worker      the shell around the ledger: starts runs, settles deliveries
    drain       how a worker comes to rest
    status      what an operator is told; tally: how jobs ended of late; depths: what waits
    consumer    the consuming connection, a channel for each queue; declarations: the queues
    outbox      copies that the broker must take: next attempts, dead letters
    control     the local socket, which holds up no job; client, peer: who asks
    answers     what is said there
    submissions jobs that come over it
    readings    what it says of itself in numbers
    cancellations    jobs that are refused when they come
    handling    what the worker and its handlers agree on
    admission   whether a job may start; pauses: handlers that cannot run; pressure: of memory
    publisher   confirmed publishing, on a connection of its own
    journal     the ledger's memory on disk, and those of the other instances; history: reading it
    reload      the configuration read again
    service     systemd, and detaching without it
    handlers    what runs the jobs: a process for each (command), or warm ones (warm)
    broker      RabbitMQ, through pika

    ledger      the core: which delivery each run will settle, what a redelivery means
    slots       which jobs may start; orphans: runs that a redelivery may rejoin
    memory      what the ledger remembers of jobs that are over
    retry       from an outcome to a verdict; copies: next attempts and dead letters
    figures     what is counted
    job         messages, jobs, runs, outcomes
    topology    every queue and exchange, and their arguments
    template    arguments with placeholders
    times       times as people write them

    settings    the configuration files, as frozen dataclasses; rules: between settings
    options     every key and its default; schema, kinds: how they are read
    trust, url  who else could change a file; the address of a broker
    log         events with fields, without ever waiting
    units, wording, waiting, errors, exits, ids, places, tables    small tools

docs/architecture.md has diagrams.
"""

__version__ = "0.1.0"
