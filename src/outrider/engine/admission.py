"""Which requests have a row, which wait for one, and how many prompt tokens each step reads."""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Callable, Iterator

from outrider.engine.request import Request
from outrider.engine.rows import Rows

__all__ = ["Admission", "Queue"]

OLDEST = 8  # every so many requests that leave the queue, one is that which has waited longest
FEW = 64  # finished requests that may stay in the queue whatever its length


class Queue:
    """Waiting requests, those of the smallest ``priority`` first, in order of arrival among equals.

    One in OLDEST goes by arrival alone, so that nobody waits for ever. No call takes longer where more requests wait.
    """

    def __init__(self) -> None:
        self._of: dict[int, deque[Request]] = {}  # by priority; a finished request goes when it comes to the front
        self._priorities: list[int] = []  # sorted
        self._waiting = self._finished = self._taken = 0

    def __len__(self) -> int:
        return self._waiting

    def __iter__(self) -> Iterator[Request]:
        for priority in self._priorities:
            yield from (request for request in self._of[priority] if request.finish_reason is None)

    def add(self, request: Request) -> None:
        """The last of its priority."""
        self._queue(request.params.priority).append(request)
        self._waiting += 1

    def restore(self, request: Request) -> None:
        """A request that had a row: the first of its priority."""
        self._queue(request.params.priority).appendleft(request)
        self._waiting += 1

    def first(self) -> Request | None:
        """The next one to get a row."""
        heads = self._heads()
        if (self._taken + 1) % OLDEST:
            return next(heads, None)
        return min(heads, key=lambda request: request.number, default=None)

    def take(self, request: Request) -> None:
        """Remove the request that was ``first``."""
        queue = self._of[request.params.priority]
        assert queue[0] is request, "only the first request of a priority can be taken"
        queue.popleft()
        self._waiting -= 1
        self._taken += 1

    def discard(self, request: Request) -> None:
        """A waiting request has finished without a row."""
        assert request.finish_reason is not None, "it is recognised by that"
        self._waiting -= 1
        self._finished += 1
        if self._finished > max(FEW, self._waiting):
            for priority, queue in self._of.items():
                self._of[priority] = deque(one for one in queue if one.finish_reason is None)
            self._finished = 0

    def _queue(self, priority: int) -> deque[Request]:
        if priority not in self._of:
            self._of[priority] = deque()
            insort(self._priorities, priority)
        return self._of[priority]

    def _heads(self) -> Iterator[Request]:
        """The first request of each priority that has any."""
        for priority in self._priorities:
            queue = self._of[priority]
            while queue and queue[0].finish_reason is not None:
                queue.popleft()
                self._finished -= 1
            if queue:
                yield queue[0]


class Admission:
    """Up to ``max_rows`` rows, and ``chunk`` prompt tokens in a step, ``beside`` where other rows decode."""

    def __init__(self, max_rows: int, chunk: int, beside: int | None = None) -> None:
        self.max_rows, self.chunk = max_rows, chunk
        self.beside = chunk if beside is None else min(beside, chunk)
        self.waiting = Queue()
        self.running: list[Request] = []
        self._refused: Request | None = None  # there was no memory for it, and none was given back since
        self._latest: Rows | None = None  # of the step before

    def __len__(self) -> int:
        return len(self.waiting) + len(self.running)

    def admit(self, open_slot: Callable[[Request], bool]) -> None:
        """Give waiting requests the free rows, in order, until one finds no memory."""
        while len(self.running) < self.max_rows:
            request = self.waiting.first()
            if request is None or request is self._refused:
                return
            if not open_slot(request):
                self._refused = request
                return
            self.waiting.take(request)
            self.running.append(request)

    def next(self) -> Rows:
        """The rows of the next step."""
        self._latest = Rows(*self._shares(), self._latest)
        return self._latest

    def _shares(self) -> tuple[list[Request], list[int]]:
        """Share out the step's prompt tokens, the smallest priority first; rows that decode always take part."""
        reading = [request for request in self.running if request.pending > 1]
        if not reading:
            return self.running.copy(), [request.pending for request in self.running]
        budget = self.chunk if len(reading) == len(self.running) else self.beside
        chunks = {}
        for request in sorted(reading, key=lambda request: request.params.priority):
            chunks[request.number] = min(request.pending, budget)
            budget -= chunks[request.number]
        shares = [(request, chunks.get(request.number, 1)) for request in self.running]
        shares = [(request, chunk) for request, chunk in shares if chunk]
        return [request for request, _ in shares], [chunk for _, chunk in shares]

    def freed(self) -> None:
        """Memory was given back."""
        self._refused = None

    def preempt(self, request: Request) -> None:
        """Back into the queue: its text goes on from where it is once it has a row again."""
        self.running.remove(request)
        self.waiting.restore(request)
