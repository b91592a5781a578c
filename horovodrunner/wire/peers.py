"""Who is at the other end of a Unix socket. Runs in: every process."""

from __future__ import annotations

import os
import socket
import struct

__all__ = ["is_our_own"]

_CREDENTIALS = struct.Struct("3i")
"""Process, user and group, as Linux gives them."""


def is_our_own(connection: socket.socket) -> bool:
    """Ask the kernel whether the peer belongs to this process's user."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return int(_CREDENTIALS.unpack(credentials)[1]) == os.getuid()
