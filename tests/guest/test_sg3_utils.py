"""The tools of sg3_utils in a real guest, on a unit with two adapters (initiators) and two target ports (groups).

What the tools print is kept under build/sg3_utils, a file a tool, for whoever wants to see how it decodes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.guest.devices import heard
from tests.lab.guest import Guest, vhost_user_scsi
from tests.lab.san import TARGET, TARGET_NODE, San, UnitSpec, wwpn

pytestmark = pytest.mark.guest

KEPT = Path("build/sg3_utils")
MEMORY_512, FILE_512E, FILE_4096 = range(3)
SECOND_PORT = "50:06:01:60:00:00:00:02"
SECOND = f"""
[[target]]
name = "array-b"
wwpn = "{SECOND_PORT}"
wwnn = "{TARGET_NODE}"
group = 2
"""
#: Words with which the tools complain.
COMPLAINTS = re.compile(r"error|illegal|invalid|fail|bad |unexpected|not supported|unable|too short", re.IGNORECASE)
#: What they say of a disk as it should be.
NO_COMPLAINTS = re.compile(
    r"error recovery|exit failure mode|read-write error|error counter|errors: 0|receive copy failure details"
    r"|\[(threshold sets|percentages) not supported\]|inline data not supported",
    re.IGNORECASE,
)


class TwoPorts(San):
    """A network whose first unit is behind a second target port too, in a target port group of its own."""

    def write_fabric(self) -> Path:
        path = super().write_fabric()
        text = path.read_text()
        first = self.units[0].toml()
        text = text.replace(f'members = ["{TARGET}"', f'members = ["{TARGET}", "{SECOND_PORT}"')
        path.write_text(f"{text}\n{SECOND}{first}\n")
        return path


@pytest.fixture(scope="module")
def san(tmp_path_factory: pytest.TempPathFactory) -> Iterator[San]:
    directory = tmp_path_factory.mktemp("san")
    size = 'size = "64MiB"\n'
    units = [
        UnitSpec(MEMORY_512, f'{size}file = "{directory}/shared"\nphysical_block_size = 512'),
        UnitSpec(FILE_512E, f'{size}file = "{directory}/512"'),
        UnitSpec(FILE_4096, f'{size}block_size = 4096\nfile = "{directory}/4096"'),
    ]
    with TwoPorts(directory, units) as network:
        for number in (1, 2):
            network.start_adapter(number)
        yield network


@pytest.fixture(scope="module")
def guest(san: San, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guest]:
    args = [word for n in (1, 2) for word in vhost_user_scsi(san.socket(n), f"hba{n}", num_queues=2)]
    with Guest(args, workdir=tmp_path_factory.mktemp("vm"), memory="768M") as machine:
        machine.check("until [ $(ls /sys/class/scsi_generic | wc -l) = 8 ]; do sleep 0.1; done")
        yield machine


def device(guest: Guest, adapter: int, target: int, lun: int) -> str:
    """The /dev/sgN at an address."""
    hosts = sorted({int(path.split(":")[0]) for path in guest.check("ls /sys/class/scsi_device").split()})
    address = f"{hosts[adapter - 1]}:0:{target}:{lun}"
    return f"/dev/{guest.check(f'ls /sys/class/scsi_device/{address}/device/scsi_generic').strip()}"


def keep(guest: Guest, name: str, command: str, *, wanted: tuple[str, ...] = (), status: int = 0) -> str:
    """A tool's output: kept, without a complaint, with these words."""
    got, output = guest.run(f"{command} 2>&1")
    KEPT.mkdir(parents=True, exist_ok=True)
    (KEPT / f"{name}.txt").write_text(f"$ {command}\n{output}\n(exit status {got})\n")
    assert got == status, output
    if not status:
        complaints = [
            line for line in output.splitlines() if COMPLAINTS.search(line) and not NO_COMPLAINTS.search(line)
        ]
        assert complaints == [], output
    for word in wanted:
        assert word.lower() in output.lower(), f"{word}: {output}"
    return output


