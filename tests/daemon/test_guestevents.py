"""The event queue's bookkeeping: merging, order, and the missed bit."""

from __future__ import annotations

from vhostfc.daemon.guestevents import GuestEvent, GuestEvents, Kind

ARRIVED = GuestEvent(Kind.ARRIVED, 0, 5)
REMOVED = GuestEvent(Kind.REMOVED, 0, 5)
GROWN = GuestEvent(Kind.PARAMETERS, 0, 5, 0x2A, 0x09)


def drain(events: GuestEvents) -> list[GuestEvent]:
    out = []
    while (event := events.first()) is not None:
        out.append(event)
        events.delivered(event, missed=events.missed)
    return out


def waiting(*added: GuestEvent) -> list[GuestEvent]:
    events = GuestEvents()
    for event in added:
        events.add(event)
    return drain(events)


def test_order_is_kept_between_units() -> None:
    other = GuestEvent(Kind.ARRIVED, 1, 0)

    assert waiting(ARRIVED, other) == [ARRIVED, other]


def test_a_unit_that_comes_and_goes_unannounced_is_not_mentioned() -> None:
    assert waiting(ARRIVED, GROWN, REMOVED) == []


def test_a_replaced_unit_is_removed_and_then_arrives() -> None:
    assert waiting(REMOVED, ARRIVED) == [REMOVED, ARRIVED]


def test_a_removal_makes_a_parameter_change_moot() -> None:
    assert waiting(GROWN, REMOVED) == [REMOVED]


def test_a_removal_of_a_replaced_unit_is_told_once() -> None:
    assert waiting(REMOVED, ARRIVED, REMOVED) == [REMOVED]


def test_the_same_change_is_told_once() -> None:
    assert waiting(GROWN, GROWN) == [GROWN]


def test_what_does_not_fit_is_missed_and_said_once() -> None:
    events = GuestEvents(limit=1)
    events.add(ARRIVED)
    events.add(GuestEvent(Kind.ARRIVED, 1, 0))

    assert events.missed
    assert len(events) == 2
    assert drain(events) == [ARRIVED]
    assert not events.missed


def test_a_reset_forgets_everything() -> None:
    events = GuestEvents(limit=1)
    events.add(ARRIVED)
    events.add(GROWN)
    events.clear()

    assert len(events) == 0
