"""A request to stop is one, however often it comes at once; asked again later, it is obeyed at once."""

import signal

import pytest

from diffussm.runtime import signals
from diffussm.runtime.signals import StopRequest


@pytest.mark.parametrize("number", StopRequest.SIGNALS)
def test_the_same_request_may_come_twice(number):
    with StopRequest() as stop:
        assert not stop
        signal.raise_signal(number)
        signal.raise_signal(number)  # a terminal's, and a launcher's
        assert stop and stop.signal == signal.Signals(number).name


def test_asked_again_later_it_acts_at_once(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(signals.time, "monotonic", lambda: now[0])
    with pytest.raises(KeyboardInterrupt), StopRequest() as stop:
        signal.raise_signal(signal.SIGINT)
        now[0] = 1.9
        signal.raise_signal(signal.SIGINT)
        assert stop
        now[0] = 2.1
        signal.raise_signal(signal.SIGINT)
        pytest.fail("went on")
