import signal
import threading
import types

import pytest

from cbp_jax import stops


@pytest.fixture
def clock(monkeypatch):
    """Stop the clock; tests advance it by adding to `clock.now`."""
    time = types.SimpleNamespace(now=100.0, monotonic=lambda: time.now)
    monkeypatch.setattr(stops, "time", time)
    return time


@pytest.fixture
def terminated():
    """Handle SIGTERM as the command line does."""
    before = signal.signal(signal.SIGTERM, stops.terminate)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(
    ("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, stops.Terminated)], ids=str
)
def test_a_stop_waits_only_while_it_is_held_back(terminated, clock, number, error):
    told = []
    with stops.held_back(told.append) as held:
        with pytest.raises(error):
            signal.raise_signal(number)
        clock.now += 2.0
        held.hold()
        signal.raise_signal(number)
        assert held.asked and told == ["stopping when the current task ends; interrupt again to stop at once"]
        with pytest.raises(error):
            held.release()
        held.release()
        clock.now += 2.0
        with pytest.raises(error):
            signal.raise_signal(number)


def test_a_second_stop_does_not_wait_unless_it_is_the_first_one_sent_twice(terminated, clock):
    with stops.held_back(print) as held:
        held.hold()
        signal.raise_signal(signal.SIGTERM)
        clock.now += 0.5
        signal.raise_signal(signal.SIGTERM)
        clock.now += 1.0
        with pytest.raises(stops.Terminated):
            signal.raise_signal(signal.SIGTERM)


def test_handlers_are_restored_and_those_of_a_program_are_left_alone():
    received = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        with pytest.raises(ZeroDivisionError), stops.held_back(print) as held:
            held.hold()
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGINT)
            assert received == [signal.SIGTERM] and held.asked
            raise ZeroDivisionError
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    finally:
        signal.signal(signal.SIGTERM, before)


def test_threads_hold_nothing_back():
    found = []

    def run():
        with stops.held_back(print):
            found.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [signal.getsignal(signal.SIGINT)]
