"""How many requests a process answers at once: in all, for one client address, and with one key.

Who takes part of what others need is told so in words, and others go on. Health is asked by whoever decides about the
process, and is never refused.
"""

import threading
from collections import Counter
from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address

from starlette.types import Scope

from api.core.errors import Refusal
from api.core.settings import Settings
from api.errors import Overloaded, TooManyRequests

HEALTH = frozenset({"/healthz", "/readyz"})
WAIT_SECONDS = 1.0  # after which one who was refused may ask again


class Concurrency:
    """What is under way in this process."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._lock = threading.Lock()  # keys are known in threads
        self._count = 0
        self._addresses = Counter[str]()
        self._keys = Counter[str]()

    def acquire(self, scope: Scope) -> "Permit | Refusal":
        """A permit for a request, to be released when it is answered; or why there is none."""
        if scope["path"] in HEALTH:
            return Permit(self, address=None)
        address, limit = network(scope.get("client")), self._settings.address_at_once
        with self._lock:
            if self._addresses[address] >= limit:
                return too_many(f"{limit} requests of this address")
            if self._count >= self._settings.requests_at_once:
                return Overloaded("The server has all the requests it can answer at once; try again shortly.",
                                  code="overloaded")  # fmt: skip
            self._count += 1
            self._addresses[address] += 1
        return Permit(self, address=address)

    def count_key(self, key_id: str) -> None:
        """One request more with this key.

        Raises:
            TooManyRequests: it has as many as it may.
        """
        limit = self._settings.key_at_once
        with self._lock:
            if self._keys[key_id] >= limit:
                raise too_many(f"{limit} requests with this API key")
            self._keys[key_id] += 1

    def release(self, address: str | None, key_id: str | None) -> None:
        """One request less."""
        with self._lock:
            if address is not None:
                self._count -= 1
                _less(self._addresses, address)
            if key_id is not None:
                _less(self._keys, key_id)


@dataclass
class Permit:
    """That one request is being answered."""

    concurrency: Concurrency
    address: str | None  # None: it is not counted
    key_id: str | None = None

    def know(self, key_id: str) -> None:
        """It comes with this key.

        Raises:
            TooManyRequests: the key has as many requests under way as it may.
        """
        self.concurrency.count_key(key_id)
        self.key_id = key_id

    def release(self) -> None:
        """It is answered, or its client has gone."""
        self.concurrency.release(self.address, self.key_id)


def too_many(what: str) -> TooManyRequests:
    """The refusal of one request more than this."""
    message = f"{what} are being answered, and more are not taken at once. Please try again when one has ended."
    return TooManyRequests(message, code="rate_limit_exceeded", wait=WAIT_SECONDS)


def network(client: tuple[str, int] | None) -> str:
    """Whom an address counts for: a host has one of IPv4, and of IPv6 a network of /64 to choose from."""
    if client is None:
        return ""
    try:
        address = ip_address(client[0])
    except ValueError:  # a name that a trusted proxy gave
        return client[0]
    if isinstance(address, IPv6Address):
        return str(address.ipv4_mapped or IPv6Address(int(address) >> 64 << 64))
    return client[0]


def _less(counts: Counter[str], name: str) -> None:
    counts[name] -= 1
    if not counts[name]:
        del counts[name]
