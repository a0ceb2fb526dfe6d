"""Stop requests: a signal sets a flag, and whoever works in steps looks at it between two of them."""

import signal
import time
from collections.abc import Callable
from types import FrameType, TracebackType

REPEAT_SECONDS = 2.0


class StopRequest:
    """While active, the first SIGTERM, SIGUSR1 or SIGINT asks for a stop; the same one again, later, acts at once.

    A terminal, `timeout` and srun signal all processes of a job, and a launcher hands on what it gets: the same
    request comes twice within moments.

    Args:
        on_request: called once, by the first of them.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

    def __init__(self, on_request: Callable[[], object] = lambda: None) -> None:
        self.signal: str | None = None
        self._on_request = on_request
        self._previous: dict[int, object] = {}
        self._asked: dict[int, float] = {}  # when, by number

    def __bool__(self) -> bool:
        return self.signal is not None

    def __enter__(self) -> "StopRequest":
        for number in self.SIGNALS:
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        is_first, self.signal = self.signal is None, signal.Signals(number).name
        if is_first:
            self._on_request()
        if time.monotonic() - self._asked.setdefault(number, time.monotonic()) > REPEAT_SECONDS:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
            signal.raise_signal(number)
