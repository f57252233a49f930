"""Descriptor chains that no driver would make: each is answered where there is a place for an answer, counted,
and leaves the ring working."""

from __future__ import annotations

import os
import threading

import pytest

from tests.hostile.adapter import DaemonAdapter
from tests.hostile.guest import FAILURE, READ, WRITE_BLOCK, Guest, R, W, chain
from vhostfc.frontend.client import WANTED
from vhostfc.frontend.driver import ScsiDriver
from vhostfc.frontend.ring import INDIRECT, NEXT, descriptor
from vhostfc.vhost.features import Feature
from vhostfc.virtio.scsi import CommandResponse, Response


async def test_a_good_chain_by_hand(adapter: DaemonAdapter, guest: Guest) -> None:
    """The yardstick: what the other tests distort is right to begin with."""
    request, response, data = guest.request(), guest.response(), guest.buffer(512)
    used = await guest.submit(chain((request, R), (response, W), (data, W)))

    assert used.length == 108 + 512
    assert guest.decode(response).response == Response.OK
    assert bytes(data.view) == bytes(range(256)) * 2


async def test_descriptor_loop_of_readable(adapter: DaemonAdapter, guest: Guest) -> None:
    """A chain that never ends and has no place for an answer comes back with nothing written."""
    request = guest.request()
    used = await guest.submit([(request.guest, 51, NEXT, 1), (request.guest, 51, NEXT, 0)])

    assert used.length == 0
    assert adapter.counters()["bad_chain"] == 1
    await guest.works()


async def test_descriptor_loop_to_itself(adapter: DaemonAdapter, guest: Guest) -> None:
    """The shortest loop."""
    response = guest.response()
    used = await guest.submit([(response.guest, 108, NEXT | W, 0)])

    assert used.length in (0, 108)
    assert adapter.counters()["bad_chain"] == 1
    await guest.works()


async def test_descriptor_loop_behind_the_response(adapter: DaemonAdapter, guest: Guest) -> None:
    """A loop with a place for an answer is told FAILURE there, and no data is moved."""
    request, response, data = guest.request(), guest.response(), guest.buffer(512)
    parts = chain((request, R), (response, W), (data, W))
    parts[2] = (data.guest, 512, NEXT | W, 2)
    used = await guest.submit(parts)

    assert used.length == 108
    assert guest.decode(response).response == FAILURE
    assert bytes(data.view) == b"\xee" * 512
    assert adapter.counters()["bad_chain"] == 1
    await guest.works()


async def test_chain_longer_than_the_ring(adapter: DaemonAdapter, guest: Guest) -> None:
    """A table of more descriptors than any device takes is refused before it is walked."""
    request, response = guest.request(), guest.response()
    parts = chain((request, R), *[((request.guest, 1), R)] * 2000, (response, W))
    used = await guest.indirect(guest.table(parts))

    assert used.length == 0
    assert adapter.counters()["bad_indirect"] == 1
    await guest.works()


@pytest.mark.parametrize("following", [64, 0x8000, 0xFFFF])
async def test_next_out_of_range(adapter: DaemonAdapter, guest: Guest, following: int) -> None:
    """The next descriptor would be behind the table."""
    request, response = guest.request(), guest.response()
    used = await guest.submit([(request.guest, 51, NEXT, 1), (response.guest, 108, NEXT | W, following)])

    assert used.length == 108
    assert guest.decode(response).response == FAILURE
    assert adapter.counters()["bad_chain"] == 1
    await guest.works()


async def test_next_out_of_range_in_an_indirect_table(adapter: DaemonAdapter, guest: Guest) -> None:
    """The same inside a table."""
    request, response, data = guest.request(), guest.response(), guest.buffer(512)
    parts = chain((request, R), (response, W), (data, W))
    parts[1] = (response.guest, 108, NEXT | W, 3)
    used = await guest.indirect(guest.table(parts))

    assert used.length == 108
    assert guest.decode(response).response == FAILURE
    assert adapter.counters()["bad_chain"] == 1
    await guest.works()


async def test_loop_in_an_indirect_table(adapter: DaemonAdapter, guest: Guest) -> None:
    """A table that leads back to its beginning."""
    request = guest.request()
    used = await guest.indirect(guest.table([(request.guest, 51, NEXT, 1), (request.guest, 51, NEXT, 0)]))

    assert used.length == 0
    assert adapter.counters()["bad_chain"] == 1
    await guest.works()


