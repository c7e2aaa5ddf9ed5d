"""Users who order jobs, cancel some, and do not give up: every order has a key and is repeated until it is answered.

What they were promised is written down here, for the judge.
"""

import random
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx2

FINAL = ("succeeded", "failed", "cancelled")
# Answers that mean "not now": the order is repeated with its key.
LATER = (409, 429, 503, 507)
ROW = '{"messages": [{"role": "user", "content": "What is %d?"}, {"role": "assistant", "content": "It is %d"}]}\n'
ROWS = "".join(ROW % (n, n) for n in range(20)).encode()


@dataclass
class Order:
    """One job as its user sees it. Times are CLOCK_MONOTONIC."""

    key: str
    body: dict[str, Any]
    job_id: str | None = None
    cancelled_at: float | None = None
    resume_at: float | None = None  # it was paused, and is to go on then
    status: str | None = None


@dataclass
class Book:
    """All that users were told."""

    orders: list[Order] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    retried: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


def stub_orders(*, seed: int, steps: tuple[int, int], group: float = 0.0) -> Iterator[dict[str, Any]]:
    """Orders without end for the trainer of the chaos run, each with a seed of its own; `group`: share of them that
    may be trained together.
    """
    chance = random.Random(seed)
    while True:
        length, interval = chance.randint(*steps), chance.choice((10, 20, 40))
        numbers = {"n_epochs": 1, "batch_size": 1, "max_steps": length, "checkpoint_interval": interval}
        yield {
            "model": "stub",
            "seed": chance.randrange(2**31),
            "method": {"type": "supervised", "supervised": {"hyperparameters": numbers}},
            "lora": {"init": "kaiming", "r": 4},
            "resources": {"group": chance.random() < group},
        }


class User(threading.Thread):
    """Keeps a few jobs going until it has ordered all it wants or is told to order no more; then only watches.

    `at_once`: how many jobs it waits for; `fickle`: the share of its jobs that it cancels; `moody`: the share that it
    pauses, and resumes a little later.
    """

    def __init__(
        self,
        url: str,
        secret: str,
        book: Book,
        *,
        name: str,
        wants: Iterator[dict[str, Any]],
        at_once: int = 3,
        fickle: float = 0.0,
        moody: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__(name=name, daemon=True)
        self.closed, self.gone = threading.Event(), threading.Event()
        self._book, self._wants, self._random = book, wants, random.Random(seed)
        self._fickle, self._moody = fickle, moody
        headers = {"authorization": f"Bearer {secret}"}
        self._client = httpx2.Client(base_url=f"{url}/v1", headers=headers, timeout=20)
        self._mine: list[Order] = []
        self._at_once = at_once
        self._doomed: dict[str, float] = {}
        self._halted: dict[str, float] = {}
        self._file: str | None = None

    def run(self) -> None:
        while not self.gone.is_set():
            try:
                self._turn()
            except httpx2.HTTPError:
                self._book.retried += 1
            self.gone.wait(0.3)

    def _turn(self) -> None:
        for order in [order for order in self._mine if order.status not in FINAL]:
            self._attend(order)
        waiting = sum(order.status not in FINAL for order in self._mine)
        if not self.closed.is_set() and waiting < self._at_once:
            file = self._upload()
            if (body := next(self._wants, None)) is not None:
                self._mine.append(self._noted({**body, "training_file": file}))

    def _noted(self, body: dict[str, Any]) -> Order:
        order = Order(key=f"{self.name}-{len(self._mine)}", body=body)
        if self._random.random() < self._fickle:
            self._doomed[order.key] = time.monotonic() + self._random.uniform(0, 12)
        elif self._random.random() < self._moody:
            self._halted[order.key] = time.monotonic() + self._random.uniform(0, 12)
        with self._book.lock:
            self._book.orders.append(order)
        return order

    def _upload(self) -> str:
        if self._file is None or self._random.random() < 0.2:
            files = {"file": ("train.jsonl", ROWS)}
            answer = self._ask("POST", "/files", files=files, data={"purpose": "fine-tune"})
            if answer is None:
                raise httpx2.TransportError("the upload is to be tried again")
            self._file = answer["id"]
        return self._file

    def _attend(self, order: Order) -> None:
        if order.job_id is None:
            headers = {"idempotency-key": order.key}
            answer = self._ask("POST", "/fine_tuning/jobs", json=order.body, headers=headers)
            order.job_id = None if answer is None else answer["id"]
            return
        path, now = f"/fine_tuning/jobs/{order.job_id}", time.monotonic()
        if now > self._doomed.get(order.key, float("inf")) and order.cancelled_at is None:
            answer = self._ask("POST", f"{path}/cancel", allowed=(400, 409))
            order.cancelled_at = None if answer is None or answer.get("status") != "cancelled" else time.monotonic()
        elif now > self._halted.get(order.key, float("inf")) and order.resume_at is None:
            answer = self._ask("POST", f"{path}/pause", allowed=(400,))
            order.resume_at = None if answer is None else now + self._random.uniform(1, 6)
        elif order.status == "paused" and now > (order.resume_at or 0):
            answer = self._ask("POST", f"{path}/resume", allowed=(400,))
        else:
            answer = self._ask("GET", path)
        order.status = (answer or {}).get("status", order.status)

    def _ask(self, method: str, path: str, *, allowed: tuple[int, ...] = (), **content: Any) -> dict[str, Any] | None:
        """The answer's body, or None when it is to be tried again."""
        reply = self._client.request(method, path, **content)
        if reply.status_code in allowed:
            return {}
        if reply.is_success:
            return dict(reply.json())
        if reply.status_code not in LATER:
            self._book.wrong.append(f"{method} {path}: {reply.status_code} {reply.text[:300]}")
        self._book.retried += 1
        return None
