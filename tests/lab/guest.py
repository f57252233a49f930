"""A real Linux guest under QEMU, up in seconds, that runs what a test tells it.

    with Guest([*vhost_user_scsi(socket)], workdir=tmp_path) as guest:
        status, output = guest.run("lsscsi")
        job = guest.popen("fio ...")                  # in the background
        guest.qmp("device_del", id="hba0"); guest.event("DEVICE_DELETED")
        status, output = job.wait(timeout=60)

The guest sees the host's whole root file system read-only under a tmpfs: every program of the host
runs in it, nothing that it writes reaches the host, except in directories given as shares.  Its
/run, /proc, /sys and /dev are its own.  Its memory is a shared memfd, as vhost-user needs.

By hand, from the top of the source tree:

    python -m tests.lab.guest [--vhost SOCKET]... [--qemu PROGRAM] [--console] [-- COMMAND]

Environment: VHOSTFC_ACCEL, QEMU's accelerator (default tcg,thread=multi); see boot.py for the cache.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.lab.boot import debian_kernel, make_initramfs
from tests.lab.channel import Channel, GuestError, Job, Qmp, Sink

ACCEL = os.environ.get("VHOSTFC_ACCEL") or "tcg,thread=multi"
#: For a boot under TCG on a busy machine with two cores.
BOOT_TIMEOUT = 240.0
_CMDLINE = (
    "console=ttyS0 quiet panic=-1 mitigations=off nokaslr audit=0 tsc=reliable"
    " cryptomgr.notests rcupdate.rcu_expedited=1"
)
_prctl: Callable[[int, int], int] = ctypes.CDLL(None).prctl
_PR_SET_PDEATHSIG = 1


def vhost_user_scsi(path: Path | str, ident: str = "hba0", **properties: object) -> list[str]:
    """QEMU's arguments for our adapter on this socket, e.g. num_queues=2, bootindex=1, bus="slot0"."""
    device = ",".join(["vhost-user-scsi-pci", f"id={ident}", f"chardev=chr-{ident}"])
    device += "".join(f",{key}={value}" for key, value in properties.items())
    return ["-chardev", f"socket,id=chr-{ident},path={path}", "-device", device]


class Machine:
    """A QEMU process with its monitor, its console's log and shared memory; what it boots is in its arguments."""

    def __init__(
        self,
        args: Sequence[str | Path],
        *,
        workdir: Path,
        memory: str = "1G",
        cpus: int = 2,
        qemu: str = "qemu-system-x86_64",
        slots: int = 4,
        reboot: bool = False,
        console: bool = False,
    ) -> None:
        """slots: PCIe slots slot0.. that devices can be plugged into while it runs.  reboot: a reset
        starts it anew instead of ending QEMU.  console: the serial console is on our own terminal."""
        self.workdir = workdir
        self._own_session = not console
        self._monitor_end, self._monitor_fd = socket.socketpair()
        serial = "stdio,signal=off" if console else "null"
        self.command = [
            *(qemu, "-name", workdir.name, "-nodefaults", "-no-user-config", "-display", "none"),
            *(() if reboot else ("-no-reboot",)),
            *("-accel", ACCEL, "-cpu", "max,la57=off", "-smp", str(cpus), "-m", memory),
            *("-object", f"memory-backend-memfd,id=mem,size={memory},share=on", "-machine", "q35,memory-backend=mem"),
            *("-chardev", f"{serial},id=ser,logfile={self.console_log}", "-serial", "chardev:ser"),
            *("-chardev", f"socket,id=mon,fd={self._monitor_fd.fileno()}", "-mon", "chardev=mon,mode=control"),
        ]
        for slot in range(slots):
            self.command += ["-device", f"pcie-root-port,id=slot{slot},chassis={slot + 1}"]
        self.command += [str(arg) for arg in args]
        self.inherited = [self._monitor_fd]
        self.process: subprocess.Popen[bytes] | None = None
        self.monitor: Qmp | None = None

    @property
    def console_log(self) -> Path:
        return self.workdir / "console.log"

    @property
    def qemu_log(self) -> Path:
        return self.workdir / "qemu.log"

    def start(self) -> Self:
        with open(self.qemu_log, "wb") as log:
            self.process = subprocess.Popen(
                self.command,
                stdin=None if not self._own_session else subprocess.DEVNULL,
                stdout=None if not self._own_session else log,
                stderr=log,
                pass_fds=[end.fileno() for end in self.inherited],
                start_new_session=self._own_session,
                preexec_fn=_die_with_parent,  # noqa: PLW1509  # QEMU must not outlive a test run that was killed
            )
        for end in self.inherited:
            end.close()
        self.monitor = Qmp(self._monitor_end, self.why)
        return self

    def qmp(self, command: str, **arguments: object) -> Any:
        assert self.monitor, "not started"
        return self.monitor(command, **arguments)

    def event(self, name: str, timeout: float = 30) -> dict[str, Any]:
        assert self.monitor, "not started"
        return self.monitor.event(name, timeout)

    def console(self) -> str:
        """All that the serial console has shown."""
        return self.console_log.read_text(errors="replace") if self.console_log.exists() else ""

    def why(self) -> str:
        """The end of QEMU's log and of the console, for an error's message."""
        tail = b""
        for path in (self.qemu_log, self.console_log):
            tail += path.read_bytes()[-3000:] if path.exists() else b""
        return ":\n" + tail.decode(errors="replace")

    def kill(self) -> None:
        """SIGKILL, as when the host's memory runs out."""
        assert self.process, "not started"
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        if self.process and self.process.poll() is None:
            self.process.terminate()  # QEMU quits orderly: devices are stopped
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.kill()
        if self.monitor:
            self.monitor.close()
        for end in (self._monitor_end, *self.inherited):
            end.close()

    def __enter__(self) -> Self:
        try:
            return self.start()
        except BaseException:
            self.stop()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


