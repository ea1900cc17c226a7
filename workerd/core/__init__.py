"""The core: what becomes of a job. Pure: no input or output, no clock, no tasks.

Start at `ledger`, whose docstring has the rules of redelivery.

    job            messages, jobs, runs, outcomes
    decode         from a message to the job that it is
    ledger         which jobs run, which delivery each will settle, what a redelivery means
    decisions      what the ledger wants done
    states         what a run is, and what moves it on, as a table
    slots          which jobs may start, which wait in line, which run alone
    orphans        runs whose channel is lost, which a redelivery may rejoin
    dedup          which jobs are finished, which went back to be run again
    verdict_channels  on which channels verdicts may have been lost
    keyset         many keys of jobs in little memory
    retry          `decide`: what becomes of a job after a run, and when
    republish      the copies of a job: its next attempt, its dead letter
    admission      whether a job may start, or is a dead letter at once
    breaker        handlers that cannot run here and now, and when they are tried again
    cancellations  jobs that are refused when they come
    topology       every queue and exchange: names, arguments, delay levels
    handler        the protocol between the worker and its handlers
    jobspec        what a submission asks for, not yet judged
    submission     what is submitted: the message, and where it goes at which moment
    times          times as people write them
    counters       what an instance counts for its metrics
    recent         how jobs ended of late
"""
