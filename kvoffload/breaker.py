"""When a drive is left alone after it failed, and when it is tried again. Scheduler side, one thread."""

from collections.abc import Callable
from enum import IntEnum

PAUSE_MIN_S, PAUSE_MAX_S = 1.0, 60.0


class BreakerState(IntEnum):
    """Numbered as the metric kvoffload_drive_state exports them."""

    CLOSED = 0  # in use
    HALF_OPEN = 1  # tried with as little as possible, until that succeeds
    OPEN = 2  # left alone


class Breaker:
    """Of one drive in one direction. Closed until `trip`; then open for a pause, one second at first; then half-open, until
    a success closes it or `trip` opens it again for twice as long, a minute at most.

    A drive that fails soon after it was taken back has not healed: the pause goes on doubling unless the breaker was closed
    for as long as it had been open.

    What ends counts if the breaker is closed or its trial runs. A trial begins when nothing is in flight any more, so what
    began before the breaker opened, and may have been answered before, is not taken for its outcome.
    """

    def __init__(self, clock: Callable[[], float]):
        self._clock = clock
        self.closed = True
        self._trying = False
        self._pause_s = 0.0
        self._until = 0.0  # the end of the pause
        self._closed_since = 0.0

    @property
    def state(self) -> BreakerState:
        if self.closed:
            return BreakerState.CLOSED
        return BreakerState.OPEN if self._clock() < self._until else BreakerState.HALF_OPEN

    @property
    def again(self) -> bool:
        """Whether it opened, the last time, before the drive had healed from the time before."""
        return self._pause_s > PAUSE_MIN_S

    @property
    def counts(self) -> bool:
        """Whether what ends now says anything about the drive."""
        return self.closed or self._trying

    def begin(self) -> None:
        """An operation begins. If the breaker is half-open none but those of the same trial may be in flight."""
        self._trying = self.state is BreakerState.HALF_OPEN

    def trip(self) -> None:
        """The drive failed. REQUIRES: the breaker is not open."""
        now = self._clock()
        if self.closed and now - self._closed_since >= self._pause_s:
            self._pause_s = 0.0
        self._pause_s = min(PAUSE_MAX_S, max(PAUSE_MIN_S, 2 * self._pause_s))
        self._until = now + self._pause_s
        self.closed = self._trying = False

    def close(self) -> None:
        """The drive works. REQUIRES: the breaker is half-open."""
        self.closed = True
        self._trying = False
        self._closed_since = self._clock()

    def never_close(self) -> None:
        self.closed = self._trying = False
        self._until = float("inf")

    def left_s(self) -> float:
        """Seconds of the pause to come; 0 if the breaker is not open."""
        return 0.0 if self.closed else max(0.0, self._until - self._clock())
