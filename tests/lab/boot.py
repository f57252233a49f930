"""What a test guest boots from: Debian's own kernel, unpacked once into a cache, and a small initramfs.

The kernel package has all modules that a test may want (virtio_scsi, scsi_debug, libfc, fcoe ...).
The initramfs loads what finds the root, mounts the host's root file system read-only through 9p
under a tmpfs, and starts guest_agent.py as process 1.

Environment: VHOSTFC_LAB_CACHE, where the kernel is kept (default ~/.cache/vhostfc-lab).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

LAB = Path(__file__).resolve().parent
CACHE = Path(os.environ.get("VHOSTFC_LAB_CACHE") or Path.home() / ".cache/vhostfc-lab")

#: What the initramfs loads; a test may ask for more.
MODULES = ("virtio_pci", "virtio_console", "overlay", "9p", "9pnet_virtio", "virtio_scsi", "sd_mod", "sg")

INIT = r"""#!/bin/busybox sh
b=/bin/busybox
$b mount -t proc proc /proc; $b mount -t sysfs sys /sys; $b mount -t devtmpfs dev /dev
while read -r m; do $b insmod $m || echo "lab: cannot load $m"; done </modules.list
for x in $($b cat /proc/cmdline); do case $x in lab.share=*) shares="$shares ${x#*=}";; esac; done
p9() { $b mkdir -p $2; $b mount -t 9p -o trans=virtio,version=9p2000.L,msize=512000,$3 $1 $2; }
p9 root /low ro,cache=loose || exec $b sh
$b mount -t tmpfs -o size=60% rw /rw; $b mkdir /rw/u /rw/w
$b mount -t overlay -o lowerdir=/low,upperdir=/rw/u,workdir=/rw/w over /new || exec $b sh
for d in proc sys; do $b mount -o move /$d /new/$d; done
$b mount -t devtmpfs dev /new/dev  # /dev stays too: sh wants its null
$b mount -t tmpfs -o mode=755 run /new/run
$b mkdir -p /new/dev/pts /new/dev/shm /new/run/lock
$b ln -s /proc/self/fd /new/dev/fd
for n in 0=stdin 1=stdout 2=stderr; do $b ln -s /proc/self/fd/${n%=*} /new/dev/${n#*=}; done
$b mount -t devpts -o ptmxmode=666 pts /new/dev/pts; $b mount -t tmpfs shm /new/dev/shm
$b mount -t debugfs debug /new/sys/kernel/debug
p9 modules /new/lib/modules/$($b uname -r) ro,cache=loose
for s in $shares; do p9 ${s%%=*} /new/${s#*=} rw; done
$b cp /agent.py /new/run/lab-agent.py
$b hostname guest; $b ip link set lo up
for n in /new/sys/class/virtio-ports/*; do
    [ "$($b cat $n/name)" = lab.cmd ] && port=/dev/${n##*/}
done
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root TERM=linux LC_ALL=C.UTF-8
$b chroot /new $b sh -c 'b=/bin/busybox; while read -r _; do $b setsid $b cttyhack bash --norc; done' \
    <>/dev/ttyS0 >&0 2>&0 &
exec $b switch_root -c /dev/ttyS0 /new /usr/bin/python3 -ISE /run/lab-agent.py $port
"""


@dataclass(frozen=True, slots=True)
class Kernel:
    """An unpacked kernel: the image, its release and its modules (with modules.dep)."""

    image: Path
    release: str
    modules: Path


def debian_kernel() -> Kernel:
    """The kernel of this Debian, downloaded and unpacked when the cache has none."""
    package = CACHE / "debian-kernel"
    if not package.exists():
        asked = ["apt-cache", "depends", "linux-image-amd64"]
        depends = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.split()
        name = next(word for word in depends if word.startswith("linux-image-") and word != "linux-image-amd64")
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as work:
            download = ["apt-get", "-qq", "-o", "APT::Sandbox::User=root", "-o", "Acquire::Retries=3", "download", name]
            subprocess.run(download, cwd=work, check=True)
            subprocess.run(["dpkg-deb", "-x", next(Path(work).glob("*.deb")), Path(work) / "x"], check=True)
            os.rename(Path(work) / "x", package)
    source = next((package / "lib/modules").iterdir())
    base = CACHE / "kernels"
    modules = base / "lib/modules" / source.name
    if not (modules / "modules.dep.bin").exists():
        modules.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(source, modules, dirs_exist_ok=True)
        subprocess.run(["depmod", "-b", base, source.name], check=True)
    return Kernel(_unpacked(package / f"boot/vmlinuz-{source.name}"), source.name, modules)


def _unpacked(packed: Path) -> Path:
    """The ELF image inside a bzImage: unpacked here, it boots seconds faster under TCG."""
    target = CACHE / "kernels" / packed.name.replace("vmlinuz", "vmlinux")
    if target.exists():
        return target
    data = packed.read_bytes()
    at = data.find(b"\xfd7zXZ\0")
    if at >= 0:
        plain = subprocess.run(["xz", "-dc"], input=data[at:], capture_output=True, check=False).stdout
        if plain.startswith(b"\x7fELF"):
            part = target.with_suffix(f".{os.getpid()}")
            part.write_bytes(plain)
            part.rename(target)
            return target
    return packed


def load_order(modules: Path, names: list[str]) -> list[str]:
    """The .ko files to insert, dependencies first; what this kernel has built in is left out."""
    depends: dict[str, tuple[str, list[str]]] = {}
    for line in (modules / "modules.dep").read_text().splitlines():
        path, _, needs = line.partition(":")
        depends[Path(path).name.split(".ko")[0].replace("-", "_")] = (path, needs.split())
    order: list[str] = []
    for name in names:
        if name in depends:
            path, rest = depends[name]
            order += [module for module in [*reversed(rest), path] if module not in order]
    return order


def make_initramfs(target: Path, kernel: Kernel, modules: tuple[str, ...]) -> None:
    """Write the initramfs that loads these modules besides the usual ones."""
    with tempfile.TemporaryDirectory(dir=target.parent) as directory:
        work = Path(directory)
        for name in ("bin", "dev", "proc", "sys", "low", "rw", "new"):
            (work / name).mkdir()
        shutil.copy("/bin/busybox", work / "bin/busybox")
        shutil.copy(LAB / "guest_agent.py", work / "agent.py")
        order = load_order(kernel.modules, [*MODULES, *modules])
        for path in order:
            shutil.copy(kernel.modules / path, work / Path(path).name)
        (work / "modules.list").write_text("".join(f"/{Path(path).name}\n" for path in order))
        (work / "init").write_text(INIT)
        (work / "init").chmod(0o755)
        members = "\n".join(str(path.relative_to(work)) for path in sorted(work.rglob("*")))
        with open(target, "wb") as out:
            pack = ["cpio", "-o", "-H", "newc", "--quiet"]
            subprocess.run(pack, cwd=work, input=members.encode(), stdout=out, check=True)