@pytest.mark.parametrize("length", [0, 1, 15, 17, 40, 0xFFFFFFFF, 0xFFFFFFF0])
async def test_indirect_table_of_a_bad_length(adapter: DaemonAdapter, guest: Guest, length: int) -> None:
    """Not a whole number of descriptors, none, or more than there are."""
    request, response = guest.request(), guest.response()
    used = await guest.indirect(guest.table(chain((request, R), (response, W))), length=length)

    assert used.length == 0
    assert adapter.counters()["bad_indirect"] == 1
    assert bytes(response.view) == b"\xee" * 108
    await guest.works()


async def test_nested_indirect_table(adapter: DaemonAdapter, guest: Guest) -> None:
    """A table inside a table (virtio 2.7.5.3.1)."""
    request, response, data = guest.request(), guest.response(), guest.buffer(512)
    inner = guest.table(chain((response, W), (data, W)))
    used = await guest.indirect(guest.table(chain((request, R), (inner, INDIRECT))))

    assert used.length == 0
    assert adapter.counters()["bad_indirect"] == 1
    await guest.works()


async def test_indirect_table_with_next(adapter: DaemonAdapter, guest: Guest) -> None:
    """INDIRECT and NEXT exclude each other (virtio 2.7.5.3.1)."""
    request, response = guest.request(), guest.response()
    table = guest.table(chain((request, R)))
    used = await guest.submit([(table.guest, len(table), INDIRECT | NEXT, 1), (response.guest, 108, W, 0)])

    assert used.length == 0
    assert adapter.counters()["bad_indirect"] == 1
    await guest.works()


async def test_indirect_table_after_direct_descriptors(adapter: DaemonAdapter, guest: Guest) -> None:
    """This is allowed (virtio 2.7.5.3.2): direct first, the table last."""
    request, response, data = guest.request(), guest.response(), guest.buffer(512)
    table = guest.table(chain((response, W), (data, W)))
    used = await guest.submit(chain((request, R), (table, INDIRECT)))

    assert used.length == 108 + 512
    assert guest.decode(response).response == Response.OK


async def test_indirect_table_that_was_not_negotiated(adapter: DaemonAdapter) -> None:
    """Without INDIRECT_DESC the flag means nothing good."""
    features = WANTED & ~(1 << Feature.INDIRECT_DESC)
    async with ScsiDriver.open(adapter.socket, queue_size=64, features=features) as driver:
        guest = Guest(driver)
        request, response = guest.request(), guest.response()
        used = await guest.indirect(guest.table(chain((request, R), (response, W))))

        assert used.length == 0
        assert adapter.counters()["bad_indirect"] == 1
        await guest.works()


@pytest.mark.parametrize("address", [0, 0x10, 0xFFFFFFFFFFFFFFF0, 0xFFFFFFFFFFFFFFE0, 0x7E0000000000])
async def test_indirect_table_outside_memory(adapter: DaemonAdapter, guest: Guest, address: int) -> None:
    """At addresses that are nobody's, the last of the address space, or round its end."""
    used = await guest.submit([(address, 64, INDIRECT, 0)])

    assert used.length == 0
    assert adapter.counters()["bad_address"] == 1
    await guest.works()


async def test_indirect_table_across_the_end_of_memory(adapter: DaemonAdapter, guest: Guest) -> None:
    """Its first descriptor is inside, its second is not."""
    region = guest.driver.memory.regions[0]
    request = guest.request()
    end = region.size - 16
    region.view[end:] = descriptor(request.guest, 51, NEXT, 1)
    used = await guest.submit([(region.guest_phys + end, 32, INDIRECT, 0)])

    assert used.length == 0
    assert adapter.counters()["bad_address"] == 1
    await guest.works()


