"""Rate limits per key: OpenAI's headers, one bucket for all processes, and nothing lost with the broker."""

import contextlib
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import redis

from api.core.access import rate_limits
from api.middleware import _duration
from tests import servers
from tests.api.conftest import JOBS, Lab, refused


@pytest.fixture
def limit(environment: pytest.MonkeyPatch, valkey_url: str) -> Iterator[int]:
    """Five requests per minute and key, counted in an empty Valkey."""
    environment.setenv("LORAINIT_BROKER_URL", valkey_url)
    environment.setenv("LORAINIT_REQUESTS_PER_MINUTE", "5")
    with redis.Redis.from_url(valkey_url) as server:
        server.flushdb()
    rate_limits.get_rate_limiter.cache_clear()
    yield 5
    rate_limits.get_rate_limiter.cache_clear()


def headers_of(lab: Lab, path: str = "/v1/files") -> dict[str, str]:
    reply = lab.client.get(path)
    return {name: value for name, value in reply.headers.items() if name.startswith("x-ratelimit")}


def test_every_answer_says_what_is_left(limit: int, lab: Lab) -> None:
    begun = time.monotonic()
    first, second = headers_of(lab), headers_of(lab, f"{JOBS}/ftjob-nope")
    passed = time.monotonic() - begun + 0.01  # hundredths are shown
    assert first["x-ratelimit-limit-requests"] == second["x-ratelimit-limit-requests"] == "5"
    assert (first["x-ratelimit-remaining-requests"], second["x-ratelimit-remaining-requests"]) == ("4", "3")
    resets = [float(one["x-ratelimit-reset-requests"].removesuffix("s")) for one in (first, second)]
    assert 12 - passed < resets[0] <= 12, "a fifth of a minute"
    assert 24 - passed < resets[1] <= 24


def test_a_request_over_the_limit_is_refused_in_openais_words(limit: int, lab: Lab) -> None:
    for _ in range(limit):
        assert lab.client.get("/v1/files").status_code == 200
    reply = lab.client.get("/v1/files")
    error = refused(reply, 429, "rate_limit_exceeded")
    assert error["type"] == "requests" and "5 requests per minute" in error["message"]
    assert 1 <= int(reply.headers["retry-after"]) <= 12
    assert 0 < int(reply.headers["retry-after-ms"]) <= 12_000
    assert "x-should-retry" not in reply.headers  # a retry is right
    assert reply.headers["x-ratelimit-remaining-requests"] == "0"


def test_a_refused_request_costs_nothing(limit: int, lab: Lab) -> None:
    waits = [int(lab.client.get("/v1/files").headers.get("retry-after-ms", 0)) for _ in range(limit + 3)]
    assert waits[:limit] == [0] * limit
    assert waits[limit] >= waits[-1] > 0  # asking again does not put the end of the wait off


def test_one_key_cannot_use_up_anothers_requests(limit: int, lab: Lab, stranger: Lab) -> None:
    for _ in range(limit + 1):
        lab.client.get("/v1/files")
    assert headers_of(stranger)["x-ratelimit-remaining-requests"] == "4"


def test_a_wrong_key_and_a_public_route_are_not_counted(limit: int, lab: Lab) -> None:
    for path in ("/healthz", "/readyz"):
        assert headers_of(lab, path) == {}
    wrong = lab.client.get("/v1/files", headers={"authorization": f"Bearer {lab.secret[:-1]}?"})
    assert "x-ratelimit-limit-requests" not in wrong.headers
    assert headers_of(lab)["x-ratelimit-remaining-requests"] == "4"


def test_a_request_over_the_limit_does_nothing(limit: int, lab: Lab) -> None:
    job = lab.order()["id"]
    for _ in range(limit):
        lab.client.get("/v1/files")
    refused(lab.client.post(f"{JOBS}/{job}/cancel"), 429, "rate_limit_exceeded")
    rate_limits.get_rate_limiter.cache_clear()
    with redis.Redis.from_url(rate_limits.get_settings().broker_url or "") as server:
        server.flushdb()
    assert lab.client.get(f"{JOBS}/{job}").json()["status"] != "cancelled"


