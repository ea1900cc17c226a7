"""What is wrong with a configuration, for `workerd check` and `workerd setup`.

Start at `offline.check`.

    offline   what can be found without a broker: programs, functions, time limits
    programs  programs and functions of handlers: whether they run, who else could change them
    broker    what `check --connect` finds: login, permissions, queues
    declare   `workerd setup`: every queue and exchange, declared by an administrator
"""
