"""Warm handlers: processes that handle one job after another.

Start at `pool.WarmHandler.run`.

    pool           the warm processes of a handler: the shell around `dispatch`
    dispatch       which process gets which job, and how many lie in its pipe: pure
    child_process  one warm process and the jobs that it holds, until it is over
    lifecycle      the states of a warm process, as a table: pure
    assignment     a job on its way through a warm handler
    inbox          what a warm process is sent and has not read: jobs, tokens to begin them
    respawn        whether another process may be started, and why not
    answers        what a warm process sends, read in fair shares
    protocol       frames and messages of the protocol, as bytes
    results        what the answer of a process, or its end, means for its job
"""
