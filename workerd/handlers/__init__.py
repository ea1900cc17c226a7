"""What runs the jobs. Start at `command.CommandHandler.run`, or at `warm` for warm processes.

    registry     the handlers of a configuration: made, replaced, ended
    command      one process for each job
    warm         processes that handle one job after another: a package
    arguments    what a command gets of its job: arguments, environment
    report_file  what a program says of its job in the file $WORKERD_REPORT
    process      a child process in a session of its own, watched without threads
    poller       many descriptors behind a single one in the event loop
    program      the program that a handler names: where it is, its environment, its directory
    output       what a job prints: lines into the log, and the end of it kept
    guardian     starts `guard`, and says which jobs run
    guard        a process that kills the jobs of a daemon that was itself killed
    child        a warm Python process, run by the application's interpreter
    child_boot   starts `child`, from bytecode where there is some

`guard`, `child` and `child_boot` are run by their paths: they import the standard library alone.
"""