async def test_indirect_table_that_changes_under_us(adapter: DaemonAdapter, guest: Guest) -> None:
    """Another CPU of the guest rewrites the table while it is read: each command gets some answer, memory outside
    the guest's is never touched, and the ring goes on."""
    request, response, data = guest.request(), guest.response(), guest.buffer(512)
    good = b"".join(descriptor(*each) for each in chain((request, R), (response, W), (data, W)))
    bad = b"".join(
        [
            descriptor(0xFFFFFFFFFFFFFFF0, 0xFFFFFFFF, NEXT | W, 0xFFFF),
            descriptor(request.guest, 0xFFFFFFFF, NEXT, 1),
            descriptor(0, 512, W | INDIRECT, 0),
        ]
    )
    table = guest.buffer(good)
    stop = threading.Event()

    def flip() -> None:
        while not stop.is_set():
            table.view[:48] = bad
            table.view[:16] = good[:16]
            table.view[16:48] = good[16:]

    flipper = threading.Thread(target=flip)
    flipper.start()
    try:
        for _ in range(150):
            await guest.indirect(table)
    finally:
        stop.set()
        flipper.join()
    counters = adapter.counters()
    assert counters["broken_rings"] == 0
    await guest.works()


async def test_lengths_that_overflow(adapter: DaemonAdapter, guest: Guest) -> None:
    """Writable lengths whose sum has no room in 32 bits: nothing is moved."""
    request, response = guest.request(), guest.response()
    size = 16 << 20
    base = guest.driver.memory.regions[0].guest_phys
    parts = chain((request, R), (response, W), *[((base, size), W)] * 300)
    used = await guest.indirect(guest.table(parts))

    assert used.length == 108
    assert guest.decode(response).response == FAILURE
    assert adapter.counters()["bad_chain"] == 1
    await guest.works()


@pytest.mark.parametrize("length", [0xFFFFFFFF, 0x80000000, 64 << 20])
@pytest.mark.parametrize("flags", [R, W])
async def test_length_beyond_the_region(adapter: DaemonAdapter, guest: Guest, length: int, flags: int) -> None:
    """A buffer that begins inside memory and ends far outside."""
    request, response, data = guest.request(), guest.response(), guest.buffer(512)
    cdb = READ if flags == W else WRITE_BLOCK
    request.view[19:29] = cdb
    part = ((data.guest, length), flags)
    parts = chain((request, R), (response, W), part) if flags == W else chain((request, R), part, (response, W))
    used = await guest.submit(parts)

    assert used.length == (108 if flags == W else 0)
    if flags == W:
        assert guest.decode(response).response == FAILURE
    counters = adapter.counters()
    assert counters["bad_address"] + counters["bad_chain"] == 1  # the sum of all lengths is too much by itself
    await guest.works()


@pytest.mark.parametrize(
    "address",
    [0, 0xFFFFFFFFFFFFFF00, 0xFFFFFFFFFFFFFFFF, (1 << 32) - 1, 0x7E0100000000],
    ids=["zero", "wraps", "last", "before", "user address"],
)
async def test_address_outside_every_region(adapter: DaemonAdapter, guest: Guest, address: int) -> None:
    """Addresses that are nobody's, wrap, or belong to another address space."""
    request, response = guest.request(), guest.response()
    used = await guest.submit(chain((request, R), (response, W), ((address, 512), W)))

    assert used.length == 108
    assert guest.decode(response).response == FAILURE
    assert adapter.counters()["bad_address"] == 1
    await guest.works()


async def test_buffer_across_a_gap_between_regions(adapter: DaemonAdapter) -> None:
    """Two regions with a hole between them are not one."""
    async with ScsiDriver.open(adapter.socket, queue_size=64, regions=(8 << 20, 1 << 20)) as driver:
        guest = Guest(driver)
        request, response = guest.request(), guest.response()
        first = driver.memory.regions[0]
        used = await guest.submit(chain((request, R), (response, W), ((first.guest_phys + first.size - 256, 512), W)))
        assert guest.decode(response).response == FAILURE
        assert used.length == 108
        assert adapter.counters()["bad_address"] == 1
        await guest.works()


async def test_buffer_across_adjacent_regions_is_fine(adapter: DaemonAdapter) -> None:
    """A buffer may cross a border between regions that touch: guests have such memory."""
    async with ScsiDriver.open(adapter.socket, queue_size=64, regions=(8 << 20,)) as driver:
        first = driver.memory.regions[0]
        second = driver.memory.add(1 << 20, guest_phys=first.guest_phys + first.size)
        await driver.client.send_memory()
        guest = Guest(driver)
        request, response = guest.request(), guest.response()
        used = await guest.submit(chain((request, R), (response, W), ((second.guest_phys - 100, 512), W)))
        assert guest.decode(response).response == Response.OK
        assert used.length == 108 + 512
        assert bytes(first.view[-100:]) + bytes(second.view[:412]) == bytes(range(256)) * 2


