"""Those that plug in over the fabric's socket: greeted, served, and not forgotten before they are gone.

A process that has a medium open must be one that can be killed, and stays known until nothing of it can touch the
medium any more.  A Port_Name of which an earlier life still has something open logs in when that is over.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import structlog
import trio

from vhostfc.daemon.fabric_door import Attachment, Door
from vhostfc.daemon.fabric_link import Link, greet
from vhostfc.daemon.fabric_locks import Process
from vhostfc.daemon.fabric_maker import Maker
from vhostfc.daemon.fabric_placement import Placement
from vhostfc.daemon.fdsocket import LinkSocket
from vhostfc.daemon.fencing import OURS, Opening
from vhostfc.errors import LinkLost
from vhostfc.fabric import link
from vhostfc.fabric.link import LinkError, Message, Route
from vhostfc.fabric.switch import Switch
from vhostfc.fabric.target import TargetPort
from vhostfc.fc.els import Els
from vhostfc.fc.frame import Address, Frame, FrameError, RCtl
from vhostfc.fc.login import Login
from vhostfc.scsi.report import lun_number

#: Logins of one F_Port that may wait for the end of an earlier life; what comes beyond is lost, and sent again.
MOST_LATE = 64


class Reception:
    """name: the fabric's, for greetings.  is_down: has a fault taken the link of this holder down?"""

    def __init__(
        self,
        name: str,
        *,
        switch: Switch,
        door: Door,
        placement: Placement,
        maker: Maker,
        is_down: Callable[[str], bool],
        publish: Callable[[str, dict[str, Any]], None],
        nursery: trio.Nursery,
        log: structlog.typing.FilteringBoundLogger,
    ) -> None:
        self._name = name
        self._switch = switch
        self._door = door
        self._placement = placement
        self._maker = maker
        self._is_down = is_down
        self._publish = publish
        self._nursery = nursery
        self._log = log
        self._late: Counter[int] = Counter()  # logins that wait, by F_Port

    async def welcome(self, sock: trio.socket.SocketType) -> None:
        """One connection, from its beginning to its end."""
        with LinkSocket(sock) as connection:
            try:
                process = Process(sock)
            except OSError as error:
                self._log.warning("refused a link: its process could not be fenced", reason=error.strerror)
                return
            openings: list[Opening] = []
            try:
                adapter = await greet(connection, process, self._name, is_down=self._is_down)
                if adapter is not None:
                    openings = await self._serve_link(adapter)
            except (LinkError, LinkLost) as error:
                self._log.warning("refused a link", peer=connection.peer, reason=str(error))
            finally:
                # The process is needed for as long as it may have to be killed.
                if any(not opening.gone.is_set() for opening in openings):
                    self._nursery.start_soon(_farewell, process, openings)
                else:
                    process.close()

    async def _serve_link(self, adapter: Link) -> list[Opening]:
        adapter.f_port = self._door.plug(adapter)
        self._log.info("a link is up", adapter=adapter.name, pid=adapter.pid)
        self._publish("link up", {"holder": adapter.name, "pid": adapter.pid})
        try:
            await adapter.serve(self._handle, self._log)
        finally:
            openings = adapter.lost()
            self._door.unplug(adapter.f_port)
            self._log.info("a link is down", adapter=adapter.name, pid=adapter.pid)
            self._publish("link down", {"holder": adapter.name, "pid": adapter.pid})
        return openings

    def _handle(self, adapter: Link, message: Message) -> None:
        """What an adapter sends, but for acknowledgements.  Raises LinkError for what it may not send."""
        match message:
            case link.Frame(data):
                self.frame(adapter.f_port, data)
            case link.Open():
                self._open(adapter, message)
            case _:
                raise LinkError(f"{message.kind.name} from an adapter")

    def frame(self, f_port: int, data: bytes) -> None:
        """A frame from an F_Port, whatever is behind that."""
        attachment = self._door.attachments[f_port]
        going = self._going(attachment, data)
        if not going:
            self._door.arrive(f_port, data)
        elif self._late[f_port] < MOST_LATE:
            self._late[f_port] += 1
            self._nursery.start_soon(self._late_login, f_port, attachment, data, going)

    def _going(self, attachment: object, data: bytes) -> list[Opening]:
        """For a FLOGI or FDISC: what an earlier life of this Port_Name still has open.

        Its commands may still reach the medium; they must not land behind those of the new life.
        """
        if data[0] != RCtl.ELS_REQUEST or int.from_bytes(data[1:4], "big") != Address.F_PORT:
            return []
        try:
            login = Login.unpack(Frame.unpack(data).payload)
        except FrameError:
            return []
        if login.command not in {Els.FLOGI, Els.FDISC}:
            return []
        return [opening for opening in self._maker.going(login.wwpn) if opening.adapter is not attachment]

    async def _late_login(self, f_port: int, attachment: Attachment, data: bytes, going: list[Opening]) -> None:
        try:
            for opening in going:
                await opening.gone.wait()
        finally:
            self._late[f_port] -= 1
            if not self._late[f_port]:
                del self._late[f_port]
        if self._door.attachments.get(f_port) is attachment:
            self._door.arrive(f_port, data)

    # ------------------------------------------------------------ paths

    def _open(self, adapter: Link, wanted: link.Open) -> None:
        if wanted.seq & OURS:
            raise LinkError(f"OPEN with seq {wanted.seq:#x}, whose top bit is the fabric's")
        login, target = self._switch.login(wanted.s_id), self._switch.target(wanted.d_id)
        if login is not None and login.f_port == adapter.f_port and isinstance(target, TargetPort):
            session = target.sessions.get(wanted.s_id)
            served = self._placement.reachable(target, session, wanted.lun)
            if session is not None and served is not None:
                opening = served.fence.open(
                    adapter,
                    wanted.seq,
                    nexus=session.nexus,
                    wwpn=session.wwpn,
                    lun=lun_number(wanted.lun) or 0,
                    decide=partial(self._placement.verdict, served, target, session, wanted.lun),
                )
                adapter.openings[opening.handle] = (served.fence, opening)
                return
        adapter.post(Route(wanted.seq, 0, 0, gone=True), [])


async def _farewell(process: Process, openings: list[Opening]) -> None:
    try:
        for opening in openings:
            await opening.gone.wait()
    finally:
        process.close()
