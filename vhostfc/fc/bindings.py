"""Which target number a guest knows a remote port by.

A guest boots from "target 0" and names its disks by it, so a number, once given, belongs to its WWPN for
ever: numbers are dense from 0, and never given to another, even if the first port never comes back.
"""

from __future__ import annotations

from typing import Self

from vhostfc.fc.wwn import Wwn

#: Target numbers are a byte in virtio-scsi; Windows' driver overlooks the last one.
LIMIT = 255


class Bindings:
    """Target numbers of WWPNs, in the order in which they were first seen."""

    def __init__(self) -> None:
        self._targets: dict[Wwn, int] = {}

    def __len__(self) -> int:
        return len(self._targets)

    def __repr__(self) -> str:
        return f"<Bindings {', '.join(f'{number}: {wwpn}' for wwpn, number in self._targets.items())}>"

    def bind(self, wwpn: Wwn) -> int | None:
        """The number of this port, a new one when it has none yet; None when all are given away."""
        if wwpn not in self._targets and len(self._targets) < LIMIT:
            self._targets[wwpn] = len(self._targets)
        return self._targets.get(wwpn)

    def target(self, wwpn: Wwn) -> int | None:
        """The number of this port, if it has one."""
        return self._targets.get(wwpn)

    def wwpn(self, target: int) -> Wwn | None:
        """The port with this number, if there is one."""
        return next((wwpn for wwpn, number in self._targets.items() if number == target), None)

    def to_dict(self) -> dict[str, object]:
        """For json.dump: the WWPN of target 0, of target 1, and so on."""
        return {"targets": [str(wwpn) for wwpn in self._targets]}

    @classmethod
    def from_dict(cls, saved: object) -> Self:
        """What to_dict gave.  Raises ValueError, saying what is wrong, for anything else."""
        targets = saved.get("targets") if isinstance(saved, dict) else None
        if not isinstance(targets, list) or not all(isinstance(name, str) for name in targets):
            raise ValueError('expected {"targets": [WWPN of target 0, WWPN of target 1, ...]}')
        bindings = cls()
        for number, name in enumerate(targets):
            if bindings.bind(Wwn.parse(name)) != number:
                raise ValueError(f"target {number}: {name} has a number already, or there are more than {LIMIT}")
        return bindings
