"""A private RabbitMQ: its own node, ports and data folder, on an address of this machine."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from tests.harness import network, processes, trixie
from tests.harness.clock import Clock
from tests.harness.ports import Port
from tests.harness.processes import MissingTool
from tests.harness.waiting import SCALE, TIMEOUT, until

# A start takes 2 to 4 s on an idle machine.
START_TIMEOUT = 60.0 * SCALE

PROTOCOL_HEADER = b"AMQP\x00\x00\x09\x01"

# Mounts live in the broker's own mount namespace and vanish with it. Every Debian root has an empty
# /srv, which becomes the broker's folder.
ENTER_ROOT = """
mount -t proc proc "$1/proc" && mount --rbind /dev "$1/dev" && mount --bind "$2" "$1/srv" &&
root=$1 && shift 2 && exec chroot "$root" "$@"
"""


class Depth(NamedTuple):
    """One queue, at this moment."""

    ready: int
    unacked: int
    consumers: int


class Broker:
    """One RabbitMQ server, started, stopped and hurt at will. It keeps its port and its data.

    `version` is the beginning of a release number; the server is taken from this machine, or from
    the Debian 13 root of `trixie`. `config` holds settings of the `rabbit` application as Erlang
    terms, such as `{"max_message_size": "1000000"}`. `netns` names the network namespace it runs
    in, and `address` the address it listens on there. `tls` are its `ssl_options`, as an Erlang
    term: then `amqps_port` speaks TLS. With `own_clock` its wall clock can jump: `clock`.
    """

    def __init__(
        self,
        folder: Path,
        version: str = "3.10",
        *,
        config: Mapping[str, str] | None = None,
        consumer_timeout_ms: int | None = None,
        address: str = "127.0.0.1",
        netns: str | None = None,
        tls: str | None = None,
        own_clock: bool = False,
    ) -> None:
        self.version = version
        self.folder = folder
        self.netns = netns
        self.address = address
        self.vhost = "/"
        self.pid: int | None = None
        # Killed without being settled: some of its queues may never answer again.
        self.damaged = False
        self._root, self._server = _installed(version)
        self._config = dict(config or {})
        if consumer_timeout_ms is not None:
            self._config["consumer_timeout"] = str(consumer_timeout_ms)
            # The timeout is looked at once per tick, which is a minute by default.
            self._config["channel_tick_interval"] = "1000"
        self._cookie = secrets.token_hex(16)
        self._ports = [Port() for _ in range(4)]
        self.port, self.amqps_port, self._dist_port, self._epmd_port = (
            port.number for port in self._ports
        )
        if tls is not None:
            self._config["ssl_listeners"] = f"[{{{json.dumps(address)}, {self.amqps_port}}}]"
            self._config["ssl_options"] = tls
        self._epmd: subprocess.Popen[bytes] | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._frozen = False
        self._write_folder()
        self.clock = Clock(folder) if own_clock else None

    @property
    def url(self) -> str:
        vhost = self.vhost.replace("/", "%2F")
        return f"amqp://guest:guest@{self.address}:{self.port}/{vhost}"

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None and not self._frozen

    @property
    def logs(self) -> str:
        """What the server wrote, for a test that fails."""
        files = [self.folder / "console.log", *sorted((self.folder / "log").glob("*.log"))]
        return "\n".join(path.read_text(errors="replace") for path in files if path.exists())

    # Its life

    def start(self) -> None:
        """Start the server and return when it speaks AMQP."""
        assert self._process is None, "the broker runs already"
        environment = self._environment()
        if self._epmd is None:
            epmd = ["epmd", "-port", str(self._epmd_port), "-address", "127.0.0.1"]
            self._epmd = processes.spawn(self._enter(epmd), env=environment)
        with (self.folder / "console.log").open("ab") as console:
            self._process = processes.spawn(
                self._enter([f"{self._home}/sbin/rabbitmq-server"]),
                env={**environment, **(self.clock.program(self._inside) if self.clock else {})},
                stdout=console,
                stderr=console,
            )
        # Every program on the way replaces itself, so this is the Erlang machine itself.
        self.pid = self._process.pid
        self._await_amqp()

    def stop(self) -> None:
        """End the server cleanly, as `rabbitmqctl stop` does."""
        self._signal(signal.SIGTERM)
        self._reap()

    def kill(self, *, settle: bool = True) -> None:
        """SIGKILL the server; `settle=False` also loses what only a fresh quorum queue can lose."""
        if settle and not self._frozen:
            self.settle()
        else:
            self.damaged = True
        self._signal(signal.SIGKILL)
        self._reap()

    def restart(self) -> None:
        self.stop()
        self.start()

    def freeze(self) -> None:
        """Stop the server in its tracks: the kernel still accepts connections, nobody answers."""
        self._signal(signal.SIGSTOP)
        # Its threads may run on for a moment, and confirm what comes.
        assert self._process is not None
        os.waitid(os.P_PID, self._process.pid, os.WSTOPPED)
        self._frozen = True

    def thaw(self) -> None:
        self._signal(signal.SIGCONT)
        self._frozen = False

    def close(self) -> None:
        """End everything at once, for good; the data folder stays."""
        for process in (self._process, self._epmd):
            if process is not None:
                processes.end(process)
        self._process = self._epmd = self.pid = None
        for port in self._ports:
            port.close()

    # Its control

    def eval(self, expression: str) -> str:
        """Evaluate Erlang in the server and return what it printed. About 5 ms."""
        guarded = (
            f'try begin {expression} end, io:format("~nok") '
            'catch C:R -> io:format("~nfailed: ~p:~p", [C, R]) end.\n'
        )
        command = ["erl_call", "-c", self._cookie, "-fetch_stdout", "-no_result_term", "-e"]
        # A name of its own for each call. The random one of `-r` is drawn anew once a second, and
        # the server refuses it while it still knows the call before.
        command += ["-h", f"eval-{secrets.token_hex(8)}"]
        command += ["-address", f"127.0.0.1:{self._dist_port}"]
        result = self._run(command, stdin=guarded)
        printed, _, verdict = result.stdout.rpartition("\n")
        if verdict != "ok":
            raise AssertionError(f"{expression}\n{result.stdout}{result.stderr}")
        return printed

    def ctl(self, *arguments: str) -> str:
        """Run `rabbitmqctl`. About a second; `eval` is faster where it matters."""
        result = self._run([f"{self._home}/sbin/rabbitmqctl", *arguments])
        if result.returncode != 0:
            raise AssertionError(f"rabbitmqctl {arguments}\n{result.stdout}{result.stderr}")
        return result.stdout

    def settle(self) -> None:
        """Make every queue survive a kill from now on.

        Ra 2.2 and 2.14 keep the names of the quorum queues in a DETS table that is written to disk
        half a second to some seconds after the declaration. A server killed in between knows the
        queue but not its log, for ever. Writing the tables out now closes that window.
        """
        self.eval("[ok = dets:sync(Table) || Table <- dets:all()]")

    def fresh_vhost(self) -> str:
        """Remove the virtual host in use, unless it is the default one, and use a new one."""
        if self.vhost != "/":
            self.delete_vhost(self.vhost)
        self.vhost = "/"
        vhost = f"test-{secrets.token_hex(4)}"
        self.add_vhost(vhost)
        self.vhost = vhost
        return vhost

    def add_vhost(self, vhost: str) -> None:
        """Make a virtual host in which guest may do everything."""
        everything = ", ".join(['<<".*">>'] * 3)
        self.eval(
            f'rabbit_vhost:add(<<"{vhost}">>, <<"tests">>), '
            "rabbit_auth_backend_internal:set_permissions("
            f'<<"guest">>, <<"{vhost}">>, {everything}, <<"tests">>)'
        )

    def delete_vhost(self, vhost: str) -> None:
        self.eval(f'rabbit_vhost:delete(<<"{vhost}">>, <<"tests">>)')

    def add_user(
        self,
        name: str,
        *,
        configure: str = ".*",
        write: str = ".*",
        read: str = ".*",
        vhost: str | None = "in use",
    ) -> None:
        """Add a user, whose name is its password, with these rights; none where `vhost` is None."""
        auth = "rabbit_auth_backend_internal"
        user = f'<<"{name}">>'
        rights = ", ".join(f'<<"{pattern}">>' for pattern in (configure, write, read))
        self.eval(f'catch {auth}:delete_user({user}, <<"tests">>)')
        self.eval(f'{auth}:add_user({user}, {user}, <<"tests">>)')
        if vhost is not None:
            where = f'<<"{self.vhost}">>'
            self.eval(f'{auth}:set_permissions({user}, {where}, {rights}, <<"tests">>)')

    def queues(self) -> dict[str, Depth]:
        """Every queue of the virtual host in use, counted now and not at the last statistics.

        A quorum queue that is still being recovered after a start is left out.
        """
        printed = self.eval(
            f'[io:format("~ts\\t~w\\t~w\\t~w~n", [Name, Ready, Unacked, Consumers]) '
            f'|| Q <- rabbit_amqqueue:list(<<"{self.vhost}">>), '
            "{resource, _, queue, Name} <- [amqqueue:get_name(Q)], "
            "{Ready, Unacked, Consumers} <- case amqqueue:get_type(Q) of "
            "rabbit_quorum_queue -> "
            "[{maps:get(num_messages, O) - Out, Out, maps:get(num_consumers, O)} || "
            "{ok, {_, O}, _} <- "
            "[ra:local_query(amqqueue:get_pid(Q), fun rabbit_fifo:overview/1)], "
            "Out <- [maps:get(num_checked_out, O)]]; "
            "_ -> [list_to_tuple([Value || {_, Value} <- rabbit_amqqueue:info(Q, "
            "[messages_ready, messages_unacknowledged, consumers])])] end]"
        )
        rows = (line.split("\t") for line in printed.splitlines())
        return {name: Depth(*map(int, counts)) for name, *counts in rows}

    def await_depth(
        self, queue: str, *, ready: int = 0, unacked: int = 0, timeout: float = TIMEOUT
    ) -> None:
        """Wait until a queue has exactly so many messages; by default none at all."""

        def reached() -> bool:
            depth = self.queues().get(queue)
            return depth is not None and depth[:2] == (ready, unacked)

        until(reached, f"{ready} ready and {unacked} unacked in {queue}", timeout)

    def recovers(self) -> bool:
        """Wait until every queue is fully there after a start; False if one does not come back.

        A queue that dead-letters at least once has a worker. Deleted before that is at work, it
        takes the workers' supervisor with it, and every channel ends in an internal error.
        """

        def at_work() -> bool:
            printed = self.eval(
                "Has = fun(Q, Name, Value) -> {longstr, Value} =:= "
                "rabbit_misc:table_lookup(amqqueue:get_arguments(Q), Name) end, "
                "Queues = [Q || Q <- rabbit_amqqueue:list(), "
                'Has(Q, <<"x-dead-letter-strategy">>, <<"at-least-once">>), '
                'Has(Q, <<"x-overflow">>, <<"reject-publish">>)], '
                "Workers = [Pid || {_, Pid, _, _} "
                "<- supervisor:which_children(rabbit_fifo_dlx_sup), is_pid(Pid)], "
                "[sys:get_state(Pid) || Pid <- Workers], "
                'io:format("~w", [length(Workers) >= length(Queues)])'
            )
            return printed == "true"

        try:
            until(at_work, "every queue at work", TIMEOUT / 4)
        except AssertionError:
            return False
        return True

    def connections(self) -> int:
        """The number of AMQP connections."""
        return int(self.eval('io:format("~w", [length(rabbit_networking:local_connections())])'))

    def close_all_connections(self, reason: str = "closed by the test") -> None:
        """Close every connection with 320, as an administrator may."""
        self.eval(
            f'[rabbit_networking:close_connection(Pid, "{reason}") '
            "|| Pid <- rabbit_networking:local_connections()]"
        )

    def raise_memory_alarm(self) -> None:
        """Let the server block publishers; when this returns, every connection knows."""
        self._raise_alarm("vm_memory_monitor:set_vm_memory_high_watermark(0.0)")

    def raise_disk_alarm(self) -> None:
        """The same for want of disk space."""
        self._raise_alarm(f"rabbit_disk_monitor:set_disk_free_limit({10**15})")

    def _raise_alarm(self, expression: str) -> None:
        self.eval(expression)

        def known() -> bool:
            states = self.eval(
                '[io:format("~s ", [State]) || Pid <- rabbit_networking:local_connections(), '
                "[{state, State}] <- [rabbit_reader:info(Pid, [state])]]"
            )
            return set(states.split()) <= {"blocking", "blocked"}

        until(known, "every connection blocking")

    def clear_memory_alarm(self) -> None:
        self.eval("vm_memory_monitor:set_vm_memory_high_watermark(0.4)")

    def clear_disk_alarm(self) -> None:
        self.eval(f"rabbit_disk_monitor:set_disk_free_limit({50 * 10**6})")

    # How it is run

    @property
    def _home(self) -> str:
        return f"{self._inside}/home"

    @property
    def _inside(self) -> str:
        """The broker's folder as the server sees it."""
        return str(self.folder) if self._root is None else "/srv"

    def _write_folder(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        cookie = self.folder / ".erlang.cookie"
        cookie.write_text(self._cookie)
        cookie.chmod(0o400)
        (self.folder / "enabled_plugins").write_text("[].\n")
        settings = {
            "tcp_listeners": f"[{{{json.dumps(self.address)}, {self.port}}}]",
            "loopback_users": "[]",
            "log": "[{console, [{enabled, false}]}, {file, [{level, info}]}]",
            **self._config,
        }
        terms = ",\n  ".join(f"{{{name}, {term}}}" for name, term in settings.items())
        (self.folder / "rabbitmq.config").write_text(f"[{{rabbit, [\n  {terms}]}}].\n")
        self._write_home()

    def _write_home(self) -> None:
        """Lay out an installation of links that lacks the optional plugins.

        Erlang looks for each of a thousand modules in every folder of an installation. With those
        of the server alone it starts in 3 s instead of 5 s.
        """
        home = self.folder / "home"
        (home / "plugins").mkdir(parents=True)
        for name in ("sbin", "escript"):
            (home / name).symlink_to(self._as_seen_inside(self._server / name))
        for application in _needed_applications(self._server / "plugins"):
            link = home / "plugins" / application.name
            link.symlink_to(self._as_seen_inside(application))

    def _as_seen_inside(self, path: Path) -> Path:
        return path if self._root is None else Path("/") / path.relative_to(self._root)

    def _environment(self) -> dict[str, str]:
        folder = self._inside
        return {
            "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
            "LANG": "C.UTF-8",
            "HOME": folder,
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "ERL_EPMD_PORT": str(self._epmd_port),
            "ERL_CRASH_DUMP": f"{folder}/erl_crash.dump",
            "RABBITMQ_NODENAME": f"test-{self._dist_port}@localhost",
            "RABBITMQ_DIST_PORT": str(self._dist_port),
            "RABBITMQ_CONF_ENV_FILE": "/dev/null",
            "RABBITMQ_CONFIG_FILE": f"{folder}/rabbitmq.config",
            "RABBITMQ_ADVANCED_CONFIG_FILE": f"{folder}/none.config",
            "RABBITMQ_ENABLED_PLUGINS_FILE": f"{folder}/enabled_plugins",
            "RABBITMQ_GENERATED_CONFIG_DIR": f"{folder}/generated",
            "RABBITMQ_MNESIA_BASE": f"{folder}/data",
            "RABBITMQ_LOG_BASE": f"{folder}/log",
            # The start script then replaces itself instead of waiting for a child.
            "RUNNING_UNDER_SYSTEMD": "true",
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": (
                "+S 2:2 +sbwt none +sbwtdcpu none +sbwtdio none "
                "-start_epmd false -kernel inet_dist_use_interface {127,0,0,1}"
            ),
        }

    def _enter(self, command: Sequence[str]) -> list[str]:
        """`command`, run in the broker's network namespace and root folder."""
        namespace = ["ip", "netns", "exec", self.netns] if self.netns else []
        root: list[str] = []
        if self._root is not None:
            root = ["unshare", "--mount", "--propagation", "private"]
            root += ["sh", "-c", ENTER_ROOT, "sh", str(self._root), str(self.folder)]
        return [*namespace, *root, *command]

    def _run(self, command: Sequence[str], stdin: str = "") -> subprocess.CompletedProcess[str]:
        """Run a command beside the server, where the server is."""
        prefix: list[str] = []
        if self._root is not None or self.netns is not None:
            prefix = ["nsenter", "--target", str(self.pid), "--mount", "--net", "--root"]
            # Otherwise it stays in a folder outside the root, where Erlang does not start.
            prefix.append("--wdns=/")
        return subprocess.run(
            [*prefix, *command],
            input=stdin,
            env=self._environment(),
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
            check=False,
        )

    def _await_amqp(self) -> None:
        assert self._process is not None
        deadline = time.monotonic() + START_TIMEOUT
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() >= deadline:
                log = self.logs
                self.close()
                raise AssertionError(f"RabbitMQ {self.version} did not start\n{log[-4000:]}")
            time.sleep(0.02)

    def _answers(self) -> bool:
        """Whether the server begins a conversation; one that still boots accepts none."""
        try:
            with network.inside(self.netns, self._connect) as connection:
                connection.sendall(PROTOCOL_HEADER)
                return len(connection.recv(1)) == 1
        except OSError:
            return False

    def _connect(self) -> socket.socket:
        return socket.create_connection((self.address, self.port), timeout=2)

    def _signal(self, number: int) -> None:
        assert self._process is not None, "the broker does not run"
        os.kill(self._process.pid, number)

    def _reap(self) -> None:
        assert self._process is not None
        self._process.wait(TIMEOUT)
        self._process = self.pid = None
        self._frozen = False


