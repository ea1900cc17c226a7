"""The command line.

Start at `main.parser`. Each command has its options in a module of its own, added there.

    main          parses, puts the parts together, turns errors into exit statuses
    options       options that commands share
    run           `workerd run`
    check         `workerd check`
    setup         `workerd setup`
    run_once      `workerd run-once`
    submit        `submit`, `workerd submit`
    status        `workerd status`
    watch         `workerd status --watch`: a package
    health        `workerd health`
    queues        `workerd queues`
    logs          `workerd logs`
    cancel        `workerd cancel`
    pause         `workerd pause`, `workerd resume`
    dead          `workerd dead`
    metrics       `workerd metrics`
    prometheus    the metrics of every instance, as Prometheus reads them
    metrics_http  answers scrapes on a socket from systemd
"""
