"""The application as it is, with streams that do not wait long, and one route that raises."""

from fastapi import FastAPI

from api import app as main
from api.core import logs
from api.http import event_poller, streams


def create_app() -> FastAPI:
    """For `uvicorn --factory`."""
    logs.configure()
    event_poller.BEAT_SECONDS, streams.HEARTBEAT_SECONDS = 0.1, 0.2
    app = main.create_app()

    def boom() -> None:
        raise RuntimeError("on purpose")

    app.add_api_route("/v1/boom", boom, methods=["GET"], include_in_schema=False)
    return app
