"""News that come while a look around is under way: they are acted on at once, not when that look is over.

A look may hang for as long as a command may take, because its target is just what the news are about.
"""

from __future__ import annotations

import pytest

from tests.fc.conftest import ARRAY, Pair
from tests.fc.test_discovery import OTHER, other
from tests.fc.tiny import BLOCK, lun
from vhostfc.fc.discovery import Discovered
from vhostfc.fc.frame import Frame, RCtl
from vhostfc.fc.remote import RemoteState


def is_command(frame: Frame) -> bool:
    return frame.r_ctl == RCtl.DATA_UNSOLICITED_COMMAND


@pytest.fixture
def hanging(online: Pair) -> Pair:
    """A look at the units has begun, and the target says nothing."""
    online.array.hold = True
    online.inject(online.fabric.rscn(online.port.port_id, 0x01FE01))
    assert online.remote.state is RemoteState.SCAN
    online.take_events()
    return online


def test_a_target_that_leaves_in_the_middle_of_a_look_has_left_at_once(hanging: Pair) -> None:
    hanging.array.listed = False
    hanging.inject(hanging.fabric.rscn(hanging.port.port_id, 0x01FE01))

    assert hanging.remote.state is RemoteState.UNLISTED
    assert Discovered(3) in hanging.take_events()


def test_one_that_left_and_came_back_in_the_middle_is_looked_at_anew(hanging: Pair) -> None:
    """It does not know of the command that we wait for, and has other units."""
    hanging.array.tasks.clear()
    hanging.array.logins.clear()
    hanging.array.hold = False
    hanging.array.units[lun(7)] = bytearray(BLOCK)
    hanging.inject(hanging.fabric.rscn(hanging.port.port_id, 0x01FE01))

    assert hanging.remote.state is RemoteState.READY
    assert hanging.remote.units == (lun(0), lun(3), lun(7))
    hanging.advance(60)  # the command of the first look ends some time, and nobody minds
    assert hanging.remote.state is RemoteState.READY
    assert not hanging.port._wire.in_use


def test_units_that_change_behind_the_back_of_a_look_are_seen(hanging: Pair) -> None:
    """The list that is on its way is from before the change; it is not what we believe in the end."""
    hanging.array.hold = False
    late = [frame for task in list(hanging.array.tasks.values()) for frame in hanging.array.go_on(task)]
    hanging.array.units[lun(7)] = bytearray(BLOCK)
    hanging.inject(hanging.fabric.rscn(hanging.port.port_id, 0x01FE01))
    hanging.inject(*late)

    assert hanging.remote.units == (lun(0), lun(3), lun(7))


def test_another_target_is_found_while_one_hangs(hanging: Pair) -> None:
    hanging.fabric.targets.append(other())
    hanging.inject(hanging.fabric.rscn(hanging.port.port_id, 0x01FE02))

    assert hanging.port.remotes[OTHER].state is RemoteState.READY
    assert hanging.port.remotes[ARRAY].state is RemoteState.SCAN
    assert not [event for event in hanging.events if isinstance(event, Discovered)]
    hanging.inject(*hanging.array.release())
    assert Discovered(3) in hanging.events


def test_news_without_end_do_not_keep_a_look_from_its_end(online: Pair) -> None:
    """Each of the first few begins it anew; the others are seen to in one more look, after it."""
    online.array.hold = True
    looks = 0
    for _ in range(50):
        online.sent.clear()
        online.inject(online.fabric.rscn(online.port.port_id, 0x01FE01))
        looks += sum(map(is_command, online.sent))
    assert looks == 5
    online.array.units[lun(7)] = bytearray(BLOCK)
    online.sent.clear()
    online.inject(*online.array.release())

    assert online.remote.state is RemoteState.READY
    assert online.remote.units == (lun(0), lun(3), lun(7))
    assert [event.number for event in online.events if isinstance(event, Discovered)][-1] == 51


def test_news_of_too_many_ports_are_news_of_everything(online: Pair) -> None:
    """What is told while the name server is silent is kept, but not without bound."""
    online.lose = lambda frame: frame.r_ctl == RCtl.DATA_UNSOLICITED_CONTROL
    online.port.rescan(online.now)
    for number in range(3):
        online.inject(online.fabric.rscn(online.port.port_id, *range(0x020000 + 255 * number, 0x0200FF + 255 * number)))
    assert len(online.port._discovery._pages) <= 256
    online.lose = lambda _frame: False
    online.array.units[lun(7)] = bytearray(BLOCK)
    online.advance(60)
    assert online.remote.units == (lun(0), lun(3), lun(7))
