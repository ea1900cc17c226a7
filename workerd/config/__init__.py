"""The configuration: from TOML files to frozen settings.

Start at `load.load`. Nothing else reads a file of the configuration or its environment.

    model        every key with its type and default, one dataclass for each table
    load         the files, read and laid over each other into one `Settings`
    fields       a setting declared once: how its table is read, merged and built
    types        the types of value: how each is read from TOML and written back
    validate     what must hold between settings
    passwords    passwords of brokers: where they are, who else can read them
    permissions  who else could change a file; dropping to the service user
    url          the address of a broker; secrets that do not show when printed
    template     arguments of commands with placeholders
    text         how keys and values are written; "did you mean"
    dump         the merged configuration as TOML, for `check --show`
"""
