"""The web process: uvicorn around `create_app`, with the limits a service needs.

`python -m api.server` listens on the configured address. `--fd N` uses a socket that is already
open, so that a restart by `lorainit serve` keeps the port and refuses no connection.
"""

import argparse
import asyncio
import gc
import socket
import sys
from contextlib import suppress
from types import FrameType

import uvicorn
from fastapi import FastAPI

from api.app import create_app
from api.connections import Connection, allow_open_files
from api.core import logs
from api.core.db import database
from api.core.maintenance import startup
from api.core.settings import get_settings

SHUTDOWN_SECONDS = 3  # for open downloads; less than the 5 seconds after which `lorainit serve` would kill this process
TICK_SECONDS = 1.0  # because the `date` of answers has whole seconds


class Server(uvicorn.Server):
    """uvicorn that ends event streams when it stops, because they may last for days, and that wakes once a second."""

    def __init__(self, app: FastAPI, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._app = app
        self._leaving = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None

    async def main_loop(self) -> None:
        """Renew the `date` of answers once a second, until a signal comes."""
        self._loop = asyncio.get_running_loop()
        while not await self.on_tick(0):
            with suppress(TimeoutError):
                async with asyncio.timeout(TICK_SECONDS):
                    await self._leaving.wait()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """On SIGTERM or SIGINT, in the event loop's thread: end the streams, then as uvicorn does."""
        self._app.state.streams.close()
        super().handle_exit(sig, frame)
        if self._loop is not None:
            self._loop.call_soon_threadsafe(
                self._leaving.set
            )  # because a signal handler does not wake a loop that sleeps


def main() -> None:
    """Serve until SIGTERM or SIGINT; streams of events end at once, a download may take a few seconds more."""
    parser = argparse.ArgumentParser(prog="python -m api.server", description=__doc__)
    parser.add_argument("--fd", type=int, help="file descriptor of a listening socket")
    arguments = parser.parse_args()
    startup.check_or_exit()
    settings = get_settings()
    if arguments.fd is None:
        _require_address(settings.host)
    allow_open_files(settings)
    logs.configure()
    database.use_short_waits()
    app = create_app()
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,
        server_header=False,
        http=Connection,  # it limits connections, and the middleware limits requests
        ws="none",
        timeout_keep_alive=settings.keep_alive_seconds,
        timeout_graceful_shutdown=SHUTDOWN_SECONDS,
    )
    gc.collect()
    gc.freeze()  # objects made so far stay, so the collector need not look at them during requests
    # Collect less often, because a long answer makes thousands of objects that are all still in use.
    gc.set_threshold(10_000, 20)
    sockets = None if arguments.fd is None else [socket.socket(fileno=arguments.fd)]
    Server(app, config).run(sockets=sockets)


def _require_address(host: str) -> None:
    try:
        socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError as error:
        sys.exit(f"error: LORAINIT_HOST: {host!r} is not an address ({error.strerror}).")


if __name__ == "__main__":
    main()
