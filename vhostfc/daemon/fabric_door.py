"""The switch's door as the daemon has it: what is plugged in where, frames in, frames out.

An attachment is whatever carries frames to and from N_Ports: an adapter's link, a Linux kernel's FCoE.
It is plugged into an F_Port, gives the frames that come to arrive(), and is handed those that go out.
Nothing else in the daemon knows of what kind it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

import trio

from vhostfc.fabric.link import Note
from vhostfc.fabric.switch import Output, Switch


class Attachment(Protocol):
    """What is plugged into an F_Port."""

    @property
    def name(self) -> str:
        """What people call it."""
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


class Door:
    """See the head of the file.  kick: called when something may have arrived for the targets."""

    def __init__(self, switch: Switch, *, kick: Callable[[], None]) -> None:
        self.attachments: dict[int, Attachment] = {}
        self._switch = switch
        self._kick = kick

    def plug(self, attachment: Attachment) -> int:
        """Returns the F_Port."""
        f_port = self._switch.attach(attachment.name)
        self.attachments[f_port] = attachment
        return f_port

    def unplug(self, f_port: int) -> None:
        """All N_Ports behind it are logged out."""
        del self.attachments[f_port]
        self.post(self._switch.detach(f_port))
        self._kick()

    def arrive(self, f_port: int, data: bytes) -> None:
        """A frame from an attachment, without SOF, EOF and CRC."""
        self.post(self._switch.receive(f_port, data))
        self._kick()

    def post(self, outputs: Iterable[Output]) -> None:
        """What the switch puts out, to where it goes."""
        for f_port, what in outputs:
            attachment = self.attachments.get(f_port)
            if attachment is not None:
                attachment.post_frame(what)

    async def transmit(self, outputs: Iterable[Output]) -> None:
        """The same, waiting for room on the way."""
        for f_port, what in outputs:
            attachment = self.attachments.get(f_port)
            if attachment is not None:
                await attachment.send_frame(what)
        await trio.lowlevel.checkpoint()
