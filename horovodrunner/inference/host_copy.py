"""One copy of a model's weights on each host. Runs in: Spark's Python workers.

The first Python worker that needs the weights binds an abstract socket, which one process of the
host can do, writes them to a file without a name, and from then on hands its descriptor to whoever
connects. The others keep their connections: when the process ends, however it does, they see it and
one of them takes its place with the same file. Neither the socket nor the file outlives the
last of them.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import platform
import selectors
import socket
import tempfile
import threading
import time
import weakref
from collections.abc import Callable
from typing import BinaryIO

from horovodrunner.wire.peers import is_our_own

__all__ = ["HostCopy", "local_directory"]

_HAS_ABSTRACT_SOCKETS = platform.system() == "Linux"

_copies: weakref.WeakSet[HostCopy] = weakref.WeakSet()


class HostCopy:
    """A file that all Python workers of the host share.

    `identity` names the content. `obtain` opens the complete file; it is called if no other process
    of the host has it.
    """

    _socket: socket.socket | None = None
    """Listens in the process that serves the file, and is connected to it in the others."""

    def __init__(self, identity: str, size: int, obtain: Callable[[], BinaryIO]) -> None:
        self._name = f"\0horovodrunner-weights-{os.getuid()}-{identity}"
        self._size = size
        self._served: set[socket.socket] = set()
        self._closing = False
        file = self._join() if _HAS_ABSTRACT_SOCKETS else None
        try:
            self._file = file or obtain()
        except BaseException:
            self._leave()
            raise
        self._thread = threading.Thread(
            target=self._keep, name="horovodrunner-weights", daemon=True
        )
        if self._socket is not None:
            _copies.add(self)
            self._thread.start()

    def map(self) -> mmap.mmap:
        """Map the file: pages are shared with other processes until they are written to.

        The mapping stays valid after :meth:`close`.
        """
        protection = mmap.PROT_READ | mmap.PROT_WRITE
        return mmap.mmap(self._file.fileno(), self._size, mmap.MAP_PRIVATE, protection)

    def close(self) -> None:
        """Leave the file to the other processes."""
        self._closing = True
        if self._thread.is_alive():
            if self._socket is not None:
                with contextlib.suppress(OSError):  # the thread may be between two sockets
                    self._socket.shutdown(socket.SHUT_RDWR)
            self._thread.join(timeout=10)
        self._file.close()

    def forget(self) -> None:
        """Drop what a fork copied: a child that held the socket would seem to serve it."""
        for each in (self._socket, *self._served):
            if each is not None:
                each.close()

    def _join(self) -> BinaryIO | None:
        """Bind the socket, or connect to who has, which sends the file.

        Without a socket afterwards, nothing is shared: the system, or another user, is in the way.
        """
        while not self._closing:
            self._socket = socket.socket(socket.AF_UNIX)
            try:
                self._socket.bind(self._name)
                self._socket.listen(1024)
            except OSError as error:
                self._leave()
                if error.errno != errno.EADDRINUSE:
                    return None
            else:
                return None
            self._socket = socket.socket(socket.AF_UNIX)
            try:
                self._socket.connect(self._name)
                if not is_our_own(self._socket):
                    self._leave()
                    return None
                _, descriptors, _, _ = socket.recv_fds(self._socket, 1, 1)
                if descriptors:
                    return os.fdopen(descriptors[0], "rb")
            except OSError:  # it has just ended, or does not listen yet
                time.sleep(0.01)
            self._leave()
        return None

    def _leave(self) -> None:
        if self._socket is not None:
            self._socket.close()
        self._socket = None

    def _keep(self) -> None:
        """Serve the file, or wait until the process that does so ends and try to follow it."""
        with contextlib.suppress(OSError):
            while self._socket is not None and not self._closing:
                if self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                    self._serve(self._socket)
                else:
                    with contextlib.suppress(ConnectionError):
                        self._socket.recv(1)
                self._leave()
                if file := self._join():
                    file.close()  # it is the same
        self._leave()

    def _serve(self, listener: socket.socket) -> None:
        """Hand out the file until the listener is shut down."""
        with selectors.DefaultSelector() as selector:
            selector.register(listener, selectors.EVENT_READ)
            while True:
                for key, _ in selector.select():
                    if key.fileobj is not listener:  # the other one ended
                        selector.unregister(key.fileobj)
                        self._served.remove(key.data)
                        key.data.close()
                        continue
                    try:
                        connection, _ = listener.accept()
                    except OSError:
                        while self._served:
                            self._served.pop().close()
                        return
                    if not is_our_own(connection):
                        connection.close()
                        continue
                    with contextlib.suppress(OSError):  # it ended already: it is readable, too
                        socket.send_fds(connection, [b"x"], [self._file.fileno()])
                    self._served.add(connection)
                    selector.register(connection, selectors.EVENT_READ, connection)


def local_directory() -> str:
    """Return a directory of Spark's on a local disk, or the system's for temporary files."""
    for directory in os.environ.get("SPARK_LOCAL_DIRS", "").split(","):
        if directory and os.access(directory, os.W_OK | os.X_OK):
            return directory
    return tempfile.gettempdir()


def _after_fork() -> None:
    for copy in list(_copies):
        copy.forget()


os.register_at_fork(after_in_child=_after_fork)
