"""What is consumed: each work queue, and where its delayed jobs come due."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from workerd.config.model import Queue, Settings
from workerd.core import topology


@dataclass(frozen=True, slots=True)
class Subscription:
    """What is consumed for the jobs of a work queue: itself, or where its delayed jobs come due."""

    queue: Queue
    due: bool = False

    @property
    def name(self) -> str:
        return topology.due(self.queue.name) if self.due else self.queue.name

    @property
    def prefetch(self) -> int:
        # As many as may run at once, or one long job would hold up all that come due meanwhile.
        return self.queue.concurrency if self.due else self.queue.prefetch

    def looks_like(self, other: Subscription) -> bool:
        """Whether the broker sees no difference between the two."""
        return (self.name, self.prefetch) == (other.name, other.prefetch) and (
            self.due or _on_the_wire(self.queue) == _on_the_wire(other.queue)
        )


def subscriptions(settings: Settings) -> Mapping[str, Subscription]:
    """All that an instance with these settings consumes, by name."""
    queues = [settings.queues[name] for name in settings.worker.queues]
    both = [Subscription(queue, due) for queue in queues for due in (False, True)]
    return {each.name: each for each in both}


def _on_the_wire(queue: Queue) -> Queue:
    """What the broker sees of a queue's settings."""
    return replace(queue, concurrency=1, default_handler=None, max_deliveries=1)
