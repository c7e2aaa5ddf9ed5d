"""How many requests a process answers at once: in all, for one client address, and with one key.

A client above its limit gets an error that says so, and others are still answered. Health checks are never refused,
because an orchestrator decides by them whether to restart the process.
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
WAIT_SECONDS = 1.0  # after which a refused client may try again


class Concurrency:
    """The requests under way in this process."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._lock = threading.Lock()  # because keys are counted in threads, and requests in the event loop
        self._count = 0
        self._addresses = Counter[str]()
        self._keys = Counter[str]()

    def acquire(self, scope: Scope) -> "Permit | Refusal":
        """A permit for a request, to be released when it is answered; or why there is none."""
        if scope["path"] in HEALTH:  # never refused, so that an overloaded process is not taken for a dead one
            return Permit(self, address=None)
        address, limit = find_network(scope.get("client")), self._settings.address_at_once
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
        """Count one more request with this key.

        Raises:
            TooManyRequests: it has as many as it may.
        """
        limit = self._settings.key_at_once
        with self._lock:
            if self._keys[key_id] >= limit:
                raise too_many(f"{limit} requests with this API key")
            self._keys[key_id] += 1

    def release(self, address: str | None, key_id: str | None) -> None:
        """Count one request less."""
        with self._lock:
            if address is not None:
                self._count -= 1
                _less(self._addresses, address)
            if key_id is not None:
                _less(self._keys, key_id)


@dataclass
class Permit:
    """The permission to answer one request, until it is released."""

    concurrency: Concurrency
    address: str | None  # None: it is not counted
    key_id: str | None = None

    def count_key(self, key_id: str) -> None:
        """Count the request for its key, too.

        Raises:
            TooManyRequests: the key has as many requests under way as it may.
        """
        self.concurrency.count_key(key_id)
        self.key_id = key_id

    def release(self) -> None:
        """Call it when the request is answered, or its client has disconnected."""
        self.concurrency.release(self.address, self.key_id)


def too_many(what: str) -> TooManyRequests:
    """The error for one request more than this."""
    message = f"{what} are being answered, and more are not taken at once. Please try again when one has ended."
    return TooManyRequests(message, code="rate_limit_exceeded", wait=WAIT_SECONDS)


def find_network(client: tuple[str, int] | None) -> str:
    """The network for which an address is counted: for IPv6 the /64, because a host can choose any address in it."""
    if client is None:
        return ""
    try:
        address = ip_address(client[0])
    except ValueError:  # not an address, but a name that a trusted proxy sent
        return client[0]
    if isinstance(address, IPv6Address):
        return str(address.ipv4_mapped or IPv6Address(int(address) >> 64 << 64))
    return client[0]


def _less(counts: Counter[str], name: str) -> None:
    counts[name] -= 1
    if not counts[name]:  # removed, because the table would otherwise grow with every address that ever came
        del counts[name]
