"""Unit attentions, where a unit has met more nexuses than it can know."""

from __future__ import annotations

from vhostfc.scsi.attention import MAX_AWAY, UnitAttentions
from vhostfc.scsi.sense import Asc
from vhostfc.scsi.task import Nexus


def nexus(number: int) -> Nexus:
    return Nexus(number.to_bytes(24, "big"), 1)


def first(attentions: UnitAttentions, one: Nexus) -> int | None:
    sense = attentions.take(one)
    return sense.asc if sense else None


def test_of_those_that_are_away_only_so_many_are_known() -> None:
    """A port that logs in under ever new names must not fill our memory; who is forgotten hears of a power on."""
    attentions = UnitAttentions()
    attentions.attach(nexus(0))
    attentions.take(nexus(0))
    for number in range(1, MAX_AWAY + 11):
        attentions.attach(nexus(number))
        attentions.take(nexus(number))
        attentions.detach(nexus(number))
    assert len(attentions._pending) == 1 + MAX_AWAY
    attentions.establish(Asc.MODE_PARAMETERS_CHANGED)
    assert first(attentions, nexus(0)) == Asc.MODE_PARAMETERS_CHANGED  # it never left
    for number, asc in ((10, Asc.POWER_ON_OCCURRED), (11, Asc.I_T_NEXUS_LOSS_OCCURRED)):
        attentions.attach(nexus(number))
        assert first(attentions, nexus(number)) == asc
    assert first(attentions, nexus(11)) == Asc.MODE_PARAMETERS_CHANGED


def test_leaving_again_makes_one_the_youngest() -> None:
    attentions = UnitAttentions()
    for number in (1, 2, 1):
        attentions.attach(nexus(number))
        attentions.detach(nexus(number))
    for number in range(3, MAX_AWAY + 2):
        attentions.attach(nexus(number))
        attentions.detach(nexus(number))
    assert nexus(1) in attentions._pending
    assert nexus(2) not in attentions._pending