class Guest(Machine):
    """A Machine that boots Debian's kernel and obeys run()."""

    def __init__(
        self,
        args: Sequence[str | Path] = (),
        *,
        workdir: Path,
        append: str = "",
        modules: tuple[str, ...] = (),
        shares: Sequence[Path] = (),
        **machine: Any,
    ) -> None:
        """append: kernel arguments.  shares: directories that the guest writes through to, at the same path."""
        kernel = debian_kernel()
        initramfs = workdir / "initramfs"
        make_initramfs(initramfs, kernel, modules)
        end, fd = socket.socketpair()
        self._channel_end = end
        files = [("root", Path("/"), ",readonly=on"), ("modules", kernel.modules, ",readonly=on")]
        files += [(f"s{number}", share.resolve(), "") for number, share in enumerate(shares)]
        boot: list[str | Path] = []
        for tag, path, mode in files:
            boot += ["-virtfs", f"local,path={path},mount_tag={tag},security_model=none,multidevs=remap{mode}"]
        boot += ["-device", "virtio-serial-pci,id=vser", "-chardev", f"socket,id=cmd,fd={fd.fileno()}"]
        boot += ["-device", "virtserialport,chardev=cmd,name=lab.cmd", "-device", "virtio-rng-pci"]
        line = [_CMDLINE, *(f"lab.share={tag}={path}" for tag, path, _ in files[2:]), append]
        boot += ["-kernel", kernel.image, "-initrd", initramfs, "-append", " ".join(line)]
        super().__init__([*boot, *args], workdir=workdir, **machine)
        self.inherited.append(fd)
        self.channel: Channel | None = None
        self.boot_seconds = 0.0

    def start(self) -> Self:
        begin = time.monotonic()
        super().start()
        self.channel = Channel(self._channel_end, self.why)
        self.ready()
        self.boot_seconds = time.monotonic() - begin
        return self

    def ready(self, timeout: float = BOOT_TIMEOUT) -> None:
        """Wait until the guest answers: after the start, and after a reboot."""
        assert self.channel, "not started"
        self.channel.synchronise(timeout)

    def popen(self, command: str, sink: Sink | None = None, *, stdin: bool = False) -> Job:
        """Start a shell command."""
        assert self.channel, "not started"
        return self.channel.popen(command, sink, stdin=stdin)

    def run(self, command: str, timeout: float | None = 120, *, data: bytes | None = None) -> tuple[int, str]:
        """(exit status, output) of a shell command; status 124: it did not end in time."""
        job = self.popen(command, stdin=data is not None)
        if data is not None:
            job.write(data)
            job.close_stdin()
        return job.wait(timeout)

    def check(self, command: str, timeout: float | None = 120) -> str:
        """The output of a command that must succeed."""
        status, output = self.run(command, timeout)
        if status:
            raise GuestError(f"{command!r} gave {status}: {output}" + self.why())
        return output

    def kernel_errors(self) -> list[str]:
        """The lines that the guest's kernel logged as errors or worse, but for those about a late emulated clock."""
        lines = self.check("dmesg --level=emerg,alert,crit,err --notime").splitlines()
        return [line for line in lines if not re.search(r"8254 timer|clocksource|\bTSC\b|rcu.*stall", line)]

    def stop(self) -> None:
        super().stop()
        if self.channel:
            self.channel.close()
        self._channel_end.close()


def _die_with_parent() -> None:
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def main(arguments: Sequence[str]) -> int:
    words = list(arguments)
    command: list[str] = []
    if "--" in words:
        at = words.index("--")
        words, command = words[:at], words[at + 1 :]
    parser = argparse.ArgumentParser(prog="python -m tests.lab.guest", description="Boot a Linux guest under QEMU.")
    parser.add_argument("--vhost", action="append", default=[], metavar="SOCKET", help="an adapter's socket")
    parser.add_argument("--qemu", default="qemu-system-x86_64", metavar="PROGRAM")
    parser.add_argument("--memory", default="1G")
    parser.add_argument("--cpus", type=int, default=2)
    parser.add_argument("--share", action="append", default=[], type=Path, metavar="DIRECTORY")
    parser.add_argument("--args", default="", help="more arguments for QEMU, in one string")
    parser.add_argument("--console", action="store_true", help="the serial console here: press Enter for a shell")
    options = parser.parse_args(words)
    args = options.args.split()
    for number, path in enumerate(options.vhost):
        args += vhost_user_scsi(path, f"hba{number}")
    workdir = Path(tempfile.mkdtemp(prefix="vhostfc-guest-"))
    machine: dict[str, Any] = {"qemu": options.qemu, "memory": options.memory, "cpus": options.cpus}
    try:
        with Guest(args, workdir=workdir, shares=options.share, console=options.console, **machine) as guest:
            print(f"guest up after {guest.boot_seconds:.1f} s", file=sys.stderr)
            if command:
                return guest.popen(" ".join(command), _echo).wait()[0]
            assert guest.process
            return guest.process.wait()
    except KeyboardInterrupt:
        return 130
    except GuestError as error:
        print(error, file=sys.stderr)
        return 125
    finally:
        shutil.rmtree(workdir)


def _echo(data: bytes) -> None:
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
