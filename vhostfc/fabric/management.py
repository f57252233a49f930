"""The management server: what HBAs say of themselves (FDMI, FC-GS-6 clause 6).

An HBA is there as long as one of its ports is logged in; a port speaks for itself, and for the HBA that it is a port
of.  An asker finds those HBAs that have a port which zoning shows it.

Its other services (fabric configuration, zone server, ...) are rejected as not supported, which every driver expects:
silence would cost each of them twice R_A_TOV.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field

from vhostfc.fc import ct, fdmi
from vhostfc.fc.ct import CtError, CtIu, Reason
from vhostfc.fc.fdmi import Explanation, Fdmi, RegisterAttributes, RegisterHba, RegisterPort, Simple
from vhostfc.fc.wwn import Wwn

#: Bytes of attributes that an HBA or a port may have; a driver's full set takes 3,000.
MAX_BYTES = 8192


@dataclass(slots=True)
class Hba:
    """A registered HBA.  attributes: by type, as they came.  ports: the same for each port, by its Port_Name."""

    identifier: Wwn
    attributes: dict[int, bytes]
    ports: dict[Wwn, dict[int, bytes]] = field(default_factory=dict)


def _no(explanation: Explanation) -> CtIu:
    return ct.reject(Reason.UNABLE_TO_PERFORM, explanation)


class ManagementServer:
    """hbas: by identifier."""

    def __init__(self) -> None:
        self.hbas: dict[Wwn, Hba] = {}
        self._of_port: dict[Wwn, Hba] = {}

    def hba_of(self, port: Wwn) -> Hba | None:
        """The HBA that has this port."""
        return self._of_port.get(port)

    def forget(self, port: Wwn) -> None:
        """This port is not logged in any more."""
        hba = self._of_port.pop(port, None)
        if hba is not None:
            del hba.ports[port]
            if not hba.ports:
                del self.hbas[hba.identifier]

    def answer(
        self, asker: Wwn, payload: bytes, here: Callable[[Wwn], bool], visible: Callable[[Wwn, Wwn], bool]
    ) -> CtIu:
        """The answer to a CT_IU from a port.

        here: is there a login of this Port_Name?  visible: does zoning show these two each other?
        Raises FrameError when it is no CT_IU at all.
        """
        iu = CtIu.unpack(payload)
        try:
            request = fdmi.parse_request(iu)
        except CtError as error:
            reply = ct.reject(error.reason, error.explanation)
            return dataclasses.replace(reply, fs_type=iu.fs_type, fs_subtype=iu.fs_subtype)
        match request:
            case RegisterHba():
                reply = self._register(asker, request, here)
            case RegisterPort():
                reply = self._register_port(asker, request)
            case RegisterAttributes():
                reply = self._add(asker, request)
            case Simple():
                reply = self._simple(asker, request, visible)
        return fdmi.answer(reply)

    # ------------------------------------------------------------ registrations

    def _register(self, asker: Wwn, request: RegisterHba, here: Callable[[Wwn], bool]) -> CtIu:
        if request.hba in self.hbas or asker in self._of_port:
            return _no(Explanation.HBA_ALREADY_REGISTERED)
        if asker not in request.ports:
            return _no(Explanation.HBA_NOT_IN_PORT_LIST)
        if _size(request.attributes) > MAX_BYTES:
            return _no(Explanation.INVALID_HBA_BLOCK_LENGTH)
        hba = self.hbas[request.hba] = Hba(request.hba, dict(request.attributes))
        for port in request.ports:
            if port not in self._of_port and here(port):
                self._join(hba, port)
        return ct.accept()

    def _join(self, hba: Hba, port: Wwn) -> None:
        hba.ports[port] = {}
        self._of_port[port] = hba

    def _register_port(self, asker: Wwn, request: RegisterPort) -> CtIu:
        hba = self.hbas.get(request.hba)
        if hba is None:
            return _no(Explanation.HBA_NOT_REGISTERED)
        if request.port != asker:
            return _no(Explanation.PORT_NOT_REGISTERED)
        if _size(request.attributes) > MAX_BYTES:
            return _no(Explanation.INVALID_PORT_BLOCK_LENGTH)
        if self._of_port.get(asker, hba) is not hba:
            return _no(Explanation.HBA_ALREADY_REGISTERED)
        self._join(hba, asker)
        hba.ports[asker].update(request.attributes)
        return ct.accept()

    def _add(self, asker: Wwn, request: RegisterAttributes) -> CtIu:
        hba = self._of_port.get(asker)
        if request.command is Fdmi.RHAT:
            if hba is None or hba.identifier != request.name:
                return _no(Explanation.HBA_NOT_REGISTERED)
            had, too_long = hba.attributes, Explanation.INVALID_HBA_BLOCK_LENGTH
        else:
            if hba is None or request.name != asker:
                return _no(Explanation.PORT_NOT_REGISTERED)
            had, too_long = hba.ports[asker], Explanation.INVALID_PORT_BLOCK_LENGTH
        if _size({**had, **request.attributes}) > MAX_BYTES:
            return _no(too_long)
        had.update(request.attributes)
        return ct.accept()

    # ------------------------------------------------------------ what needs a name only

    def _simple(self, asker: Wwn, request: Simple, visible: Callable[[Wwn, Wwn], bool]) -> CtIu:
        def shown(hba: Hba) -> bool:
            return any(visible(asker, port) for port in hba.ports)

        command, name = request.command, request.name
        if command is Fdmi.GRHL:
            return ct.accept(fdmi.pack_names([hba.identifier for hba in self.hbas.values() if shown(hba)]))
        mine = self._of_port.get(asker)
        if command in (Fdmi.GPAT, Fdmi.DPRT, Fdmi.DPA):
            hba = self._of_port.get(name)
            if hba is None or (command is Fdmi.GPAT and not visible(asker, name)):
                return _no(Explanation.PORT_NOT_REGISTERED)
            if command is Fdmi.GPAT:
                return ct.accept(fdmi.pack_attributes(hba.ports[name]))
            if name != asker:
                return _no(Explanation.PORT_NOT_REGISTERED)
            if command is Fdmi.DPRT:
                self.forget(name)
            else:
                hba.ports[name].clear()
            return ct.accept()
        hba = self.hbas.get(name)
        if hba is None or not shown(hba):
            return _no(Explanation.HBA_NOT_REGISTERED)
        match command:
            case Fdmi.GHAT:
                return ct.accept(fdmi.pack_hba(hba.ports, hba.attributes))
            case Fdmi.GRPL:
                return ct.accept(fdmi.pack_names(list(hba.ports)))
        if hba is not mine:
            return _no(Explanation.HBA_NOT_REGISTERED)
        if command is Fdmi.DHAT:
            hba.attributes.clear()
        else:
            for port in list(hba.ports):
                self.forget(port)
        return ct.accept()


def _size(attributes: fdmi.Attributes) -> int:
    return sum(4 + len(value) for value in attributes.values())
