"""The daemon as a process: started, reloaded, ended.

Start at `main.run`.

    main      `workerd run`: from a command line to a running worker and its exit status
    reload    the configuration read again, and applied only if all of it is right
    run_once  `workerd run-once`: one job, without a broker
    systemd   readiness, status and watchdog
    detach    detaching from the terminal where there is no systemd
    rundir    the folder of a running instance: lock, socket, why the last one failed
"""