class SharedBroker:
    """The broker of a test run. A test that leaves it unfit has the next one get a new one."""

    def __init__(self, version: str, new_folder: Callable[[], Path]) -> None:
        self._version = version
        self._new_folder = new_folder
        self._broker: Broker | None = None

    def ready(self) -> Broker:
        """The running broker, with a virtual host of the test's own in use."""
        try:
            if self._broker is None:
                self._broker = Broker(self._new_folder(), self._version)
                self._broker.start()
            self._broker.fresh_vhost()
        except BaseException:
            # One that does not start or has died fails this test, and not all that follow.
            self.close()
            raise
        return self._broker

    def check(self) -> None:
        """Undo what a test may do, or give the broker up."""
        assert self._broker is not None
        broker = self._broker
        if not broker.running or broker.damaged or not broker.recovers():
            self.close()
        else:
            broker.clear_memory_alarm()
            broker.clear_disk_alarm()

    def close(self) -> None:
        if self._broker is not None:
            self._broker.close()
        self._broker = None


def _installed(version: str) -> tuple[Path | None, Path]:
    """Where RabbitMQ `version` is: the root folder to enter, if any, and the server's folder."""
    for tool in ("setpriv", "epmd", "erl_call"):
        if version == "3.10" and shutil.which(tool) is None:
            raise MissingTool(f"{tool} is not installed")
    for root in (None, trixie.root()):
        libraries = (root or Path("/")) / "usr/lib/rabbitmq/lib"
        for server in libraries.glob(f"rabbitmq_server-{version}.*"):
            if root is not None and (os.geteuid() != 0 or shutil.which("unshare") is None):
                raise MissingTool(f"RabbitMQ {version} runs in {root}: that needs root")
            return root, server
    raise MissingTool(
        f"RabbitMQ {version} is neither installed nor in {trixie.root()}"
        " (`python -m tests.harness.trixie` makes that)"
    )


def _needed_applications(plugins: Path) -> list[Path]:
    """The folders of the Erlang applications that `rabbit` needs, itself included."""
    available = {path.name.rpartition("-")[0]: path for path in plugins.iterdir() if path.is_dir()}
    needed: dict[str, Path] = {}
    pending = ["rabbit"]
    while pending:
        name = pending.pop()
        if name in needed or name not in available:
            continue
        needed[name] = available[name]
        description = (available[name] / "ebin" / f"{name}.app").read_text()
        described = re.search(r"\{\s*applications\s*,\s*\[(.*?)\]", description, re.DOTALL)
        if described:
            pending += re.findall(r"[a-z]\w*", re.sub("%.*", "", described[1]))
    return list(needed.values())
