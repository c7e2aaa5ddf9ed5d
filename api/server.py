"""The web process: uvicorn around `create_app`, with the limits a service needs.

`python -m api.server` listens on the configured address; `--fd N` takes a socket that is already
open, so that a restart under `lorainit serve` neither loses its port nor refuses a connection.
"""

import argparse
import socket

import uvicorn

from api.core import logs
from api.core.settings import get_settings

MAX_CONCURRENCY = 512
SHUTDOWN_SECONDS = 3


def main() -> None:
    """Serve until SIGTERM or SIGINT; open streams are cut after a few seconds."""
    parser = argparse.ArgumentParser(prog="python -m api.server", description=__doc__)
    parser.add_argument("--fd", type=int, help="file descriptor of a listening socket")
    arguments = parser.parse_args()
    settings = get_settings()
    logs.configure()
    config = uvicorn.Config(
        "api.main:create_app",
        factory=True,
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,
        server_header=False,
        limit_concurrency=MAX_CONCURRENCY,
        timeout_graceful_shutdown=SHUTDOWN_SECONDS,
    )
    sockets = None if arguments.fd is None else [socket.socket(fileno=arguments.fd)]
    uvicorn.Server(config).run(sockets=sockets)


if __name__ == "__main__":
    main()