def test_several_processes_share_one_bucket(valkey_url: str) -> None:
    limiters = [rate_limits.RateLimiter(valkey_url, limit=40) for _ in range(4)]
    key, began = f"key_{time.monotonic_ns()}", time.monotonic()
    with ThreadPoolExecutor(8) as pool:
        taken = list(pool.map(lambda number: limiters[number % 4].take(key), range(120)))
    allowed = [one for one in taken if one is not None and not one.wait]
    refilled = (time.monotonic() - began) / 1.5  # one more each 1.5 s, and a slow machine needs several
    assert 40 <= len(allowed) <= 41 + refilled
    assert len({one.remaining for one in allowed}) >= 40


def test_a_bucket_is_refilled_evenly(valkey_url: str) -> None:
    limiter, key, began = rate_limits.RateLimiter(valkey_url, limit=600), f"key_{time.monotonic_ns()}", time.monotonic()
    last = [limiter.take(key) for _ in range(600)][-1]
    assert last is not None and last.remaining <= 1 + 10 * (time.monotonic() - began)
    while (taken := limiter.take(key)) is not None and not taken.wait:
        pass
    assert taken is not None and taken.wait <= 0.1
    time.sleep(taken.wait + 0.01)
    again = limiter.take(key)
    assert again is not None and not again.wait


def test_a_bucket_that_is_full_again_leaves_nothing_behind(valkey_url: str) -> None:
    limiter, key = rate_limits.RateLimiter(valkey_url, limit=6000), f"key_{time.monotonic_ns()}"
    limiter.take(key)
    time.sleep(0.05)
    with redis.Redis.from_url(valkey_url) as server:
        assert not server.exists(f"lora:rate:{key}")


def test_without_its_broker_the_service_answers_without_a_limit(
    environment: pytest.MonkeyPatch, lab: Lab, capsys: pytest.CaptureFixture[str]
) -> None:
    environment.setenv("LORAINIT_BROKER_URL", f"redis://127.0.0.1:{servers.free_port()}/0")
    environment.setenv("LORAINIT_REQUESTS_PER_MINUTE", "1")
    rate_limits.get_settings.cache_clear()
    rate_limits.get_rate_limiter.cache_clear()
    environment.setattr(rate_limits, "PAUSE_SECONDS", 3600.0)
    assert [lab.client.get("/v1/files").status_code for _ in range(20)] == [200] * 20
    assert headers_of(lab) == {}
    # Asked once, then not for a while.
    assert capsys.readouterr().out.count("rate_limit_suspended") == 1
    rate_limits.get_rate_limiter.cache_clear()


def test_a_frozen_broker_costs_one_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rate_limits, "ANSWER_SECONDS", 0.1)
    monkeypatch.setattr(rate_limits, "PAUSE_SECONDS", 3600.0)
    with servers.socket.create_server(("127.0.0.1", 0)) as silent:  # accepts and never answers
        limiter = rate_limits.RateLimiter(f"redis://127.0.0.1:{silent.getsockname()[1]}/0", limit=1)
        assert limiter.take("key_x") is None
        silent.setblocking(False)
        assert _accept_all(silent) > 0
        assert [limiter.take("key_x") for _ in range(50)] == [None] * 50
        assert _accept_all(silent) == 0  # nobody has connected again


def _accept_all(server: servers.socket.socket) -> int:
    """How many connections wait at this server; they are closed."""
    count = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            server.accept()[0].close()
            count += 1
    return count


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.12, "120ms"), (0, "0ms"), (1.0, "1s"), (8.64, "8.64s"), (60, "1m0s"), (361, "6m1s")]
)
def test_a_duration_is_written_as_openai_writes_it(seconds: float, text: str) -> None:
    assert _duration(seconds) == text


def test_no_limit_is_no_header(lab: Lab) -> None:
    assert headers_of(lab) == {}
