"""Identifiers as OpenAI writes them: a prefix and random alphanumerics; events sort by time."""

import secrets
import string
import time

_ALPHABET = (string.ascii_letters + string.digits).encode()
# Of 256 bytes the last eight are passed over, so that every letter is as likely as another.
_LETTERS, _PASSED_OVER = bytes(_ALPHABET[byte % 62] for byte in range(256)), bytes(range(248, 256))
_CROCKFORD = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"


def new_id(prefix: str, length: int = 24) -> str:
    """`prefix` followed by `length` random alphanumerics (24 give 142 bits)."""
    letters = b""
    while len(letters) < length:
        letters += secrets.token_bytes(length + 16).translate(_LETTERS, _PASSED_OVER)
    return prefix + letters[:length].decode()


def new_event_id() -> str:
    """`ftevent-` and a ULID: 48 bits of milliseconds, 80 bits of chance."""
    number = (time.time_ns() // 1_000_000) << 80 | secrets.randbits(80)
    return "ftevent-" + "".join(_CROCKFORD[number >> shift & 31] for shift in range(125, -1, -5))
