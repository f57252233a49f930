"""Logins that come while an earlier life of the same name still has a medium open."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import structlog
import trio
import trio.testing

from vhostfc.daemon.fabric_reception import MOST_LATE, Reception
from vhostfc.fc.frame import Address, els_request
from vhostfc.fc.login import Login
from vhostfc.fc.wwn import Wwn


async def test_they_wait_for_its_end_and_only_so_many_of_them(nursery: trio.Nursery) -> None:
    arrived: list[tuple[int, bytes]] = []
    door: Any = SimpleNamespace(
        attachments={1: object(), 2: object()}, arrive=lambda f_port, data: arrived.append((f_port, data))
    )
    opening = SimpleNamespace(gone=trio.Event(), adapter=None)
    maker: Any = SimpleNamespace(going=lambda wwpn: [opening] if wwpn == 7 else [])
    nobody: Any = None
    reception = Reception(
        "fabric",
        switch=nobody,
        door=door,
        placement=nobody,
        maker=maker,
        is_down=lambda _: False,
        publish=lambda _event, _values: None,
        nursery=nursery,
        log=structlog.get_logger(),
    )
    flogi = els_request(0, Address.F_PORT, 1, Login.flogi(Wwn(7), Wwn(8)).pack()).pack()
    other = els_request(0, Address.F_PORT, 1, Login.flogi(Wwn(9), Wwn(8)).pack()).pack()
    for _ in range(1000):
        reception.frame(1, flogi)
    reception.frame(2, flogi)
    reception.frame(1, other)
    assert arrived == [(1, other)]
    assert len(nursery.child_tasks) == MOST_LATE + 1, "another F_Port has room of its own"

    door.attachments[2] = object()  # it has gone, and another has come
    opening.gone.set()
    await trio.testing.wait_all_tasks_blocked()
    assert arrived[1:] == [(1, flogi)] * MOST_LATE

    opening.gone = trio.Event()
    reception.frame(1, flogi)
    assert len(nursery.child_tasks) == 1, "there is room again"
    nursery.cancel_scope.cancel()
