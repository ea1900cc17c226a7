"""What the tests use to run workerd as an administrator would, and to break things around it.

The tests see the daemon as systemd and RabbitMQ do, through its command line, its signals, its log,
its notify socket and its queues. What does so imports nothing of workerd:

    waiting     the one scale of every time limit, and `until`
    processes   starting servers that cannot outlive the test run; finding what a daemon left behind
    ports       ports that no other test takes meanwhile
    broker      a private RabbitMQ, to be stopped, killed, frozen and started again
    trixie      a Debian 13 root folder, which holds the newer RabbitMQ
    amqp        publishing and reading as a test does
    octets      messages byte by byte, as no well-behaved client would send them
    peer        a scripted AMQP peer, which does what no RabbitMQ at hand would
    daemon      the daemon, its log as a list of events, and its notify socket
    control     its local socket as a client of any manners sees it
    crowd       a crowd at that socket, half of it hostile
    hostile     an instance whose answers are full of text for terminals
    tables      a configuration as TOML
    programs    any other program, such as `submit`
    terminal    a terminal with a program in it that draws whole screens
    pythons     virtual environments of other Pythons
    network     two network namespaces and the faults of the cable between them
    wire        a TCP relay to the broker that can be slow, held and cut
    clock       a wall clock that jumps
    journald    the journal's socket, which can be missing, frozen and refused
    system      a Debian that boots, with real systemd, journald and RabbitMQ
    oracle      the judge: jobs append to a file, and it says what was lost or ran twice

Unit tests share parts of workerd itself:

    samples     a message, and what a run of it may come to
    letters     dead letters as workerd and RabbitMQ make them
    run_logs    run logs: two keys of jobs, and what happens to an instance
    log_records  records of the log, and the journal that takes them
    commands    command handlers without a daemon
    pools       warm handlers without a daemon and a broker
    ledgers     a ledger by itself, and the channels of a test
    episodes    random episodes for the ledger: a model of RabbitMQ and of the worker around it
    dispatches  random episodes for the dispatch: a model of a pool and of its processes
    siblings    the same for the run logs of two instances

Start at `broker.Broker` and `daemon.Daemon`; the fixtures are in `tests/conftest.py`.

Environment: `WORKERD_TEST_RABBITMQ` (3.10 or 4.0), `WORKERD_TEST_PIKA` (a folder that holds the
pika to use), `WORKERD_TEST_TRIXIE` (the Debian 13 root), `WORKERD_TEST_IMAGES` (the folder of the
Debians that boot), `WORKERD_TEST_SCALE` (every time limit is multiplied by it),
`WORKERD_TEST_SEEDS` (how often tests of random moments are repeated), `WORKERD_TEST_QUICK` (random
tests try few examples), `CI` (a missing tool fails a test instead of skipping it).
"""