def test_they_decode_all_that_it_says_of_itself(guest: Guest) -> None:
    one = device(guest, 1, 0, MEMORY_512)
    heard(guest, one)
    keep(
        guest, "sg_vpd", f"sg_vpd -a {one}",
        wanted=(
            "Unit serial number", "Device identification", "Extended inquiry data", "Mode page policy", "SCSI ports",
            "Third party copy", "Block limits", "Block device characteristics", "Logical block provisioning",
            "0x5006016000000001", "0x5006016000000002", "Relative target port", "Target port group",
        ),
    )  # fmt: skip
    keep(
        guest, "sg_opcodes", f"sg_opcodes --rctd {one}",
        wanted=(
            "Compare and write", "Persistent reserve out, Preempt and abort", "Report target port groups",
            "Sanitize, block erase", "Write atomic(16)",
        ),
    )  # fmt: skip
    keep(guest, "sg_opcodes_32", f"sg_opcodes --opcode=0x7f,0xb --mask {one}", wanted=("Write(32)",))
    keep(guest, "sg_opcodes_tmf", f"sg_opcodes --tmf {one}", wanted=("Logical unit reset", "Abort task set"))
    for tool in (
        *("sg_inq", "sg_luns", "sg_readcap -l", "sg_modes -a", "sg_modes -6 -a", "sg_logs -a", "sg_requests"),
        *("sg_turs", "sg_rbuf --help", "sg_get_lba_status -l 0", "sg_senddiag -t", "sg_sync", "sg_prevent --allow"),
    ):
        if "help" not in tool:
            keep(guest, tool.replace(" ", "_"), f"{tool} {one}")
    keep(guest, "sg_luns_select_2", f"sg_luns -s 2 {one}", wanted=("REPORT LUNS",))
    keep(guest, "sg_verify", f"sg_verify -l 0 -c 16 {one}")
    keep(guest, "sg_readcap_4096", f"sg_readcap -l {device(guest, 1, 0, FILE_4096)}", wanted=("4096 bytes",))
    keep(
        guest, "sg_readcap_512e", f"sg_readcap -l {device(guest, 1, 0, FILE_512E)}",
        wanted=("Logical blocks per physical block exponent=3",),
    )  # fmt: skip


def test_they_change_blocks(guest: Guest) -> None:
    one = device(guest, 1, 0, MEMORY_512)
    heard(guest, one)
    guest.check("head -c 512 /dev/zero >/run/zeros; head -c 1024 /dev/urandom >/run/new")
    guest.check("head -c 512 /run/new >/run/first; cat /run/zeros /run/first >/run/both")
    same = f"sg_dd if={one} of=/run/back bs=512 count=1 skip="
    keep(guest, "sg_write_same", f"sg_write_same -l 8 -n 4 -x 512 -i /run/zeros {one}")
    keep(guest, "sg_compare_and_write", f"sg_compare_and_write -l 8 -n 1 -i /run/both -x 1024 {one}")
    keep(
        guest, "sg_compare_and_write_miscompare", f"sg_compare_and_write -l 8 -n 1 -i /run/both -x 1024 {one}",
        status=14,
    )  # fmt: skip
    guest.check(f"{same}8 && cmp /run/back /run/first")
    keep(guest, "sg_unmap", f"sg_unmap -f -l 8 -n 8 {one}")
    guest.check(f"{same}8 && cmp /run/back /run/zeros")
    keep(guest, "sg_get_lba_status_hole", f"sg_get_lba_status -l 8 {one}", wanted=("deallocated",))
    for kind in ("--normal --16", "--normal --32", "--atomic=0 --16"):
        name = "sg_write_x_" + kind.replace("-", "").replace(" ", "_").replace("=0", "")
        guest.check(f"sg_write_same -l 8 -n 4 -x 512 -i /run/zeros {one}")
        keep(guest, name, f"sg_write_x {kind} --bs=512 --lba=8 --num=2 --in=/run/new {one}")
        guest.check(f"{same}8 && cmp /run/back /run/first")
    keep(guest, "sg_write_verify", f"sg_write_verify -l 30 -n 2 -i /run/new {one}")
    keep(guest, "sg_write_x_same_32", f"sg_write_x --same=0 --32 --bs=512 --lba=40 --num=3 --in=/run/first {one}")
    guest.check(f"{same}42 && cmp /run/back /run/first")
    keep(guest, "sg_xcopy", f"sg_xcopy if={one} skip=8 of={one} seek=100 bs=512 count=2")
    guest.check(f"{same}100 && cmp /run/back /run/first")
    beside = device(guest, 1, 0, FILE_512E)
    heard(guest, beside)
    keep(guest, "sg_xcopy_between", f"sg_xcopy if={one} skip=8 of={beside} seek=100 bs=512 count=2")
    guest.check(f"sg_dd if={beside} of=/run/back bs=512 count=1 skip=100 && cmp /run/back /run/first")
    keep(guest, "sg_copy_results", f"sg_copy_results -p {one}", wanted=("Maximum",))
    keep(guest, "ddpt_like_copy", f"sg_dd if={one} of={one} bs=512 skip=8 seek=120 count=2 fua=1")
    guest.check(f"{same}120 && cmp /run/back /run/first")


