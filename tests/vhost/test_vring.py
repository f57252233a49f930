"""A ring's state table and set-up."""

from __future__ import annotations

import pytest

from vhostfc.vhost.messages import ProtocolError, VringAddr
from vhostfc.vhost.vring import ENABLED, STARTED, TRANSITIONS, RingEvent, RingState, Vring


def test_every_state_knows_every_event() -> None:
    assert set(TRANSITIONS) == set(RingState)
    assert all(set(row) == set(RingEvent) for row in TRANSITIONS.values())


@pytest.mark.parametrize("state", RingState)
def test_started_and_enabled_are_independent(state: RingState) -> None:
    """Each event changes its own half and leaves the other; RESET clears both."""

    def halves(state: RingState) -> tuple[bool, bool]:
        return state in STARTED, state in ENABLED

    was_started, was_enabled = halves(state)

    assert halves(TRANSITIONS[state][RingEvent.KICK]) == (True, was_enabled)
    assert halves(TRANSITIONS[state][RingEvent.BASE]) == (False, was_enabled)
    assert halves(TRANSITIONS[state][RingEvent.ENABLE]) == (was_started, True)
    assert halves(TRANSITIONS[state][RingEvent.DISABLE]) == (was_started, False)
    assert TRANSITIONS[state][RingEvent.RESET] is RingState.IDLE


def test_the_parts_of_a_ring_include_their_event_index_words() -> None:
    """virtio 1.3, 2.7: 16 n, 6 + 2 n and 6 + 8 n bytes."""
    ring = Vring(2)
    assert list(ring.parts()) == []
    ring.set_size(256)
    assert list(ring.parts()) == []
    ring.set_addresses(VringAddr(2, 0, desc=0x1000, used=0x3000, avail=0x2000))

    assert list(ring.parts()) == [
        ("descriptor table", 0x1000, 4096),
        ("available ring", 0x2000, 518),
        ("used ring", 0x3000, 2054),
    ]


def test_a_ring_that_was_forgotten_keeps_what_front_ends_send_only_once() -> None:
    ring = Vring(2, RingState.RUNNING, 128, VringAddr(2, 0, 0, 0, 0), 7, kick_fd=3, call_fd=4, err_fd=5)

    ring.forget()

    assert ring == Vring(2, kick_fd=3, call_fd=4, err_fd=5)


def test_a_running_ring_is_not_set_up() -> None:
    ring = Vring(2, RingState.PAUSED)
    with pytest.raises(ProtocolError, match="ring 2 is running"):
        ring.set_size(128)
    with pytest.raises(ProtocolError, match="ring 2 is running"):
        ring.set_base(1)
    assert ring == Vring(2, RingState.PAUSED)
