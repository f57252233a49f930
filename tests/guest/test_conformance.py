"""libiscsi's conformance suite, iscsi-test-cu, in a real guest.

Two adapters in one guest are two initiators, so reservations are tested between them, and two paths to a unit.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import pytest

from tests.guest.devices import heard, sg
from tests.lab import conformance
from tests.lab.guest import Guest, vhost_user_scsi
from tests.lab.packages import into_root, unpacked
from tests.lab.san import San, UnitSpec

pytestmark = pytest.mark.guest

#: LUNs.  A file of 512-byte blocks has physical blocks of 4096 (512e).
MEMORY_512, FILE_512E, MEMORY_4096, FILE_4096, READ_ONLY = range(5)

#: These want iSCSI sessions, a second initiator (below), or a medium that can be removed.
SKIP = (
    *("iSCSI*", "ProutReserve.Access*", "ProutReserve.Ownership*", "ProutPreempt.*", "Reserve6.[!S]*"),
    *("PreventAllow.*", "NoMedia.*", "Sanitize.*Reserved"),
)
#: What a disk that is neither removable nor write-protected, and reached by Fibre Channel, may be spared.
SPARED = (
    r"only supported for iSCSI backends|Not an iSCSI device",  # 1.19, 1.20
    r"not removable",
    r"not write-protected",
    r"does not support 0-blocks",  # WSNZ
    r"LBPPB < 2",  # a physical block is a logical one
    r"Multipath unavailable|Non-iSCSI multipath",
)
#: With several logical blocks in a physical one this asks for the status of LBA 9 and wants an answer for LBA 16.
WRONG_FOR_512E = ("GetLBAStatus.UnmapSingle",)
#: This reads 2048 blocks at once, more bytes than sg can take in one command when they have 4096 each.
WRONG_FOR_4096 = ("ExtendedCopy.Simple",)
#: The suites, in parts that take a minute or two each, and how many of their tests pass at least.
PARTS = [("[A-Q]*", 47), ("[R-V]*", 65), ("[W-Z]*", 53)]
#: What two initiators do to each other.
TWO_INITIATORS = ("ProutReserve.Access*", "ProutReserve.Ownership*", "ProutPreempt.*", "Reserve6.2Initiators")


@pytest.fixture(scope="module")
def san(tmp_path_factory: pytest.TempPathFactory) -> Iterator[San]:
    directory = tmp_path_factory.mktemp("san")
    size = 'size = "64MiB"\n'
    units = [
        UnitSpec(MEMORY_512, size),
        UnitSpec(FILE_512E, f'{size}file = "{directory}/512"'),
        UnitSpec(MEMORY_4096, f"{size}block_size = 4096"),
        UnitSpec(FILE_4096, f'{size}block_size = 4096\nfile = "{directory}/4096"'),
        UnitSpec(READ_ONLY, f"{size}read_only = true"),
    ]
    with San(directory, units) as network:
        for number in (1, 2):
            network.start_adapter(number)
        yield network


@pytest.fixture(scope="module")
def guest(san: San, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guest]:
    args = [word for n in (1, 2) for word in vhost_user_scsi(san.socket(n), f"hba{n}", num_queues=2)]
    with Guest(args, workdir=tmp_path_factory.mktemp("vm"), memory="768M") as machine:
        machine.check("until [ $(ls /sys/class/scsi_generic | wc -l) = 10 ]; do sleep 0.1; done")
        yield machine


def judge(results: conformance.Results, at_least: int) -> None:
    text = conformance.report(results, skipped=True)
    print(text)
    assert not [test for test, result in results.items() if result.verdict.bad], text
    skipped = [r.reason for r in results.values() if r.verdict is conformance.Verdict.SKIPPED]
    assert [reason for reason in skipped if not any(re.search(one, reason) for one in SPARED)] == []
    assert conformance.counts(results).get("passed", 0) >= at_least, text


def run(
    guest: Guest, devices: Sequence[str], only: str, skip: Sequence[str], tool: str = conformance.TOOL
) -> conformance.Results:
    """A part of the suite, on a unit that remembers nothing of the part before (held copy results)."""
    guest.check(f"sg_reset -d {devices[0]} >/dev/null")
    heard(guest, *devices)
    return conformance.run_suite(guest, devices, only=only, skip=[*SKIP, *skip], total=550, tool=tool)


@pytest.mark.parametrize(("suites", "at_least"), PARTS)
def test_the_whole_suite(guest: Guest, suites: str, at_least: int) -> None:
    judge(run(guest, sg(guest, MEMORY_512)[:1], suites, ()), at_least)


@pytest.mark.long
@pytest.mark.parametrize("lun", [FILE_512E, MEMORY_4096, FILE_4096])
@pytest.mark.parametrize(("suites", "at_least"), PARTS)
def test_the_whole_suite_with_other_geometries(guest: Guest, lun: int, suites: str, at_least: int) -> None:
    skip = WRONG_FOR_512E if lun == FILE_512E else WRONG_FOR_4096
    judge(run(guest, sg(guest, lun)[:1], suites, skip), at_least - suites.startswith("[A"))


@pytest.mark.long
@pytest.mark.parametrize("lun", [MEMORY_512, FILE_512E, MEMORY_4096, FILE_4096])
@pytest.mark.parametrize(("suites", "at_least"), PARTS)
def test_the_whole_suite_of_the_next_version(guest: Guest, lun: int, suites: str, at_least: int) -> None:
    """1.20, from Debian 13."""
    skip = {MEMORY_512: (), FILE_512E: WRONG_FOR_512E}.get(lun, WRONG_FOR_4096)
    results = run(guest, sg(guest, lun)[:1], suites, skip, conformance.newer_tool())
    judge(results, at_least - 1)  # each part has one more that asks for iSCSI


def test_two_paths_to_one_unit(guest: Guest) -> None:
    one, two = sg(guest, MEMORY_512)
    # The tool clears 256 blocks and then takes it for granted that the 257th is zero too.
    heard(guest, one, two)
    guest.check(f"head -c 512 /dev/zero >/run/zeros; sg_write_same -l 0 -n 1024 -x 512 -i /run/zeros {one}")
    results = conformance.run_suite(guest, [one, two], only="MultipathIO.*")
    judge(results, 2)
    assert results["MultipathIO.Simple"].verdict is conformance.Verdict.PASSED
    assert results["MultipathIO.CompareAndWrite"].verdict is conformance.Verdict.PASSED


def test_a_read_only_unit(guest: Guest) -> None:
    heard(guest, *sg(guest, READ_ONLY))
    results = conformance.run_suite(guest, sg(guest, READ_ONLY)[:1], only="ReadOnly.*")
    assert conformance.counts(results) == {"passed": 1}, conformance.report(results, skipped=True)


# ---------------------------------------------------------------- two initiators


@pytest.fixture(scope="module")
def bridge(guest: Guest) -> list[str]:
    """The paths to a unit as iSCSI targets: tgt hands every command to sg.  The tool's second initiator logs in to the
    second of them, and so is another initiator to the array."""
    root = unpacked("tgt", ("tgt", "libaio1", "libibverbs1", "librdmacm1", "libnl-3-200", "libnl-route-3-200"))
    guest.check(into_root(root))
    guest.popen("tgtd -f")
    guest.check("until tgtadm --lld iscsi --op show --mode sys >/dev/null 2>&1; do sleep 0.1; done")
    urls = []
    for number, device in enumerate(sg(guest, MEMORY_512), 1):
        tgtadm, name = "tgtadm --lld iscsi --op", f"iqn.2024-01.test:{number}"
        guest.check(
            f"{tgtadm} new --mode target --tid {number} -T {name} && "
            f"{tgtadm} new --mode logicalunit --tid {number} --lun 1 --bstype sg --device-type pt -b {device} && "
            f"{tgtadm} bind --mode target --tid {number} -I ALL"
        )
        urls.append(f"iscsi://127.0.0.1/{name}/1")
    return urls


@pytest.mark.parametrize("version", ["1.19", "1.20"])
def test_two_initiators(guest: Guest, bridge: list[str], version: str) -> None:
    tool = conformance.TOOL if version == "1.19" else conformance.newer_tool()
    heard(guest, *sg(guest, MEMORY_512))
    results = conformance.run_suite(guest, bridge, only=TWO_INITIATORS, tool=tool)
    judge(results, 14)
