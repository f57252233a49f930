"""Process 1 of a test guest: runs the commands that arrive on a virtio-serial port.

Frame, both ways: struct '!IcI' = command id, kind, payload length; then the payload.
  host -> guest   x  run payload with /bin/sh -c      i  bytes for its stdin (empty: close it)
                  k  signal its process group (payload: number)           p  ping
  guest -> host   o  bytes of stdout    e  bytes of stderr                r  answer to a ping
                  q  exit status (128+n when killed by signal n)
Imports little on purpose: under TCG every module that is imported delays the boot.
"""

import errno
import os
import select
import signal
import struct
import sys

HEADER = struct.Struct("!IcI")
LIMIT = 1 << 20  # stop reading the children while this much waits to go out


class Child:
    def __init__(self, ident: int, command: str) -> None:
        self.ident = ident
        pipes = [os.pipe() for _ in range(3)]
        self.pid = os.fork()
        if self.pid == 0:
            try:
                os.setsid()
                for fd, (read, write) in enumerate(pipes):
                    os.dup2(read if fd == 0 else write, fd)
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGPIPE, signal.SIG_DFL)
                os.chdir("/")
                os.execv("/bin/sh", ["sh", "-c", command])
            finally:
                os._exit(127)
        for fd in (pipes[0][0], pipes[1][1], pipes[2][1]):
            os.close(fd)
        self.stdin, self.out, self.err = pipes[0][1], pipes[1][0], pipes[2][0]
        for fd in (self.stdin, self.out, self.err):
            os.set_blocking(fd, False)


class Agent:
    def __init__(self, port: str) -> None:
        self.port = os.open(port, os.O_RDWR | os.O_NONBLOCK)
        self.received, self.waiting = b"", bytearray()
        self.children: dict[int, Child] = {}  # by pid
        self.pipes: dict[int, tuple[int, bytes]] = {}  # fd of a stdout or stderr -> (ident, kind)
        self.feeds: dict[int, bytearray] = {}  # fd of a stdin -> what is still to be written
        self.closing: set[int] = set()  # stdin fds to close once their feed is written
        self.wake, wake = os.pipe()
        for fd in (self.wake, wake):
            os.set_blocking(fd, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)

    def send(self, ident: int, kind: bytes, payload: bytes = b"") -> None:
        self.waiting += HEADER.pack(ident, kind, len(payload)) + payload

    def pump(self, fd: int) -> bool:
        """Forward what a child's pipe holds; False once there is nothing more for now."""
        try:
            data = os.read(fd, 65536)
        except BlockingIOError:
            return False
        if data:
            ident, kind = self.pipes[fd]
            if kind:
                self.send(ident, kind, data)
            return True
        del self.pipes[fd]
        os.close(fd)
        return False

    def reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            child = self.children.pop(pid, None)
            if child is None:
                continue  # an orphan that process 1 inherited
            for fd in (child.out, child.err):
                while fd in self.pipes and self.pump(fd):
                    pass
                if fd in self.pipes:  # a daemon that was left behind holds it: keep it draining
                    self.pipes[fd] = (0, b"")
            self.close_stdin(child.stdin)
            code = os.waitstatus_to_exitcode(status)
            self.send(child.ident, b"q", str(code if code >= 0 else 128 - code).encode())

    def close_stdin(self, fd: int) -> None:
        if fd in self.feeds:
            del self.feeds[fd]
            self.closing.discard(fd)
            os.close(fd)

    def frame(self, ident: int, kind: bytes, payload: bytes) -> None:
        if kind == b"p":
            self.send(ident, b"r")
        elif kind == b"x":
            child = Child(ident, payload.decode())
            self.children[child.pid] = child
            self.pipes[child.out] = (ident, b"o")
            self.pipes[child.err] = (ident, b"e")
            self.feeds[child.stdin] = bytearray()
            return
        for child in self.children.values():
            if child.ident != ident:
                continue
            if kind == b"k":
                try:  # noqa: SIM105  # contextlib would be one more import
                    os.killpg(child.pid, int(payload))
                except ProcessLookupError:
                    pass
            elif kind == b"i" and child.stdin in self.feeds:
                if payload:
                    self.feeds[child.stdin] += payload
                else:
                    self.closing.add(child.stdin)
            return

    def feed(self, fd: int) -> None:
        data = self.feeds[fd]
        try:
            if data:
                del data[: os.write(fd, data[:4096])]
        except BlockingIOError:
            return
        except OSError:
            self.close_stdin(fd)
            return
        if not data and fd in self.closing:
            self.close_stdin(fd)

    def step(self) -> None:
        poll = select.poll()
        poll.register(self.port, select.POLLIN | (select.POLLOUT if self.waiting else 0))
        poll.register(self.wake, select.POLLIN)
        if len(self.waiting) < LIMIT:
            for fd in self.pipes:
                poll.register(fd, select.POLLIN)
        for fd, data in self.feeds.items():
            if data or fd in self.closing:
                poll.register(fd, select.POLLOUT)
        events = dict(poll.poll(1000))
        state = events.pop(self.port, 0)
        if state & select.POLLHUP:  # nobody listens: what was to be said is lost
            self.received = b""
            self.waiting.clear()
            select.poll().poll(50)  # the port would report this without pause
        elif state & select.POLLIN:
            try:  # noqa: SIM105
                self.received += os.read(self.port, 65536)
            except BlockingIOError:
                pass
        while len(self.received) >= HEADER.size:
            ident, kind, size = HEADER.unpack_from(self.received)
            if len(self.received) < HEADER.size + size:
                break
            payload = self.received[HEADER.size : HEADER.size + size]
            self.received = self.received[HEADER.size + size :]
            self.frame(ident, kind, payload)
        if events.pop(self.wake, 0):
            os.read(self.wake, 4096)
        self.reap()
        for fd in events:
            if fd in self.pipes:
                self.pump(fd)
            elif fd in self.feeds:
                self.feed(fd)
        while self.waiting and not state & select.POLLHUP:
            try:
                del self.waiting[: os.write(self.port, self.waiting[:32768])]
            except OSError as error:
                if error.errno not in (errno.EAGAIN, errno.EPIPE, errno.ENODEV):
                    raise
                break


if __name__ == "__main__":
    agent = Agent(sys.argv[1])
    while True:
        agent.step()