def test_sanitize(guest: Guest) -> None:
    one = device(guest, 1, 0, FILE_512E)
    heard(guest, one)
    guest.check(f"sg_dd if=/dev/urandom of={one} bs=512 count=2048 2>/dev/null")
    keep(guest, "sg_sanitize_block", f"sg_sanitize --block --quick --wait {one}")
    guest.check(f"sg_dd if={one} of=/run/back bs=512 count=2048 && cmp -n $((2048 * 512)) /run/back /dev/zero")
    keep(guest, "sg_sanitize_overwrite", f"sg_sanitize --overwrite --zero --quick --early {one}")
    keep(guest, "sg_requests_progress", f"sg_requests --progress {one}")
    guest.check(f"until sg_turs {one}; do sleep 0.1; done")
    keep(guest, "sg_sanitize_fail", f"sg_sanitize --fail --quick --wait {one}")


def test_format(guest: Guest) -> None:
    one = device(guest, 1, 0, FILE_4096)
    heard(guest, one)
    guest.check(f"sg_dd if=/dev/urandom of={one} bs=4096 count=256 2>/dev/null")
    keep(guest, "sg_format", f"sg_format --format --quick --wait {one}", wanted=("Block size=4096",))
    guest.check(f"sg_dd if={one} of=/run/back bs=4096 count=256 && cmp -n $((256 * 4096)) /run/back /dev/zero")


def test_target_port_groups(guest: Guest) -> None:
    """Two ports in two groups: each state shows on its own path, and the other paths are told."""
    one, other, beside = (device(guest, *where, MEMORY_512) for where in ((1, 0), (1, 1), (2, 0)))
    heard(guest, one, other, beside)
    keep(
        guest, "sg_rtpg", f"sg_rtpg -d {one}",
        wanted=("target port group id : 0x1", "target port group id : 0x2", "active/optimized", "0x01", "0x02"),
    )  # fmt: skip
    keep(guest, "sg_rtpg_extended", f"sg_rtpg -e -d {one}", wanted=("Implicit transition time",))
    for state, word in (("an", "active/non optimized"), ("s", "standby"), ("u", "unavailable"), ("ao", "optimized")):
        keep(guest, f"sg_stpg_{state}", f"sg_stpg --tp=2 --state={state} {one}")
        output = keep(guest, f"sg_rtpg_{state}", f"sg_rtpg -d {one}", wanted=(word,))
        assert "set target port group" in output.lower(), "status code: by a SET TARGET PORT GROUPS"
        assert guest.run(f"sg_turs {beside}")[0] == 6, "another initiator is told once"
        guest.check(f"sg_turs {beside}")
        assert guest.run(f"sg_turs {other}")[0] == 6, "on the other path too: it is another nexus"
        expected = {"s": 2, "u": 2}.get(state, 0)
        assert guest.run(f"sg_turs {other}")[0] == expected, state
        guest.check(f"sg_inq {other} && sg_rtpg {other} && sg_turs {one}")
        assert (guest.run(f"sg_dd if={other} of=/dev/null bs=512 count=1")[0] == 0) is not bool(expected)