async def test_readable_after_writable(adapter: DaemonAdapter, guest: Guest) -> None:
    """The order is readable, then writable (virtio 2.7.4.2)."""
    request, response, data = guest.request(WRITE_BLOCK), guest.response(), guest.buffer(512)
    used = await guest.submit(chain((request, R), (response, W), (data, R)))

    assert used.length == 108
    assert guest.decode(response).response == FAILURE
    assert adapter.counters()["bad_chain"] == 1
    await guest.works()


async def test_response_before_request(adapter: DaemonAdapter, guest: Guest) -> None:
    """The same with the header itself on the wrong side."""
    request, response = guest.request(), guest.response()
    await guest.submit(chain((response, W), (request, R)))

    assert adapter.counters()["bad_chain"] == 1
    await guest.works()


@pytest.mark.parametrize("size", [1, 8, 50])
async def test_short_request_header(adapter: DaemonAdapter, guest: Guest, size: int) -> None:
    """Less than the 51 bytes of a command: nothing is guessed."""
    request, response, data = guest.request(), guest.response(), guest.buffer(512)
    used = await guest.submit(chain(((request.guest, size), R), (response, W), (data, W)))

    assert used.length == 108
    assert guest.decode(response).response == FAILURE
    assert bytes(data.view) == b"\xee" * 512
    assert adapter.counters()["bad_header"] == 1
    await guest.works()


@pytest.mark.parametrize("size", [1, 12, 107])
async def test_short_response_space(adapter: DaemonAdapter, guest: Guest, size: int) -> None:
    """No room for an answer: the buffer comes back with nothing written."""
    request, response = guest.request(), guest.response()
    used = await guest.submit(chain((request, R), ((response.guest, size), W)))

    assert used.length == 0
    assert bytes(response.view) == b"\xee" * 108
    assert adapter.counters()["bad_header"] == 1
    await guest.works()


async def test_only_a_request(adapter: DaemonAdapter, guest: Guest) -> None:
    """No writable part at all."""
    used = await guest.submit(chain((guest.request(), R)))

    assert used.length == 0
    assert adapter.counters()["bad_header"] == 1
    await guest.works()


async def test_empty_descriptors(adapter: DaemonAdapter, guest: Guest) -> None:
    """Descriptors of no length are nothing; a chain of nothing else is too short."""
    request, response, data = guest.request(), guest.response(), guest.buffer(512)
    nothing = ((request.guest, 0), R)
    used = await guest.submit(chain(nothing, (request, R), nothing, (response, W), ((0, 0), W), (data, W)))
    assert used.length == 108 + 512
    assert guest.decode(response).response == Response.OK

    used = await guest.submit(chain(nothing, ((response.guest, 0), W)))
    assert used.length == 0
    assert adapter.counters()["bad_header"] == 1
    await guest.works()


@pytest.mark.parametrize("cut", [1, 7, 50, 51, 60])
async def test_header_in_pieces(adapter: DaemonAdapter, guest: Guest, cut: int) -> None:
    """Borders of descriptors mean nothing (virtio 2.7.4.1): header, data and response may be cut anywhere."""
    data = os.urandom(512)
    out = guest.buffer(bytes(guest.request(WRITE_BLOCK).view) + data)
    response = guest.response()
    used = await guest.submit(
        chain(
            ((out.guest, cut), R),
            ((out.guest + cut, 51 + 512 - cut), R),
            ((response.guest, cut), W),
            ((response.guest + cut, 108 - cut), W),
        )
    )
    assert used.length == 108
    assert guest.decode(response).response == Response.OK

    back = guest.buffer(108 + 512)
    request = guest.request()
    await guest.submit(chain((request, R), ((back.guest, 108 + cut), W), ((back.guest + 108 + cut, 512 - cut), W)))
    assert bytes(back.view[108:]) == data
    restore = await guest.driver.command(0, 0, WRITE_BLOCK, data_out=bytes(range(256)) * 2)
    assert restore.good


