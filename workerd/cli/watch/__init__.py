"""The screen of `workerd status --watch`.

Start at `terminal.watch`. `layout` and `sections` alone import rich.

    terminal  the terminal: drawn every second, put right in the end
    asker     asks the instances, each in a thread
    sections  from what the instances say to lines of text
    layout    tables, sections and colours: what a screen is made of
"""
