"""Identifiers as OpenAI writes them: a prefix and random alphanumerics; events sort by time."""

import secrets
import string
import time

_ALPHABET = string.ascii_letters + string.digits
_CROCKFORD = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"


def new_id(prefix: str, length: int = 24) -> str:
    """`prefix` followed by `length` random alphanumerics (24 give 142 bits)."""
    number = secrets.randbits(6 * length + 64)  # 64 bits more than are needed make every letter as likely as another
    letters = []
    for _ in range(length):
        number, place = divmod(number, len(_ALPHABET))
        letters.append(_ALPHABET[place])
    return prefix + "".join(letters)


def new_event_id() -> str:
    """`ftevent-` and a ULID: 48 bits of milliseconds, 80 bits of chance."""
    number = (time.time_ns() // 1_000_000) << 80 | secrets.randbits(80)
    return "ftevent-" + "".join(_CROCKFORD[number >> shift & 31] for shift in range(125, -1, -5))