async def test_both_directions_of_data(adapter: DaemonAdapter, guest: Guest) -> None:
    """Data out and in at once needs VIRTIO_SCSI_F_INOUT, which nobody offered."""
    request, response = guest.request(), guest.response()
    out, room = guest.buffer(512), guest.buffer(512)
    used = await guest.submit(chain((request, R), (out, R), (response, W), (room, W)))

    assert used.length == 108
    answer = guest.decode(response)
    assert (answer.response, answer.residual) == (FAILURE, 1024)
    assert bytes(room.view) == b"\xee" * 512
    assert adapter.counters()["bad_direction"] == 1
    await guest.works()


@pytest.mark.parametrize("direction", ["none", "in", "out"])
@pytest.mark.parametrize("opcode", [0xC0, 0xFF, 0x7F])
async def test_unknown_opcode(adapter: DaemonAdapter, guest: Guest, opcode: int, direction: str) -> None:
    """CHECK CONDITION, INVALID COMMAND OPERATION CODE, whatever comes with it."""
    cdb = bytes([opcode]) + bytes(15)
    data = {"none": {}, "in": {"data_in": 4096}, "out": {"data_out": bytes(4096)}}[direction]
    answer = await guest.driver.command(0, 0, cdb, **data)  # type: ignore[arg-type]

    assert (answer.response, answer.status, answer.sense_code) == (Response.OK, 2, (5, 0x20, 0))
    assert answer.residual == (0 if direction == "none" else 4096)
    await guest.works()


@pytest.mark.parametrize(
    "lun",
    ["0000400000000000", "0200400000000000", "0105400000000000", "01ff3fff00000000", "ffffffffffffffff"],
)
async def test_lun_fields_that_lead_nowhere(adapter: DaemonAdapter, guest: Guest, lun: str) -> None:
    """BAD_TARGET at once, and never a crash."""
    answer = await guest.driver.command(0, 0, READ, data_in=512, lun_field=bytes.fromhex(lun))

    assert answer.response == Response.BAD_TARGET
    assert adapter.counters()["bad_target"] >= 1
    await guest.works()


@pytest.mark.parametrize(
    ("lba", "blocks"), [(65536, 1), (65535, 2), (0xFFFFFFFF, 1), (0xFFFFFFFF, 0xFFFF), (0x80000000, 8)]
)
async def test_blocks_out_of_range(adapter: DaemonAdapter, guest: Guest, lba: int, blocks: int) -> None:
    """Nothing outside the medium is touched, at the end, beyond, or round the end of the arithmetic."""
    for opcode in (0x28, 0x2A):
        cdb = bytes([opcode, 0, *lba.to_bytes(4, "big"), 0, *blocks.to_bytes(2, "big"), 0])
        out, room = (b"", 512) if opcode == 0x28 else (bytes(512), 0)
        answer = await guest.driver.command(0, 0, cdb, out, room)
        assert (answer.status, answer.sense_code) == (2, (5, 0x21, 0))
    cdb = bytes([0x88, 0]) + (0xFFFFFFFFFFFFFFFF).to_bytes(8, "big") + (0xFFFFFFFF).to_bytes(4, "big") + bytes(2)
    answer = await guest.driver.command(0, 0, cdb, data_in=512)
    assert (answer.status, answer.sense_code) == (2, (5, 0x21, 0))
    await guest.works()


async def test_response_into_the_rings_themselves(adapter: DaemonAdapter, guest: Guest) -> None:
    """A guest may have its own rings overwritten: it harms itself alone."""
    request = guest.request()
    ring = guest.queue.ring
    guest.put(chain((request, R), ((ring.desc.guest, CommandResponse.SIZE), W)))
    guest.queue.expect(0)
    ring.offer(0)
    guest.queue.publish()
    guest.put(chain((request, R), ((ring.used.guest, len(ring.used)), W)), first=8)
    ring.put_descriptor(8, request.guest, 51, NEXT, 9)
    guest.queue.expect(8)
    ring.offer(8)
    guest.queue.publish()
    assert (await guest.driver.manage(5, 0, 0)) == Response.FUNCTION_COMPLETE  # the worker lives
