"""`workerd metrics`: prints or serves what Prometheus reads."""

from __future__ import annotations

import argparse
import threading
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from workerd.cli.options import add_instance
from workerd.control import protocol
from workerd.errors import EX_NOPERM, EX_OK, EX_UNAVAILABLE, CommandError, WorkerdError
from workerd.output import print_bytes

if TYPE_CHECKING:
    from types import ModuleType

METRICS = """\
Print the metrics of every instance of this host as Prometheus reads them. Asks
the instances; one that was stopped has none. --serve answers over HTTP, which
is what workerd-metrics.socket starts; docs/metrics.md explains each metric."""
METRICS_EPILOG = f"""\
exit status:
  0   printed; with --serve: nobody has asked for some minutes
  64  usage
  69  the library prometheus_client is not installed (--serve answers so),
      nothing is known of the instance that --instance names, or --serve was
      given no socket
  77  only members of {protocol.GROUP} may ask the instances

examples:
  workerd metrics | grep workerd_jobs_total
  systemctl enable --now workerd-metrics.socket
  curl http://127.0.0.1:15693/metrics
"""

#: Seconds for which one look at the instances is good enough for all who ask over HTTP.
_FRESH = 1.0

States = list[dict[str, Any]]
Application = Callable[..., Iterable[bytes]]


def add_metrics(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.description, parser.epilog = METRICS, METRICS_EPILOG
    add_instance(parser, "all of this host")
    parser.add_argument(
        "--serve",
        action="store_true",
        help="answer over HTTP on the socket that systemd hands over",
    )
    parser.set_defaults(carry_out=_metrics)


def _metrics(args: argparse.Namespace) -> int:
    if args.serve:
        from workerd.cli import metrics_http

        metrics_http.serve(_application(Shared(lambda: _look(args.instance))))
        return EX_OK
    prometheus = _prometheus()
    states = _look(args.instance)
    print_bytes(prometheus.text(lambda: states))
    unknown = [state for state in states if state["state"] == "unknown"]
    if unknown and len(unknown) == len(states):
        raise CommandError(EX_NOPERM, str(unknown[0]["why"]))
    return EX_OK


def _application(look: Shared) -> Application:
    """What answers over HTTP; where the library is missing, how to get it.

    To end instead would make systemd start us for the same client again, until it gives up.
    """

    def answer(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        try:
            prometheus = _prometheus()
        except CommandError as missing:
            start_response("503 Service Unavailable", [("Content-Type", "text/plain")])
            return [f"{missing}\n".encode()]
        application: Application = prometheus.application(look)
        return application(environ, start_response)

    return answer


def _prometheus() -> ModuleType:
    """Raises CommandError where the library is missing, which is optional."""
    try:
        from workerd.cli import prometheus
    except ModuleNotFoundError as missing:
        if missing.name != "prometheus_client":
            raise
        text = (
            "metrics: the library prometheus_client is missing: "
            "apt install python3-prometheus-client, or pip install prometheus_client"
        )
        raise CommandError(EX_UNAVAILABLE, text) from None
    return prometheus


def _look(instance: str | None) -> States:
    """What each instance answers. Raises CommandError for a name that nobody knows."""
    from workerd.control.instances import states

    try:
        return list(states(instance, "metrics"))
    except WorkerdError as error:
        raise CommandError(EX_UNAVAILABLE, str(error)) from None


class Shared:
    """One look for all who want one at about the same time; they wait for it together."""

    def __init__(self, look: Callable[[], States]) -> None:
        self._look = look
        self._lock = threading.Lock()
        self._found: States = []
        self._at = float("-inf")

    def __call__(self) -> States:
        with self._lock:
            if time.monotonic() - self._at > _FRESH:
                self._found = self._look()
                self._at = time.monotonic()
            return self._found
