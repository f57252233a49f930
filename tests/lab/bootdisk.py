"""Disks that firmware boots from, made by hand: no assembler, no file system tools, nothing to install.

What they start prints one line on the serial port and halts.  Both do more than load themselves: the
line of the BIOS's comes from blocks that its boot sector reads with INT 13h, the line of UEFI's lies
at the end of a program that is large enough for many reads.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping

SECTOR = 512

_UART = 0x3F8  # COM1; its line status register is 5 further on, bit 5: room for a byte


def bios_disk(line: str, *, at: int = 1000, sectors: int = 64) -> bytes:
    """A disk whose boot sector reads `sectors` blocks from block `at` on, and prints the text at their end."""
    text = line.encode("ascii") + b"\r\n\0"
    packet = struct.pack("<BBHHHQ", 16, 0, sectors, 0, 0x1000, at)  # an INT 13h disk address packet: to 1000:0000
    code = bytes.fromhex(
        "31 c0 8e d8 8e d0 bc 00 7c fc"  # xor ax,ax; ds = ss = 0; mov sp,7c00h; cld
        "be f0 7d b4 42 cd 13 72 1f"  # mov si,7df0h-16 (the packet); mov ah,42h; int 13h; jc halt
        "b8 00 10 8e d8"  # ds = 1000h
        "be 00 00"  # mov si,the text's offset
        "ac 84 c0 74 12"  # next: lodsb; test al,al; jz halt
        "88 c4 ba fd 03"  # mov ah,al; mov dx,3fdh
        "ec a8 20 74 fb"  # full: in al,dx; test al,20h; jz full
        "88 e0 ba f8 03 ee eb e9"  # mov al,ah; mov dx,3f8h; out dx,al; jmp next
        "fa f4 eb fd"  # halt: cli; hlt; jmp $-1
    )
    where = sectors * SECTOR - len(text)
    code = code.replace(bytes.fromhex("be f0 7d"), b"\xbe" + struct.pack("<H", 0x7C00 + 0x1E0))
    code = code.replace(bytes.fromhex("be 00 00"), b"\xbe" + struct.pack("<H", where))
    boot = code.ljust(0x1E0, b"\0") + packet + bytes(14) + b"\x55\xaa"
    return boot.ljust(at * SECTOR, b"\0") + bytes(where) + text


def efi_program(line: str, *, size: int = 256 << 10) -> bytes:
    """A PE32+ image for UEFI on x86-64 of about `size` bytes; the line is at its end."""
    text = line.encode("ascii") + b"\r\n\0"
    headers, base = 0x200, 0x1000
    body = bytearray(-(-(size + len(text)) // base) * base)
    code = bytearray.fromhex(
        "48 8d 35 00 00 00 00 fc"  # lea rsi,[rip+text]; cld
        "ac 84 c0 74 14"  # next: lodsb; test al,al; jz halt
        "88 c4 66 ba fd 03"  # mov ah,al; mov dx,3fdh
        "ec a8 20 74 fb"  # full: in al,dx; test al,20h; jz full
        "88 e0 66 ba f8 03 ee eb e7"  # mov al,ah; mov dx,3f8h; out dx,al; jmp next
        "fa f4 eb fd"  # halt: cli; hlt; jmp $-1
    )
    code[3:7] = struct.pack("<i", len(body) - len(text) - 7)
    body[: len(code)] = code
    body[-len(text) :] = text

    dos = b"MZ".ljust(0x3C, b"\0") + struct.pack("<I", 0x40)
    coff = b"PE\0\0" + struct.pack("<HHIIIHH", 0x8664, 1, 0, 0, 0, 112 + 16 * 8, 0x0022)  # x86-64, one section
    optional = struct.pack("<HBBIIIII", 0x20B, 1, 0, len(body), 0, 0, base, base)  # PE32+, entry and code at `base`
    optional += struct.pack("<QIIHHHHHHI", 0, base, SECTOR, 0, 0, 0, 0, 0, 0, 0)  # alignments in memory and in file
    optional += struct.pack("<IIIHH", base + len(body), headers, 0, 10, 0)  # subsystem 10: EFI application
    optional += struct.pack("<QQQQII", 0, 0, 0, 0, 0, 16) + bytes(16 * 8)  # no data directories
    section = struct.pack("<8sIIIIIIHHI", b".text", len(body), base, len(body), headers, 0, 0, 0, 0, 0xE0000020)
    return (dos + coff + optional + section).ljust(headers, b"\0") + bytes(body)


def fat_disk(files: Mapping[str, bytes], *, size: int = 16 << 20) -> bytes:
    """A disk of `size` bytes that is one FAT16 volume, with files such as "EFI/BOOT/BOOTX64.EFI" (8.3 names)."""
    per_cluster, root_entries, tables = 4, 512, 2
    total = size // SECTOR
    per_table = -(-(total // per_cluster + 2) * 2 // SECTOR)
    first = 1 + tables * per_table + root_entries * 32 // SECTOR  # where cluster 2 lies
    table = [0xFFF8, 0xFFFF]
    clusters = bytearray()

    def store(data: bytes) -> int:
        """Its first cluster."""
        start = len(table)
        count = max(1, -(-len(data) // (per_cluster * SECTOR)))
        table.extend([*range(start + 1, start + count), 0xFFFF])
        clusters.extend(data.ljust(count * per_cluster * SECTOR, b"\0"))
        return start

    def entry(name: str, attribute: int, start: int, length: int) -> bytes:
        stem, _, suffix = name.partition(".")
        short = f"{stem:8}{suffix:3}".upper().encode("ascii") if name not in {".", ".."} else f"{name:11}".encode()
        assert len(short) == 11, name
        return struct.pack("<11sB10xHHHI", short, attribute, 0, 0x21, start, length)

    def directory(prefix: str) -> bytes:
        """The entries of everything below `prefix`; sub-directories are stored on the way."""
        inside = {path.removeprefix(prefix): data for path, data in files.items() if path.startswith(prefix)}
        entries = b""
        for name in dict.fromkeys(path.partition("/")[0] for path in inside):
            if name in inside:
                entries += entry(name, 0x20, store(inside[name]), len(inside[name]))
            else:
                entries += entry(name, 0x10, subdirectory(f"{prefix}{name}/"), 0)
        return entries

    def subdirectory(prefix: str) -> int:
        parents = 64
        below = directory(prefix)
        start = len(table)  # where it will be: "." says so; ".." is 0 for the root, which is enough for a reader
        data = entry(".", 0x10, start, 0) + entry("..", 0x10, 0, 0) + below
        assert len(data) <= parents * 32
        return store(data)

    root = directory("").ljust(root_entries * 32, b"\0")
    parameters = struct.pack(
        "<3s8sHBHBHHBHHHIIBBBI11s8s",
        *(b"\xeb\xfe\x90", b"VHOSTFC ", SECTOR, per_cluster, 1, tables, root_entries, total if total < 1 << 16 else 0),
        *(0xF8, per_table, 32, 64, 0, total if total >= 1 << 16 else 0, 0x80, 0, 0x29, 0x20221122),
        *(b"BOOT       ", b"FAT16   "),
    )
    allocation = struct.pack(f"<{len(table)}H", *table).ljust(per_table * SECTOR, b"\0")
    volume = parameters.ljust(510, b"\0") + b"\x55\xaa" + allocation * tables + root
    assert len(volume) == first * SECTOR
    assert len(volume) + len(clusters) <= size
    return (volume + bytes(clusters)).ljust(size, b"\0")
