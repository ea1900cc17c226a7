"""workerd beside other workers, each at its best settings, on a RabbitMQ of its own.

    peers/       the other workers' programs, and the jobs that all of them run
    rig          the broker, a crew of worker processes, loading a queue and seeing it empty
    crews        how each worker is started for a kind of job, and its messages
    workloads    what is measured, between whom, and what workerd aims at
    report       medians, spreads, ratios: for a terminal, for docs/benchmarks.md, as JSON

Start at `workloads`. `make bench` runs `python -m benchmarks` in a virtualenv of its own;
docs/benchmarks.md says how it is measured.
"""
