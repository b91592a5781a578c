"""The proof on both sides that the peer holds the run's token. Runs in: the driver and the task.

The token itself is not sent (challenge and response with HMAC-SHA256, RFC 2104)::

    server ── greeting: magic, server nonce ─────────────────▶ client
    server ◀─ answer: client nonce, HMAC("client", nonces) ─── client
    server ── proof: HMAC("server", nonces) ─────────────────▶ client
"""

from __future__ import annotations

import hashlib
import hmac
import os

__all__ = [
    "ANSWER_BYTES",
    "MAGIC_BYTES",
    "NONCE_BYTES",
    "PROOF_BYTES",
    "AuthenticationError",
    "answer_nonce",
    "check_answer",
    "check_magic",
    "check_proof",
    "greeting",
]

_MAGIC = b"HVDRUN2\n"
PROOF_BYTES = 32
MAGIC_BYTES = len(_MAGIC)
NONCE_BYTES = 32
ANSWER_BYTES = NONCE_BYTES + PROOF_BYTES


class AuthenticationError(ConnectionError):
    """The peer does not speak our protocol or does not hold the run's token."""


def greeting() -> bytes:
    """Return what a server sends first, new for every connection."""
    return _MAGIC + os.urandom(NONCE_BYTES)


def check_magic(magic: bytes) -> None:
    """Raise AuthenticationError, as soon as it is known, unless a greeting begins like ours."""
    if magic != _MAGIC:
        raise AuthenticationError("what listens there is not a HorovodRunner channel")


def answer_nonce(token: bytes, server_nonce: bytes) -> tuple[bytes, bytes]:
    """Return what the client sends, and the proof that the server then has to send."""
    nonce = os.urandom(NONCE_BYTES)
    nonces = server_nonce + nonce
    return nonce + _proof(token, b"client", nonces), _proof(token, b"server", nonces)


def check_answer(token: bytes, greeting: bytes, answer: bytes) -> bytes:
    """Return the server's proof, for a client that has proved that it holds the token."""
    nonces = greeting[len(_MAGIC) :] + answer[:NONCE_BYTES]
    check_proof(_proof(token, b"client", nonces), answer[NONCE_BYTES:])
    return _proof(token, b"server", nonces)


def check_proof(expected: bytes, received: bytes) -> None:
    """Raise AuthenticationError unless the peer has sent the right proof."""
    if not hmac.compare_digest(expected, received):
        raise AuthenticationError("the peer does not hold this run's token")


def _proof(token: bytes, side: bytes, nonces: bytes) -> bytes:
    return hmac.new(token, side + b"\0" + nonces, hashlib.sha256).digest()
