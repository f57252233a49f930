"""The life of a vport: which HBA port it gets, how it is made, waited for, adopted, renamed and taken away.

vport_create says only that the kernel has made one; whether the fabric lets it in is read from vport_state, which no
event announces.  Every state and every errno becomes a sentence for an administrator.

Ours is a vport with our symbolic name, or one without a name that our own note says we were making when we died.
Others' are never touched, whatever their WWPN.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import structlog
import trio

from vhostfc.errors import LoginRefused
from vhostfc.fc.wwn import Wwn
from vhostfc.ports.base import PortIdentity
from vhostfc.ports.kernel import Kernel
from vhostfc.ports.ownfiles import OwnFiles
from vhostfc.ports.sysfs import FcHost, Vport

ACTIVE = "Active"
#: How often a state is looked at while it is waited for, seconds: nothing tells of its change.
LOOK = 0.05
#: fc_vport symbolic_name: FC_VPORT_SYMBOLIC_NAMELEN less the final zero.
SYMBOLIC_NAME_MAX = 63


@dataclass(frozen=True, slots=True)
class Parents:
    """Which ports of HBAs may carry a vport: by host, by WWPN, by the fabric that they are in; nothing said: any."""

    hosts: tuple[str, ...] = ()
    wwpns: tuple[Wwn, ...] = ()
    fabric: Wwn | None = None

    def __str__(self) -> str:
        words = [*self.hosts, *map(str, self.wwpns)]
        if self.fabric is not None:
            words.append(f"any port in the fabric {self.fabric}")
        return ", ".join(words) or "any port"

    def means(self, host: FcHost) -> bool:
        if self.hosts or self.wwpns:
            named = host.name in self.hosts or f"scsi_{host.name}" in self.hosts or host.wwpn in self.wwpns
            return named and self.fabric in {None, host.fabric_name}
        return self.fabric is None or host.fabric_name == self.fabric


class _Stuck(Exception):
    """The vport does not become Active, and disabling and enabling it has not helped."""


class NoParent(LoginRefused):
    """No HBA port can carry the vport now; `passing`: that may change by itself."""

    def __init__(self, message: str, *, passing: bool) -> None:
        super().__init__(message)
        self.passing = passing


def why_not(host: FcHost) -> str | None:
    """Why this port cannot carry another vport now; None when it can."""
    if host.vport_create is None:
        return (
            f"{host} makes no vports: is it a vport itself, or is NPIV off in its driver ({host.driver or 'unknown'})?"
        )
    if host.state != "Online":
        return f"{host} is {host.state}: look at its cable and at the switch's port"
    if host.vports_in_use >= host.max_vports:
        return f"{host} has {host.vports_in_use} of {host.max_vports} vports in use"
    return None


def candidates(hosts: Sequence[FcHost], parents: Parents) -> list[FcHost]:
    """The ports that can carry the vport, the least used first.  Raises NoParent that tells of each why it cannot."""
    physical = [host for host in hosts if host.vport_create is not None or host.name in parents.hosts]
    meant = [host for host in physical if parents.means(host)]
    if not meant:
        there = ", ".join(str(host) for host in physical) or "no port that makes vports"
        raise NoParent(f"no HBA port here is {parents}; there is {there}", passing=False)
    reasons = {host.name: why_not(host) for host in meant}
    able = [host for host in meant if reasons[host.name] is None]
    if not able:
        passing = any(host.vport_create is not None and host.state != "Online" for host in meant)
        raise NoParent("; ".join(filter(None, reasons.values())), passing=passing)
    return sorted(able, key=lambda host: (host.vports_in_use / host.max_vports, host.number))


#: What an administrator should do about a state that is not Active (fc_vports vport_state).
ADVICE = {
    "Unknown": "its driver does not know its state yet",
    "Disabled": "somebody has disabled it: write 0 to its vport_disable",
    "Linkdown": "the HBA's own port has no link: look at the cable and at the switch's port",
    "Initializing": (
        "the fabric does not answer its login: is NPIV on at the switch's port, and may it have another login, and is"
        " the WWPN in no other use?"
    ),
    "No Fabric Support": "the switch's port does no NPIV: switch it on there (the HBA must not be on a loop either)",
    "No Fabric Resources": "the switch has no room for another login: raise the login limit of its port",
    "Fabric Logout": "the switch has logged it out: look at the switch's log, and for the same WWPN elsewhere",
    "Fabric Rejected WWN": (
        "the switch takes this WWPN for invalid or for a duplicate: is it logged in somewhere else, such as on the"
        " host that the machine came from?"
    ),
    "VPort Failed": "the HBA's driver has given it up: the kernel's log says why",
}
#: States that waiting does not mend.
FINAL = ("No Fabric Support", "No Fabric Resources", "Fabric Rejected WWN", "VPort Failed")
#: States that wait for somebody else: a link, or whoever has disabled the vport.
WAITING = ("Linkdown", "Disabled")


def _refusal(error: OSError, host: FcHost, identity: PortIdentity) -> str:
    """A failed vport_create, for an administrator."""
    who = f"{identity.wwpn} on {host}"
    if error.errno is not None and error.strerror != os.strerror(error.errno):
        return f"{who}: {error.strerror}"  # the helper's own words
    match error.errno:
        case errno.EINVAL:
            return f"{who}: the driver does not take the name; is the WWPN in use here already, or the HBA's own?"
        case errno.ENOENT:
            return f"{who}: the driver refuses it: is NPIV on (lpfc_enable_npiv), is the WWPN in use here already?"
        case errno.ENOSPC:
            return f"{who}: all of its {host.max_vports} vports are in use"
        case errno.EINTR | errno.ENOMEM:
            return f"{who}: the driver has no resources left for another vport"
        case errno.ENOSYS:
            return f"{who}: the driver has NPIV switched off"
        case errno.ENOTUNIQ:
            return f"{who}: the driver says that this WWPN is no good: it is in use here already, or malformed"
        case errno.EOPNOTSUPP:
            return f"{who}: the switch's port does no NPIV: switch it on there"
        case errno.EACCES | errno.EPERM:
            return f"{who}: not permitted, or refused by the driver: run as root or through `vhostfc helper`"
        case _:
            return f"{who}: {error.strerror or error}; the kernel's log may say more"


class Vports:
    """See the head of the file.  state: where our note about a vport in the making is kept."""

    def __init__(
        self,
        kernel: Kernel,
        parents: Parents,
        *,
        state: Path,
        log: structlog.typing.FilteringBoundLogger,
        patience: float = 30.0,
    ) -> None:
        """patience: seconds for a vport to become Active before it is disabled and enabled, and again before it is
        made anew; three times that is what an R_A_TOV of 10 s asks for."""
        self._kernel = kernel
        self._parents = parents
        self._files = OwnFiles(state)
        self._log = log
        self._patience = patience
        self._said: str | None = None

    # ------------------------------------------------------------ having one

    async def acquire(self, identity: PortIdentity) -> Vport:
        """A vport of this identity, Active.  Waits for links; LoginRefused for what waiting does not mend."""
        tried: list[str] = []
        while True:
            vport = self._adoptable(identity)
            if vport is None:
                host = await self._parent(tried)
                try:
                    vport = await self._create(host, identity)
                except LoginRefused as error:
                    tried.append(host.name)
                    if self._others(tried):
                        self._log.warning("trying the next HBA port", reason=str(error))
                        continue
                    raise
            else:
                self._log.info("a vport of ours is there already", vport=vport.name, parent=vport.parent)
            await self._name(vport, identity)
            try:
                return await self._until_active(vport, identity)
            except _Stuck:
                self._log.warning("making the vport anew", vport=vport.name)
                await self.delete(identity)
            except LoginRefused as error:
                await self.delete(identity)
                tried.append(vport.parent)
                if self._others(tried):
                    self._log.warning("trying the next HBA port", reason=str(error))
                    continue
                raise

    def _others(self, tried: Sequence[str]) -> bool:
        with contextlib.suppress(NoParent):
            return any(host.name not in tried for host in candidates(list(self._kernel.sysfs.hosts()), self._parents))
        return False

    async def _parent(self, tried: Sequence[str]) -> FcHost:
        while True:
            try:
                able = candidates(list(self._kernel.sysfs.hosts()), self._parents)
                return next((host for host in able if host.name not in tried), able[0])
            except NoParent as error:
                if not error.passing:
                    raise
                self._say(f"waiting for an HBA port: {error}")
            await trio.sleep(20 * LOOK)

    def _adoptable(self, identity: PortIdentity) -> Vport | None:
        """A vport with our WWPN that a life of ours has left behind.  LoginRefused when it is somebody else's."""
        vport = self._kernel.sysfs.vport_of(identity.wwpn)
        if vport is None:
            for host in self._kernel.sysfs.hosts():
                if host.wwpn == identity.wwpn:
                    raise LoginRefused(f"{identity.wwpn} is the WWPN of {host.name} itself; give the adapter another")
            return None
        if self._is_ours(vport, identity):
            return vport
        name = f"{vport.symbolic_name!r}" if vport.symbolic_name else "nobody that left a name"
        raise LoginRefused(
            f"{identity.wwpn} is already logged in here as {vport.name}, made by {name}; if nobody needs it, write"
            f" {identity.wwpn.pack().hex()}:{vport.wwnn.pack().hex()} to vport_delete of {vport.parent}"
        )

    def _is_ours(self, vport: Vport, identity: PortIdentity) -> bool:
        if (vport.wwpn, vport.wwnn) != (identity.wwpn, identity.wwnn):
            return False
        return vport.symbolic_name == symbolic_name(identity) or (
            not vport.symbolic_name and self._was_making(vport, identity)
        )

    # ------------------------------------------------------------ making one

    async def _create(self, host: FcHost, identity: PortIdentity) -> Vport:
        assert host.vport_create is not None
        names = f"{identity.wwpn.pack().hex()}:{identity.wwnn.pack().hex()}"
        self._remember(identity)
        try:
            written = await self._kernel.write(host.vport_create, names.encode())
        except OSError as error:
            if error.errno not in {errno.ECONNRESET, errno.ETIMEDOUT}:  # else the helper may have made it
                self._forget(identity)
            raise LoginRefused(_refusal(error, host, identity)) from error
        if written != len(names):  # qla2xxx gives back FC_VPORT_FAILED as if it were a count
            self._forget(identity)
            raise LoginRefused(
                f"{identity.wwpn} on {host}: the driver has failed to make it; the kernel's log says why"
            )
        vport = self._kernel.sysfs.vport_of(identity.wwpn)
        if vport is None:
            raise LoginRefused(f"{identity.wwpn} on {host}: it went as soon as it was made; the kernel's log says why")
        self._remember(identity, vport)
        self._log.info("vport made", vport=vport.name, parent=str(host))
        return vport

    def _remember(self, identity: PortIdentity, vport: Vport | None = None) -> None:
        """Before it is made: should we die before it has a name, we know it for ours.  And after, which one it is:
        the kernel gives no vport's name twice."""
        text = json.dumps(_noted(identity) | ({} if vport is None else {"vport": vport.name}))
        try:
            self._files.write(_note(identity), text)
        except OSError as error:
            self._log.warning("cannot note the vport", path=error.filename, reason=error.strerror)

    def _forget(self, identity: PortIdentity) -> None:
        with contextlib.suppress(OSError):
            self._files.remove(_note(identity))

    def _was_making(self, vport: Vport, identity: PortIdentity) -> bool:
        try:
            note = json.loads(self._files.read(_note(identity)))
        except (OSError, ValueError):
            return False
        return note in (_noted(identity), _noted(identity) | {"vport": vport.name})

    async def _name(self, vport: Vport, identity: PortIdentity) -> None:
        """The switch shows it to whoever wonders whose port this is."""
        if vport.symbolic_name != symbolic_name(identity):
            path = self._kernel.sysfs.of_class("fc_vports") / vport.name / "symbolic_name"
            try:
                await self._kernel.write(path, symbolic_name(identity).encode())
            except OSError as error:
                self._log.warning("cannot name the vport", vport=vport.name, reason=error.strerror)

    async def _until_active(self, vport: Vport, identity: PortIdentity) -> Vport:
        """Wait; help it along once by disabling and enabling it.  LoginRefused for a state that stays."""
        helped = False
        began = trio.current_time()
        while True:
            now = self._kernel.sysfs.vport(vport.name)
            if now is None:
                raise LoginRefused(f"{identity.wwpn} on {vport.parent}: somebody has deleted {vport.name}")
            if now.state == ACTIVE:
                self._said = None
                return now
            waited = trio.current_time() - began
            where = f"{identity.wwpn} on {now.parent}: {now.state}: {ADVICE.get(now.state, 'an unknown state')}"
            if now.state in FINAL and waited > self._patience / 10:
                raise LoginRefused(where)
            if waited > self._patience:
                self._say(where)
                began = trio.current_time()
                if now.state != "Linkdown":
                    if helped:
                        raise _Stuck
                    await self.shake(now)
                    helped = True
            await trio.sleep(LOOK)

    async def shake(self, vport: Vport) -> None:
        """Have a vport that hangs log in anew: libfc has been seen to wait for an exchange that it had ended itself."""
        self._log.warning("disabling and enabling the vport", vport=vport.name)
        path = self._kernel.sysfs.of_class("fc_vports") / vport.name / "vport_disable"
        for word in (b"1", b"0"):
            try:
                await self._kernel.write(path, word)
            except OSError as error:
                if error.errno != errno.EALREADY:
                    self._log.warning("it does not obey", vport=vport.name, reason=error.strerror)

    # ------------------------------------------------------------ taking it away

    async def delete(self, identity: PortIdentity) -> None:
        """Log out and take away whatever vport of ours is there now, on whichever port.  What is gone already is gone,
        and what somebody else has made meanwhile, with the same names or not, is theirs."""
        for vport in list(self._kernel.sysfs.vports()):
            if vport.wwpn != identity.wwpn:
                continue
            if self._is_ours(vport, identity):
                await self._delete(vport, identity)
            else:
                self._log.warning(
                    "a vport with our WWPN is not ours, and stays",
                    vport=vport.name,
                    parent=vport.parent,
                    symbolic_name=vport.symbolic_name,
                )

    async def _delete(self, vport: Vport, identity: PortIdentity) -> None:
        host = self._kernel.sysfs.host(vport.parent)
        if host is None or host.vport_create is None:
            return
        path = host.vport_create.with_name("vport_delete")
        names = f"{vport.wwpn.pack().hex()}:{vport.wwnn.pack().hex()}"
        try:
            await self._kernel.write(path, names.encode())
        except OSError as error:
            if error.errno not in {errno.ENODEV, errno.ENOENT}:
                self._log.error("cannot delete the vport", vport=vport.name, reason=error.strerror)
                return
            self._log.info("the vport was gone already", vport=vport.name, parent=vport.parent)
        else:
            self._log.info("vport deleted", vport=vport.name, parent=vport.parent)
        self._forget(identity)

    def _say(self, message: str) -> None:
        if message != self._said:
            self._said = message
            self._log.warning(message)


def _note(identity: PortIdentity) -> str:
    return f"vport-{identity.wwpn.pack().hex()}.json"


def _noted(identity: PortIdentity) -> dict[str, str]:
    return {"wwpn": str(identity.wwpn), "wwnn": str(identity.wwnn)}


def symbolic_name(identity: PortIdentity) -> str:
    return identity.symbolic_name.encode()[:SYMBOLIC_NAME_MAX].decode(errors="ignore")
