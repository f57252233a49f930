"""The switch's door as the daemon has it: what is plugged in where, frames in, frames out.

An attachment is whatever carries frames to and from N_Ports: an adapter's link, a Linux kernel's FCoE.
It is plugged into an F_Port, gives the frames that come to arrive(), and is handed those that go out.
Nothing else in the daemon knows of what kind it is.

Faults and captures are here, where every frame passes.  A capture shows each frame once, on the
interface of the port that sent it: an F_Port for what comes from outside, a target port, or the switch
itself.  It shows what went on, so a frame that a fault has changed is there as changed; a comment says
what happened to it, and why the switch discarded it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Protocol

import trio

from vhostfc.fabric.faults import Active, Direction, Fate, FrameFaults
from vhostfc.fabric.link import Note
from vhostfc.fabric.pcapng import Interface, Record
from vhostfc.fabric.switch import NPort, Output, Switch
from vhostfc.fc.els import Els
from vhostfc.fc.frame import HEADER_LENGTH, Address, RCtl
from vhostfc.fc.login import LENGTH as LOGIN_LENGTH
from vhostfc.fc.wwn import Wwn


class Attachment(Protocol):
    """What is plugged into an F_Port."""

    @property
    def name(self) -> str:
        """What people call it."""
        ...

    @property
    def kind(self) -> str:
        """What it is, in a word: "link", "fcoe"."""
        ...

    @property
    def pid(self) -> int | None:
        """The process behind it, None when that is not known."""
        ...

    def post_frame(self, what: bytes | Note) -> None:
        """Send a frame, or a sentence that goes with the frame after it, when its turn comes."""
        ...

    async def send_frame(self, what: bytes | Note) -> None:
        """The same, when there is room on the way."""
        ...

    def link_down(self) -> None:
        """Let the other side see that the link is down.  Until link_up() the door lets no frame through."""
        ...

    def link_up(self) -> None:
        """The link may come up again."""
        ...

    def clear_virtual_link(self, ports: Sequence[NPort]) -> bool:
        """Tell these N_Ports that their links are cleared (FIP), and log them out; False when it cannot be told."""
        ...


class Tap(Protocol):
    """Who wants to see the frames."""

    def put(self, record: Record) -> None: ...


class Door:
    """See the head of the file.

    kick: called when something may have arrived for the targets.  later: does something after so many
    seconds.  hit: is told of faults that have hit a frame.  taps: who sees the frames.
    """

    def __init__(
        self,
        switch: Switch,
        *,
        kick: Callable[[], None],
        later: Callable[[float, Callable[[], None]], None],
        hit: Callable[[Active, str], None],
    ) -> None:
        self.attachments: dict[int, Attachment] = {}
        self.faults = FrameFaults(self._name_of)
        self.taps: list[Tap] = []
        self._switch = switch
        self._kick = kick
        self._later = later
        self._hit = hit
        self._down: set[int] = set()

    # ------------------------------------------------------------ what is plugged in

    def plug(self, attachment: Attachment) -> int:
        """Returns the F_Port."""
        f_port = self._switch.attach(attachment.name)
        self.attachments[f_port] = attachment
        return f_port

    def unplug(self, f_port: int) -> None:
        """All N_Ports behind it are logged out."""
        del self.attachments[f_port]
        self._down.discard(f_port)
        self.post(self._switch.detach(f_port))
        self._kick()

    def link_down(self, f_port: int) -> None:
        """Take the link of an F_Port down: its N_Ports are logged out, and nothing passes until link_up()."""
        self._down.add(f_port)
        self.post(self._switch.reset(f_port))
        self._kick()
        self.attachments[f_port].link_down()

    def link_up(self, attachment: Attachment) -> None:
        """The link may come up again; it may be plugged in elsewhere by now, or not at all."""
        self._down -= {f_port for f_port, other in self.attachments.items() if other is attachment}
        attachment.link_up()

    def is_down(self, f_port: int) -> bool:
        return f_port in self._down

    def log_out(self, ports: Iterable[NPort]) -> None:
        """The fabric ends these logins, and says so with LOGO."""
        for port in ports:
            self.post(self._switch.log_out(port.port_id))
        self._kick()

    def clear_virtual_links(self, ports: Sequence[NPort]) -> None:
        """The same in the words of each attachment: Clear Virtual Link where it has that, else LOGO."""
        for f_port in dict.fromkeys(port.f_port for port in ports):
            those = [port for port in ports if port.f_port == f_port]
            told = self.attachments[f_port].clear_virtual_link(those)
            for port in those:
                if self._switch.login(port.port_id) is port:
                    self.post(self._switch.log_out(port.port_id, tell=not told))
        self._kick()

    # ------------------------------------------------------------ frames

    def arrive(self, f_port: int, data: bytes) -> None:
        """A frame from an attachment, without SOF, EOF and CRC."""
        if f_port in self._down:
            return
        fate = self._meet(Direction.IN, data)
        if not fate.copies:
            self._show(self._of_f_port(f_port), data, fate.comment)
        for seconds, copy in fate.copies:
            if seconds:
                self._later(seconds, partial(self._enter, f_port, copy, fate.comment))
            else:
                self._enter(f_port, copy, fate.comment)
        if fate.answer is not None:
            self.post([(f_port, fate.answer.pack())])

    def _enter(self, f_port: int, data: bytes, comment: str) -> None:
        if f_port not in self.attachments or f_port in self._down:
            return
        outputs = self._switch.receive(f_port, data)
        if self.taps:
            outputs = self._shown(f_port, data, comment, outputs)
        self.post(outputs)
        self._kick()

    def _shown(self, f_port: int, data: bytes, comment: str, outputs: list[Output]) -> list[Output]:
        """Show a frame that has come in; returns what is still to go out.

        What is forwarded was sent by this port: whatever happens to it on the way out, it is shown here.
        """
        passed = [(port, what, self._meet(Direction.OUT, what)) for port, what in outputs if what is data]
        why = f"discarded: {self._switch.why}" if self._switch.why else ""
        told = [comment, why, *(fate.comment for _, _, fate in passed)]
        self._show(self._of_f_port(f_port), data, "; ".join(word for word in told if word))
        for port, _, fate in passed:
            self._dispatch(port, fate)
        return [output for output in outputs if output[1] is not data]

    def post(self, outputs: Iterable[Output]) -> None:
        """What the switch puts out, to where it goes."""
        note = ""
        for f_port, what in outputs:
            attachment = self.attachments.get(f_port)
            if attachment is None or f_port in self._down:
                continue
            if isinstance(what, Note):
                note = what.text
                attachment.post_frame(what)
                continue
            fate = self._leave(what, note)
            note = ""
            self._dispatch(f_port, fate)

    async def transmit(self, outputs: Iterable[Output]) -> None:
        """The same, waiting for room on the way."""
        for f_port, what in outputs:
            attachment = self.attachments.get(f_port)
            if attachment is None or f_port in self._down:
                continue
            fate = Fate(((0.0, b""),)) if isinstance(what, Note) else self._leave(what)
            for seconds, copy in fate.copies:
                if seconds:
                    self._later(seconds, partial(self._post_one, f_port, copy))
                else:
                    await attachment.send_frame(copy or what)
        await trio.lowlevel.checkpoint()

    def _leave(self, data: bytes, note: str = "") -> Fate:
        """A frame of the switch's own or of a target is on its way out."""
        fate = self._meet(Direction.OUT, data)
        if self.taps:
            said = "; ".join(word for word in (note, self._login_told(data), fate.comment) if word)
            for _, copy in fate.copies or ((0.0, data),):
                self._show(self._of_sender(data), copy, said)
        return fate

    def _dispatch(self, f_port: int, fate: Fate) -> None:
        for seconds, copy in fate.copies:
            if seconds:
                self._later(seconds, partial(self._post_one, f_port, copy))
            else:
                self._post_one(f_port, copy)

    def _post_one(self, f_port: int, data: bytes) -> None:
        attachment = self.attachments.get(f_port)
        if attachment is not None and f_port not in self._down:
            attachment.post_frame(data)

    # ------------------------------------------------------------ faults

    def _meet(self, direction: Direction, data: bytes | Note) -> Fate:
        assert not isinstance(data, Note)
        if not self.faults:
            return Fate(((0.0, data),))
        fate = self.faults.meet(direction, data)
        for active in fate.hits:
            self._hit(active, f"a frame from {data[5:8].hex()} to {data[1:4].hex()}")
        return fate

    def _name_of(self, port_id: int) -> Wwn | None:
        port = self._switch.login(port_id) or self._switch.target(port_id)
        return port.wwpn if port is not None else None

    # ------------------------------------------------------------ captures

    def _show(self, interface: Interface, data: bytes, comment: str) -> None:
        if self.taps:
            record = Record(time.time_ns(), interface, data, comment)
            for tap in self.taps:
                tap.put(record)

    def _of_f_port(self, f_port: int) -> Interface:
        attachment = self.attachments[f_port]
        process = "" if attachment.pid is None else f", process {attachment.pid}"
        return Interface(attachment.name, f"F_Port {f_port}, {attachment.kind}{process}")

    def _of_sender(self, data: bytes) -> Interface:
        target = self._switch.target(int.from_bytes(data[5:8], "big"))
        if target is None:
            return Interface("switch", f"the switch {self._switch.name}")
        return Interface(target.name, f"target port {target.wwpn}")

    def _login_told(self, data: bytes) -> str:
        """Who it is that is given an N_Port_ID."""
        if data[0] != RCtl.ELS_REPLY or int.from_bytes(data[5:8], "big") != Address.F_PORT:
            return ""
        login = self._switch.login(int.from_bytes(data[1:4], "big"))
        if login is None or data[HEADER_LENGTH] != Els.LS_ACC or len(data) < HEADER_LENGTH + LOGIN_LENGTH:
            return ""
        return f"{login.port_id:06x} is {login.wwpn} of {login.holder}"
