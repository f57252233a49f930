"""The contract of the port seam over a vport of a real kernel: the suite itself runs in the guest."""

from __future__ import annotations

import inspect
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.lab.fcoe import attachment, netdev
from tests.lab.npiv import NpivGuest
from tests.lab.san import TARGET, San, UnitSpec
from tests.ports.contract import FabricContract

pytestmark = pytest.mark.guest

#: How long a cut link stays so.
OUTAGE = 2.5


class Desk:
    """Answers what kernel_contract.py asks for."""

    def __init__(self, san: San, guest: NpivGuest, requests: Path) -> None:
        self.san = san
        self.guest = guest
        self.requests = requests
        self.sizes = {0: 1, 1: 1}
        self.over = threading.Event()
        self.failed: list[BaseException] = []
        self.thread = threading.Thread(target=self.serve)

    def serve(self) -> None:
        handlers: dict[str, Callable[..., None]] = {
            "reset": self.reset,
            "add": lambda number: self.sizes.update({number: 1}),
            "remove": self.remove,
            "grow": lambda number: self.sizes.update({number: 2}),
            "cut": self.cut,
        }
        number = 1
        while not self.over.is_set():
            path = self.requests / f"{number}.json"
            if not path.exists():
                time.sleep(0.02)
                continue
            try:
                what, *arguments = json.loads(path.read_text())
                handlers[what](*arguments)
                if what != "cut":
                    self.san.units[:] = [UnitSpec(lun, f'size = "{size}MiB"') for lun, size in self.sizes.items()]
                    self.san.reload()
                path.with_suffix(".done").touch()
            except BaseException as error:
                self.failed.append(error)
                raise
            number += 1

    def remove(self, number: int) -> None:
        del self.sizes[number]

    def reset(self) -> None:
        self.sizes = {0: 1, 1: 1}

    def cut(self) -> None:
        self.guest.qmp("set_link", name="cable1", up=False)
        time.sleep(0.5)
        threading.Timer(OUTAGE, lambda: self.guest.qmp("set_link", name="cable1", up=True)).start()


def test_the_contract_over_a_real_kernel(tmp_path: Path) -> None:
    for name in ("vm", "requests"):
        (tmp_path / name).mkdir()
    san = San(tmp_path, [UnitSpec(0, 'size = "1MiB"'), UnitSpec(1, 'size = "1MiB"')])
    san.extra = attachment(san)
    cable = netdev(san, 1)
    with san, NpivGuest(cable, workdir=tmp_path / "vm", memory="1G", shares=[tmp_path / "requests"]) as guest:
        guest.check("echo 0 >/sys/bus/scsi/drivers_autoprobe")
        guest.online()
        desk = Desk(san, guest, tmp_path / "requests")
        desk.thread.start()
        try:
            environment = f"VHOSTFC_LAB_REQUESTS={tmp_path / 'requests'} VHOSTFC_LAB_TARGET={TARGET}"
            status, output = guest.run(
                f"export {environment}; {guest.python} -m pytest -p no:cacheprovider -q tests/lab/kernel_contract.py"
                " --durations=8 2>&1",
                timeout=500,
            )
        finally:
            desk.over.set()
            desk.thread.join()
    assert status == 0, output
    assert not desk.failed
    count = len([name for name, _ in inspect.getmembers(FabricContract) if name.startswith("test_")])
    assert f"{count} passed" in output, output