def test_scsi_mandat(guest: Guest) -> None:
    for lun in (MEMORY_512, FILE_512E, FILE_4096):
        keep(guest, f"scsi_mandat_{lun}", f"scsi_mandat {device(guest, 1, 0, lun)}")


def test_sg_persist_tst(guest: Guest) -> None:
    example = Path("/usr/share/doc/sg3-utils/examples/sg_persist_tst.sh")
    script = example if example.exists() else Path(f"{example}.gz")
    guest.check(f"zcat -f {script} >/run/tst.sh")
    keep(
        guest, "sg_persist_tst", f"sh /run/tst.sh {device(guest, 1, 0, FILE_4096)}",
        wanted=("1 registered reservation key", "Reservation follows", "scope: LU_SCOPE,  type: Write Exclusive"),
    )  # fmt: skip


def test_a_reservation_between_two_adapters(guest: Guest) -> None:
    """Each adapter is an initiator of its own, to sg_persist and to a file's writes alike."""
    one, two = device(guest, 1, 0, FILE_512E), device(guest, 2, 0, FILE_512E)
    heard(guest, one, two)
    persist = "sg_persist -n"
    guest.check(f"{persist} -o -G -S 0xa {one}; {persist} -o -G -S 0xb {two}")
    guest.check(f"{persist} -o -R -K 0xa -T 5 {one}")
    status = keep(guest, "sg_persist_full_status", f"{persist} -s {two}")
    for number in (1, 2):
        assert wwpn(number).replace(":", "") in status.replace(" ", ""), status
    keep(guest, "sg_persist_capabilities", f"{persist} -c {two}", wanted=("Compatible Reservation Handling",))
    guest.check(f"sg_dd if=/dev/zero of={two} bs=512 count=1")
    guest.check(f"{persist} -o -A -K 0xa -S 0xb -T 5 {one}")
    assert guest.run(f"sg_turs {two}")[0] == 6, "registrations preempted"
    assert guest.run(f"sg_dd if=/dev/zero of={two} bs=512 count=1")[0] != 0
    assert guest.run(f"{persist} -o -R -K 0xb -T 5 {two}")[0] == 24, "reservation conflict"
    guest.check(f"sg_dd if={two} of=/dev/null bs=512 count=1")
    guest.check(f"{persist} -o -C -K 0xa {one}")
    guest.check(f"sg_dd if=/dev/zero of={two} bs=512 count=1")


def test_registrations_for_others_and_through_all_ports(guest: Guest) -> None:
    """SPEC_I_PT, ALL_TG_PT and REGISTER AND MOVE, as sg_persist sends them."""
    one, two = device(guest, 1, 0, MEMORY_512), device(guest, 2, 0, MEMORY_512)
    heard(guest, one, two)
    name = wwpn(2).replace(":", "")
    persist = "sg_persist -n"
    guest.check(f"{persist} -o -G -S 0xa --param-alltgpt {one}")
    keys = keep(guest, "sg_persist_alltgpt", f"{persist} -s {one}")
    assert keys.lower().count("key=0xa") == 2, keys
    guest.check(f"{persist} -o -R -K 0xa -T 1 {one}")
    keep(
        guest, "sg_persist_move",
        f"{persist} -o --register-move --param-rk=0xa --param-sark=0xb --relative-target-port=1 "
        f"--transport-id=fcp,{name} {one}",
    )  # fmt: skip
    assert guest.run(f"sg_dd if=/dev/zero of={one} bs=512 count=1")[0] != 0
    guest.check(f"sg_dd if=/dev/zero of={two} bs=512 count=1")
    guest.check(f"{persist} -o -C -K 0xb {two}")
    heard(guest, one, two)
    guest.check(f"{persist} -o -G -S 0xc --transport-id=fcp,{name} {one}")
    keys = keep(guest, "sg_persist_spec_i_pt", f"{persist} -s {one}")
    assert name in keys.replace(" ", ""), keys
    guest.check(f"{persist} -o -C -K 0xc {one}")
