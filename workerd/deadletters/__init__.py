"""Dead letters, for `workerd dead`: read, shown, sent back, dropped.

Start at `operations.browse`.

    letter      what a dead letter says, which are meant, how one becomes a job again
    browser     the letters of a queue while somebody looks at them
    operations  letters at the broker: listed, sent back, dropped, renewed
    render      letters as they are shown: rows, sheets, JSON
"""
