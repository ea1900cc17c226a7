"""Two network namespaces joined by a cable, and the cable's faults.

The broker listens in one (`Network.broker_ns`, `BROKER_ADDRESS`), the daemon runs in the other
(`Network.daemon_ns`); neither sees any other network. Needs root.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar

from .processes import MissingTool

# The namespaces have no other network, so the same addresses serve every test.
BROKER_ADDRESS = "192.168.213.1"
DAEMON_ADDRESS = "192.168.213.2"

CLONE_NEWNET = 0x40000000

Direction = Literal["both", "to_broker", "to_daemon"]

T = TypeVar("T")


class Network:
    """The two namespaces. `close` removes them; a later run removes those of one that was killed.

    Every fault is applied at the daemon's end and stays until `heal`.
    """

    _count = 0

    def __init__(self) -> None:
        _require_tools()
        _remove_abandoned()
        Network._count += 1
        name = f"workerd-test-{os.getpid()}-{Network._count}"
        self.broker_ns, self.daemon_ns = f"{name}-broker", f"{name}-daemon"
        try:
            self._build()
        except BaseException:
            self.close()
            raise

    def _build(self) -> None:
        _call("ip", "netns", "add", self.broker_ns)
        _call("ip", "netns", "add", self.daemon_ns)
        # Both ends are born inside, so that no name can collide outside.
        cable = ["type", "veth", "peer", "name", "cable", "netns", self.daemon_ns]
        _call("ip", "-n", self.broker_ns, "link", "add", "cable", *cable)
        ends = ((self.broker_ns, BROKER_ADDRESS), (self.daemon_ns, DAEMON_ADDRESS))
        for namespace, address in ends:
            _call("ip", "-n", namespace, "link", "set", "lo", "up")
            _call("ip", "-n", namespace, "address", "add", f"{address}/24", "dev", "cable")
            _call("ip", "-n", namespace, "link", "set", "cable", "up")

    def close(self) -> None:
        for namespace in (self.broker_ns, self.daemon_ns):
            subprocess.run(["ip", "netns", "delete", namespace], capture_output=True, check=False)

    def drop(self, direction: Direction = "both") -> None:
        """Lose every packet, silently."""
        if direction != "to_daemon":
            self._filter("OUTPUT", "-d", BROKER_ADDRESS, "-j", "DROP")
        if direction != "to_broker":
            self._filter("INPUT", "-s", BROKER_ADDRESS, "-j", "DROP")

    def reset(self) -> None:
        """Answer whatever the daemon sends with a TCP reset, to it and at once."""
        self._filter("OUTPUT", "-p", "tcp", "-d", BROKER_ADDRESS, "-j", "REJECT",
                     "--reject-with", "tcp-reset")  # fmt: skip

    def connections(self) -> int:
        """How many connections the daemon has."""
        listed = self._inside("ss", "-H", "-t", "state", "established", "dst", BROKER_ADDRESS)
        return len(listed.splitlines())

    def kill_sockets(self) -> int:
        """Destroy the daemon's connections in the kernel; return how many there were."""
        listed = self._inside("ss", "-K", "-H", "-t", "dst", BROKER_ADDRESS)
        return len(listed.splitlines())

    def impair(self, *, loss: float, rate: str) -> None:
        """Lose the share `loss` (0 to 1) of all packets, and carry no more than `rate` either way.

        Not with netem, which many kernels of virtual machines lack.
        """
        chance = ["-m", "statistic", "--mode", "random", "--probability", f"{loss:g}"]
        self._filter("OUTPUT", "-d", BROKER_ADDRESS, *chance, "-j", "DROP")
        self._filter("INPUT", "-s", BROKER_ADDRESS, *chance, "-j", "DROP")
        bucket = ["tbf", "rate", rate, "burst", "2kb", "latency", "500ms"]
        for namespace in (self.broker_ns, self.daemon_ns):
            _call("tc", "-n", namespace, "qdisc", "replace", "dev", "cable", "root", *bucket)

    def move_broker(self, address: str) -> None:
        """Take `BROKER_ADDRESS` away from the broker's host, and give it this one instead."""
        # In this order: a second address of a network goes with the first.
        for verb, each in (("delete", BROKER_ADDRESS), ("add", address)):
            _call("ip", "-n", self.broker_ns, "address", verb, f"{each}/24", "dev", "cable")

    def unplug(self) -> None:
        """Take the cable out: the daemon's kernel knows at once that there is no route."""
        self._inside("ip", "link", "set", "cable", "down")

    def heal(self) -> None:
        """Undo every fault."""
        self._inside("iptables", "-F")
        # There is nothing to remove unless `impair` was called.
        for namespace in (self.broker_ns, self.daemon_ns):
            subprocess.run(
                ["tc", "-n", namespace, "qdisc", "del", "dev", "cable", "root"],
                capture_output=True,
                check=False,
            )
        self._inside("ip", "link", "set", "cable", "up")

    def _filter(self, chain: str, *rule: str) -> None:
        self._inside("iptables", "-w", "-A", chain, *rule)

    def _inside(self, *command: str) -> str:
        return _call("ip", "netns", "exec", self.daemon_ns, *command)


def inside(namespace: str | None, function: Callable[[], T]) -> T:
    """Call `function` in a network namespace; None calls it here.

    The sockets that it opens belong to that namespace for as long as they live, so a test may use
    them from outside afterwards.
    """
    if namespace is None:
        return function()
    results: list[Any] = []

    def enter_and_call() -> None:
        # The namespace is the thread's alone, and the thread ends here.
        try:
            _enter(f"/run/netns/{namespace}")
            results.append(function())
        except BaseException as error:
            results.append(error)

    thread = threading.Thread(target=enter_and_call, name=f"in {namespace}")
    thread.start()
    thread.join()
    if isinstance(results[0], BaseException):
        raise results[0]
    result: T = results[0]
    return result


def _enter(path: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        if libc.setns(descriptor, CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), f"setns {path}")
    finally:
        os.close(descriptor)


def _require_tools() -> None:
    if os.geteuid() != 0:
        raise MissingTool("network namespaces need root")
    for tool in ("ip", "iptables", "tc", "ss"):
        if shutil.which(tool) is None:
            raise MissingTool(f"{tool} is not installed")
    # Some containers have root and the tools but not the right.
    probe = subprocess.run(["unshare", "--net", "true"], capture_output=True, check=False)
    if probe.returncode != 0:
        raise MissingTool("network namespaces are forbidden here")


def _remove_abandoned() -> None:
    """Remove the namespaces of test runs that were killed before they could."""
    folder = Path("/run/netns")
    for path in folder.glob("workerd-test-*") if folder.exists() else ():
        owner = re.match(r"workerd-test-(\d+)-", path.name)
        if owner and not Path("/proc", owner[1]).exists():
            subprocess.run(["ip", "netns", "delete", path.name], capture_output=True, check=False)


def _call(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
