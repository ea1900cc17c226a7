"""The run log: what the ledger remembers of jobs, on disk, shared by the instances of a host.

Start at `writer.RunLog`.

    records  the records as bytes
    in_hand  what an instance has in hand, each delivery with its number
    lock     who may write: one process, for as long as it or its guardian lives
    writer   the run log of this instance, and a look into those of the others
    reader   a run log as it is read: by its instance when that starts, and by others
"""
