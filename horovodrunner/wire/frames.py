"""Length-limited frames and the token handshake, as bytes. Runs in: every process.

A frame is a JSON object that has a ``"kind"``, and a body of bytes. Nothing here unpickles: a
frame's body stays bytes until somebody who trusts its origin opens it.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from json import dumps, loads  # main may put others in their place in json
from typing import Any

from horovodrunner.wire.events import FrameError

__all__ = [
    "MAX_BODY_BYTES",
    "PREFIX_BYTES",
    "Frame",
    "FrameError",
    "encode_frame",
    "encode_prefix_and_header",
    "parse_header",
    "parse_prefix",
]

MAX_HEADER_BYTES = 4 * 1024 * 1024
MAX_BODY_BYTES = 64 * 1024 * 1024

_PREFIX = struct.Struct(">IQ")
PREFIX_BYTES = _PREFIX.size


@dataclass(frozen=True)
class Frame:
    """One message.

    Parameters
    ----------
    header
        A JSON object; ``header["kind"]`` says what the message is.
    body
        Bytes that belong to it.
    """

    header: dict[str, Any]
    body: bytes | bytearray | memoryview = field(default=b"", repr=False)

    @property
    def kind(self) -> str:
        """What the message is."""
        return str(self.header["kind"])


def encode_frame(kind: str, body: bytes | bytearray | memoryview = b"", **header: Any) -> bytes:
    """Turn a message into bytes, all but its body.

    Parameters
    ----------
    kind
        What the message is.
    body
        The body whose length is announced; it is to be sent right after the returned bytes, so
        that a large one need not be copied.
    **header
        More JSON-compatible fields.

    Returns
    -------
    bytes
        Prefix and header.
    """
    return encode_prefix_and_header(kind, len(body), **header)


def encode_prefix_and_header(kind: str, body_bytes: int, **header: Any) -> bytes:
    """Turn a message into bytes, all but its body, which may come in pieces.

    Parameters
    ----------
    kind
        What the message is.
    body_bytes
        Length of the body that follows.
    **header
        More JSON-compatible fields.

    Returns
    -------
    bytes
        Prefix and header.
    """
    encoded = dumps({"kind": kind, **header}).encode()
    return _PREFIX.pack(len(encoded), body_bytes) + encoded


def parse_prefix(prefix: bytes, max_body_bytes: int | None) -> tuple[int, int]:
    """Read the lengths of a frame's header and body.

    Parameters
    ----------
    prefix
        The first `PREFIX_BYTES` bytes of a frame.
    max_body_bytes
        Largest body to accept; None for no limit, which only a pipe of our own child gets.

    Returns
    -------
    tuple of int and int
        Header bytes and body bytes that follow.

    Raises
    ------
    FrameError
        If one of them is larger than allowed.
    """
    header_bytes, body_bytes = _PREFIX.unpack(prefix)
    if header_bytes > MAX_HEADER_BYTES:
        raise FrameError(f"a header of {header_bytes} bytes; at most {MAX_HEADER_BYTES} are read")
    if max_body_bytes is not None and body_bytes > max_body_bytes:
        raise FrameError(f"a body of {body_bytes} bytes; at most {max_body_bytes} are read")
    return header_bytes, body_bytes


def parse_header(encoded: bytes) -> dict[str, Any]:
    """Read a frame's header.

    Parameters
    ----------
    encoded
        The header's bytes.

    Returns
    -------
    dict
        The header.

    Raises
    ------
    FrameError
        If it is not a JSON object with a ``"kind"``.
    """
    try:
        header = loads(encoded)
    except ValueError as error:
        raise FrameError(f"a header that is not JSON: {error}") from None
    if not isinstance(header, dict) or "kind" not in header:
        raise FrameError('a header that is not a JSON object with a "kind"')
    return header
