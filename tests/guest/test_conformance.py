"""Suites that others wrote, in a real guest: libiscsi's iscsi-test-cu and the tools of sg3_utils.

Two adapters in one guest are two initiators, so reservations are tested between them, and two paths to a unit.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab import conformance
from tests.lab.guest import Guest, vhost_user_scsi
from tests.lab.san import San, UnitSpec, wwpn

pytestmark = pytest.mark.guest

#: LUNs.  A file of 512-byte blocks has physical blocks of 4096 (512e).
MEMORY_512, FILE_512E, MEMORY_4096, FILE_4096, READ_ONLY = range(5)

#: These want iSCSI sessions, or a medium that can be removed; one of 1.19 (Debian 12) is killed by a fault of its own.
SKIP = (
    *("iSCSI*", "ProutReserve.Access*", "ProutReserve.Ownership*", "ProutPreempt.*", "Reserve6.[!S]*"),
    *("PreventAllow.*", "NoMedia.*", "Sanitize.*Reserved"),
)
#: What a disk that is neither removable nor write-protected, and reached by Fibre Channel, may be spared.
SPARED = (
    r"only supported for iSCSI backends",
    r"not removable",
    r"not write-protected",
    r"does not support 0-blocks",  # WSNZ
    r"LBPPB < 2",  # a physical block is a logical one
    r"Multipath unavailable|Non-iSCSI multipath",
    r"(SANITIZE.*|WRITEATOMIC16) is not implemented",
)
#: With several logical blocks in a physical one this asks for the status of LBA 9 and wants an answer for LBA 16.
WRONG_FOR_512E = ("GetLBAStatus.UnmapSingle",)
#: The suites, in parts that take a minute or two each, and how many of their tests pass at least.
PARTS = [("[A-Q]*", 47), ("[R-V]*", 60), ("[W-Z]*", 48)]


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


def sg(guest: Guest, lun: int) -> list[str]:
    """The /dev/sgN of a LUN: through the first adapter, and through the second."""
    found = guest.check(f"ls -d /sys/class/scsi_generic/sg*/device/scsi_device/*:0:{lun}").split()
    hosts = sorted((int(path.split("/")[-1].split(":")[0]), path.split("/")[4]) for path in found)
    return [f"/dev/{name}" for _, name in hosts]


# ---------------------------------------------------------------- iscsi-test-cu


def judge(results: conformance.Results, at_least: int) -> None:
    text = conformance.report(results, skipped=True)
    print(text)
    assert not [test for test, result in results.items() if result.verdict.bad], text
    skipped = [r.reason for r in results.values() if r.verdict is conformance.Verdict.SKIPPED]
    assert [reason for reason in skipped if not any(re.search(one, reason) for one in SPARED)] == []
    assert conformance.counts(results)["passed"] >= at_least


@pytest.mark.parametrize(("suites", "at_least"), [PARTS[0], pytest.param(*PARTS[1], marks=pytest.mark.long), PARTS[2]])
def test_the_whole_suite(guest: Guest, suites: str, at_least: int) -> None:
    judge(conformance.run_suite(guest, sg(guest, MEMORY_512)[:1], only=suites, skip=SKIP, total=550), at_least)


@pytest.mark.parametrize("lun", [FILE_512E, MEMORY_4096, FILE_4096])
@pytest.mark.parametrize(("suites", "at_least"), PARTS)
@pytest.mark.long
def test_the_whole_suite_with_other_geometries(guest: Guest, lun: int, suites: str, at_least: int) -> None:
    skip = [*SKIP, *WRONG_FOR_512E] if lun == FILE_512E else SKIP
    missing = len(skip) - len(SKIP)
    results = conformance.run_suite(guest, sg(guest, lun)[:1], only=suites, skip=skip, total=550)
    judge(results, at_least - missing * suites.startswith("[A"))


def test_two_paths_to_one_unit(guest: Guest) -> None:
    one, two = sg(guest, MEMORY_512)
    # What was done through the first path is told on the second: mode parameters changed, a reset.
    guest.check(f"for i in 1 2 3 4 5 6 7 8; do sg_turs {two} >/dev/null 2>&1; done; sg_turs {two}")
    # The tool clears 256 blocks and then takes it for granted that the 257th is zero too.
    guest.check(f"head -c 512 /dev/zero >/run/zeros; sg_write_same -l 0 -n 1024 -x 512 -i /run/zeros {one}")
    results = conformance.run_suite(guest, [one, two], only="MultipathIO.*")
    judge(results, 2)
    assert results["MultipathIO.Simple"].verdict is conformance.Verdict.PASSED
    assert results["MultipathIO.CompareAndWrite"].verdict is conformance.Verdict.PASSED


def test_a_read_only_unit(guest: Guest) -> None:
    results = conformance.run_suite(guest, sg(guest, READ_ONLY)[:1], only="ReadOnly.*")
    assert conformance.counts(results) == {"passed": 1}, conformance.report(results, skipped=True)


# ---------------------------------------------------------------- sg3_utils


def test_sg3_utils_decode_everything(guest: Guest) -> None:
    for lun in (MEMORY_512, FILE_4096):
        one = sg(guest, lun)[0]
        pages = guest.check(f"sg_vpd -a {one}")
        for wanted in (
            *("Unit serial number", "Device identification", "Extended inquiry data", "Block limits"),
            *(
                "Block device characteristics",
                "Logical block provisioning",
                "0x5006016000000001",
                "Relative target port",
            ),
        ):
            assert wanted.lower() in pages.lower(), pages
        opcodes = guest.check(f"sg_opcodes {one}")
        for wanted in ("Compare and write", "Persistent reserve out, Preempt and abort", "Report target port groups"):
            assert wanted.lower() in opcodes.lower(), opcodes
        assert "asymmetric access state : 0x00" in guest.check(f"sg_rtpg -d {one}")
        for command in ("sg_inq", "sg_luns", "sg_readcap -l", "sg_modes -a", "sg_logs -a", "sg_requests", "sg_turs"):
            guest.check(f"{command} {one}")
        guest.check(f"sg_get_lba_status -l 0 {one}")
        guest.check(f"sg_verify -l 0 -c 16 {one}")


def test_sg3_utils_change_blocks(guest: Guest) -> None:
    one = sg(guest, MEMORY_512)[0]
    guest.check(
        "head -c 512 /dev/zero >/run/zeros; head -c 512 /dev/urandom >/run/new; cat /run/zeros /run/new >/run/both"
    )
    guest.check(f"sg_write_same -l 8 -n 4 -x 512 -i /run/zeros {one}")
    guest.check(f"sg_compare_and_write -l 8 -n 1 -i /run/both -x 1024 {one}")
    assert guest.run(f"sg_compare_and_write -l 8 -n 1 -i /run/both -x 1024 {one}")[0] == 14, "miscompare"
    guest.check(f"sg_dd if={one} of=/run/back bs=512 skip=8 count=1 && cmp /run/back /run/new")
    guest.check(f"sg_unmap -f -l 8 -n 8 {one}")
    guest.check(f"sg_dd if={one} of=/run/back bs=512 skip=8 count=1 && cmp /run/back /run/zeros")


def test_scsi_mandat(guest: Guest) -> None:
    guest.check(f"scsi_mandat -q {sg(guest, FILE_512E)[0]}")


def test_sg_persist_tst(guest: Guest) -> None:
    example = Path("/usr/share/doc/sg3-utils/examples/sg_persist_tst.sh")
    script = example if example.exists() else Path(f"{example}.gz")
    output = guest.check(f"zcat -f {script} >/run/tst.sh; sh /run/tst.sh {sg(guest, MEMORY_4096)[0]} 2>&1")
    for wanted in ("1 registered reservation key", "Reservation follows", "scope: LU_SCOPE,  type: Write Exclusive"):
        assert wanted in output, output
    assert "error" not in output.lower(), output


def test_a_reservation_between_two_adapters(guest: Guest, san: San) -> None:
    """Each adapter is an initiator of its own, to sg_persist and to a file's writes alike."""
    one, two = sg(guest, FILE_512E)
    persist = "sg_persist -n -q" if "-q" in guest.run("sg_persist --help")[1] else "sg_persist -n"
    guest.check(f"{persist} -o -G -S 0xa {one}; {persist} -o -G -S 0xb {two}")
    guest.check(f"{persist} -o -R -K 0xa -T 5 {one}")
    status = guest.check(f"{persist} -s {two}")
    for number in (1, 2):
        assert wwpn(number).replace(":", "") in status.replace(" ", ""), status
    guest.check(f"sg_dd if=/dev/zero of={two} bs=512 count=1")
    guest.check(f"{persist} -o -A -K 0xa -S 0xb -T 5 {one}")
    assert guest.run(f"sg_turs {two}")[0] == 6, "registrations preempted"
    assert guest.run(f"sg_dd if=/dev/zero of={two} bs=512 count=1")[0] != 0
    assert guest.run(f"{persist} -o -R -K 0xb -T 5 {two}")[0] == 24, "reservation conflict"
    guest.check(f"sg_dd if={two} of=/dev/null bs=512 count=1")
    guest.check(f"{persist} -o -C -K 0xa {one}")
    guest.check(f"sg_dd if=/dev/zero of={two} bs=512 count=1")
