"""Users who order jobs, cancel some, and do not give up: every order has a key and is repeated until it is answered.

What they were promised is written down here, for the judge.
"""

import random
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import httpx2

FINAL = ("succeeded", "failed", "cancelled")
OUTSTANDING = 2
# Answers that mean "not now": the order is repeated with its key.
LATER = (409, 429, 503, 507)
ROW = b'{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}\n'


@dataclass
class Order:
    """One job as its user sees it. Times are CLOCK_MONOTONIC."""

    key: str
    body: dict[str, Any]
    job_id: str | None = None
    cancelled_at: float | None = None
    status: str | None = None


@dataclass
class Book:
    """All that users were told."""

    orders: list[Order] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    retried: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


class User(threading.Thread):
    """Keeps a few jobs going until told to order no more; then only watches."""

    def __init__(self, url: str, secret: str, book: Book, *, name: str, seed: int, steps: tuple[int, int]) -> None:
        super().__init__(name=name, daemon=True)
        self.closed, self.gone = threading.Event(), threading.Event()
        self._book, self._steps, self._random = book, steps, random.Random(seed)
        headers = {"authorization": f"Bearer {secret}"}
        self._client = httpx2.Client(base_url=f"{url}/v1", headers=headers, timeout=20)
        self._mine: list[Order] = []
        self._doomed: dict[str, float] = {}
        self._count = 0
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
        if not self.closed.is_set() and sum(order.status not in FINAL for order in self._mine) < OUTSTANDING:
            self._mine.append(self._new())
            self._attend(self._mine[-1])

    def _new(self) -> Order:
        self._count += 1
        chance = self._random
        steps, interval = chance.randint(*self._steps), chance.choice((10, 20, 40))
        numbers = {"n_epochs": 1, "batch_size": 1, "max_steps": steps, "checkpoint_interval": interval}
        body = {
            "model": "stub",
            "training_file": self._upload(),
            "seed": chance.randrange(2**31),
            "method": {"type": "supervised", "supervised": {"hyperparameters": numbers}},
            "lora": {"init": "kaiming", "r": 4},
        }
        order = Order(key=f"{self.name}-{self._count}", body=body)
        if chance.random() < 0.15:
            self._doomed[order.key] = time.monotonic() + chance.uniform(0, 12)
        with self._book.lock:
            self._book.orders.append(order)
        return order

    def _upload(self) -> str:
        if self._file is None or self._random.random() < 0.2:
            files = {"file": ("train.jsonl", ROW * 20)}
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
        path = f"/fine_tuning/jobs/{order.job_id}"
        if time.monotonic() > self._doomed.get(order.key, float("inf")) and order.cancelled_at is None:
            answer = self._ask("POST", f"{path}/cancel", allowed=(400, 409))
            order.cancelled_at = None if answer is None or answer.get("status") != "cancelled" else time.monotonic()
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
