"""What the ledger decides over a delivery, apart from a run of it. Pure."""

from __future__ import annotations

from workerd.core.job import Delivery, Run, value
from workerd.core.retry import Verdict


@value
class Rejoined:
    """A redelivery belongs to ``run``, which is still going on here."""

    run: Run


@value
class Settle:
    """An order to settle ``delivery``, now, on the channel it came on."""

    delivery: Delivery
    verdict: Verdict
