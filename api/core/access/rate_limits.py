"""Rate limits: a bucket of requests per API key, kept in the broker's server.

A script counts inside the server, so that several web processes share one bucket. If the server does not answer,
nothing is limited, because it is better to lose the limit than the API.
"""

import time
from dataclasses import dataclass

from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from api.core.logs import get_logger
from api.core.settings import get_settings
from api.core.singleton import singleton

MINUTE = 60.0
ANSWER_SECONDS = 0.5  # short, because every request waits for the answer
PAUSE_SECONDS = 5.0  # for which a server that did not answer is not asked, so that only a few requests wait in vain

# The bucket holds a minute's requests and is refilled evenly. Only the time when it will be full
# again is stored, in milliseconds of the server's clock. A request moves that time by one interval.
_TAKE = """
local clock = redis.call('TIME')
local now = clock[1] * 1000 + clock[2] / 1000
local interval, capacity = 60000 / ARGV[1], 60000
local full = math.max(now, tonumber(redis.call('GET', KEYS[1]) or now))
local wait = full + interval - capacity - now
if wait <= 0 then
  full = full + interval
  redis.call('SET', KEYS[1], string.format('%.3f', full), 'PX', math.ceil(full - now))
end
local left = math.max(0, math.floor((capacity - (full - now)) / interval + 0.001))
return {left, math.ceil(full - now), math.max(0, math.ceil(wait))}
"""


@dataclass(frozen=True)
class Allowance:
    """What a key has left; times are seconds. `wait` is 0 for a request that may go on."""

    limit: int
    remaining: int
    reset: float
    wait: float


class RateLimiter:
    """Buckets of `limit` requests per minute."""

    def __init__(self, url: str, *, limit: int) -> None:
        # One more try without a pause, because a restart of the server may have closed the pooled connection.
        retry = Retry(NoBackoff(), 1)
        self._server = Redis.from_url(
            url, socket_timeout=ANSWER_SECONDS, socket_connect_timeout=ANSWER_SECONDS, retry=retry
        )
        self._take = self._server.register_script(_TAKE)
        self._limit = limit
        self._asleep_until = 0.0

    def take(self, key_id: str) -> Allowance | None:
        """Count one request of a key; None if the server does not answer, or did not a few seconds ago."""
        if time.monotonic() < self._asleep_until:
            return None
        try:
            left, reset, wait = self._take(keys=[f"lora:rate:{key_id}"], args=[self._limit])
        except RedisError as error:
            self._asleep_until = time.monotonic() + PAUSE_SECONDS
            get_logger(__name__).warning("rate_limit_suspended", error=type(error).__name__, seconds=PAUSE_SECONDS)
            return None
        return Allowance(self._limit, int(left), reset / 1000, wait / 1000)


@singleton
def get_rate_limiter() -> RateLimiter | None:
    """This process's limiter; None when there is no limit, or no server to count in."""
    settings = get_settings()
    if not settings.requests_per_minute:
        return None
    if settings.broker_url is None:
        get_logger(__name__).warning("rate_limit_off", reason="LORAINIT_BROKER_URL is not set")
        return None
    return RateLimiter(settings.broker_url, limit=settings.requests_per_minute)
