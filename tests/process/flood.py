"""A guest that floods its adapter until it is ended: `python -m tests.process.flood SOCKET`.

INQUIRYs on one queue, READs on two more, as many as fit: of an adapter without the fast path all of them
are punted.  A process of its own, so that whoever measures beside it does not measure this.  On SIGTERM it
prints what the commands ended with: {"good": ..., "full": ..., "other": ...}.
"""

from __future__ import annotations

import json
import signal
import sys
from collections import Counter

import trio

from vhostfc.frontend.driver import ScsiDriver
from vhostfc.frontend.load import Load, run_load
from vhostfc.frontend.scan import inquiry, patiently

INQUIRIES = 64
READS = (0, 1)
DEPTH = 256
TASK_SET_FULL = 0x28


async def flood(path: str) -> Counter[str]:
    ends = Counter(good=0, full=0, other=0)
    until = trio.Event()

    async def ask(driver: ScsiDriver) -> None:
        while not until.is_set():
            answer = await driver.command(0, 0, inquiry(255), data_in=255, queue=len(READS))
            full = answer.response == 0 and answer.status == TASK_SET_FULL
            ends["good" if answer.good else "full" if full else "other"] += 1

    async def read(driver: ScsiDriver) -> None:
        load = Load(0, 0, 0, 1024, 512, 512, DEPTH)
        result = await run_load(driver, [load for _ in READS], until=until)
        full = result.statuses.get(TASK_SET_FULL, 0)  # sent again after a while, as Linux does
        ends["good"] += result.commands
        ends["full"] += full
        ends["other"] += result.retries - full + result.errors

    async with ScsiDriver.open(path, queues=len(READS) + 1, queue_size=DEPTH) as driver:
        assert (await patiently(driver, 0, 0, bytes(6))).good
        async with trio.open_nursery() as nursery:
            for _ in range(INQUIRIES):
                nursery.start_soon(ask, driver)
            nursery.start_soon(read, driver)
            with trio.open_signal_receiver(signal.SIGTERM) as signals:
                print("ready", flush=True)
                async for _ in signals:
                    break
            until.set()
    return ends


if __name__ == "__main__":
    print(json.dumps(trio.run(flood, sys.argv[1])), flush=True)
