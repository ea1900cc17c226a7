"""Starting programs with pipes, without any broker: `python -m benchmarks.peers.spawn COUNT SLOTS`.

`posix_spawn` of a program that reads its input, 100 bytes into it, its outputs read to their end,
and its status; as fast as one process of Python can. Prints the seconds that it took.
"""

from __future__ import annotations

import os
import sys
import time

#: The smallest program that reads its input and says nothing.
COMMAND = ["/bin/dd", "of=/dev/null", "status=none"]
BODY = b"x" * 100


def start() -> tuple[int, list[int]]:
    """Start one; returns its pid and the ends of its outputs."""
    pipes = [os.pipe() for _ in range(3)]
    (stdin, feed), (out, stdout), (err, stderr) = pipes
    actions = [(os.POSIX_SPAWN_DUP2, end, to) for to, end in enumerate((stdin, stdout, stderr))]
    pid = os.posix_spawn(COMMAND[0], COMMAND, os.environ, file_actions=actions)
    for end in (stdin, stdout, stderr):
        os.close(end)
    os.write(feed, BODY)
    os.close(feed)
    return pid, [out, err]


def finish(outputs: list[int]) -> None:
    for output in outputs:
        while os.read(output, 65_536):
            pass
        os.close(output)


def main(count: int, slots: int) -> None:
    began = time.monotonic()
    running: dict[int, list[int]] = {}
    started = 0
    while started < count or running:
        while started < count and len(running) < slots:
            pid, outputs = start()
            running[pid] = outputs
            started += 1
        pid, status = os.wait()
        assert status == 0, status
        finish(running.pop(pid))
    print(time.monotonic() - began)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
