"""Identifiers as OpenAI writes them: a prefix and random alphanumerics; events sort by time."""

import secrets
import string
import time

_ALPHABET = (string.ascii_letters + string.digits).encode()
# The last eight of 256 byte values are dropped, because 256 is no multiple of 62: some letters would be more likely.
_LETTERS, _DROPPED = bytes(_ALPHABET[byte % 62] for byte in range(256)), bytes(range(248, 256))
_CROCKFORD = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"


def new_id(prefix: str, length: int = 24) -> str:
    """`prefix` followed by `length` random alphanumerics (24 give 142 bits)."""
    letters = b""
    while len(letters) < length:
        letters += secrets.token_bytes(length + 16).translate(_LETTERS, _DROPPED)
    return prefix + letters[:length].decode()


def new_event_id() -> str:
    """`ftevent-` and a ULID: 48 bits of milliseconds, 80 random bits."""
    number = (time.time_ns() // 1_000_000) << 80 | secrets.randbits(80)
    return "ftevent-" + "".join(_CROCKFORD[number >> shift & 31] for shift in range(125, -1, -5))
