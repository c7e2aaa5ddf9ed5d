"""The web application: its routers, its error format, and the middleware around every request.

Nothing happens at import. Settings are read when the application is made. The first connection to the database
is opened when a request needs it.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI
from fastapi.routing import APIRoute

from api import errors
from api.core import logs, traces
from api.core.settings import get_settings
from api.http.announcer import JobAnnouncer
from api.http.download_memory import DownloadMemory
from api.http.exposition import Requests, make_registry
from api.http.streams import Streams
from api.middleware import RequestMiddleware
from api.planned_routes import RouteTable
from api.routes import experiments, files, health, jobs, keys, models, prometheus

# Routers are tried in this order, so the one with the most requests comes first.
ROUTERS = (jobs.router, experiments.router, files.router, models.router, keys.router, health.router, prometheus.router)


@asynccontextmanager
async def _lifespan(_: FastAPI) -> AsyncIterator[None]:
    logs.get_logger(__name__).info("started", version=version("lorainit"))
    yield
    logs.get_logger(__name__).info("stopped")


def create_app() -> FastAPI:
    """The application, from the settings in effect."""
    provider = traces.get_provider()
    app = FastAPI(
        title="Lorainit",
        version=version("lorainit"),
        description="LoRA fine-tuning as a service; the OpenAI fine-tuning API with the initialization as a choice.",
        lifespan=_lifespan,
        redirect_slashes=False,
        docs_url=None,
        redoc_url=None,
        # FastAPI makes the spans of requests and sends them where ours go. Its metrics and logs are off, because
        # we have our own.
        telemetry={
            "tracing": provider is not None,
            "tracer_provider": provider,
            "auto_configure": False,
            "metrics": False,
            "logs": False,
        },
    )
    for router in ROUTERS:
        # Not `include_router`, which makes every route once more, in the first request: a tenth of a second.
        app.router.routes.extend(router.routes)
    app.state.table = RouteTable(route for router in ROUTERS for route in router.routes if isinstance(route, APIRoute))
    app.state.streams = Streams()
    app.state.announcer = JobAnnouncer()
    app.state.download_memory = DownloadMemory(get_settings().download_bytes)
    registry = app.state.registry = make_registry({"storage": health.storage_works, "broker": health.broker_works})
    app.add_middleware(RequestMiddleware, settings=get_settings(), requests=Requests(registry))
    errors.install(app)
    _document(app)
    return app


def _document(app: FastAPI) -> None:
    """Correct the OpenAPI document: FastAPI adds 422 to all routes, which this API never answers, and omits the key.

    FastAPI omits it because our keys are read by a function of ours and not by one of its security classes.
    """
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        document = generate()
        for path in document["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        for unused in ("HTTPValidationError", "ValidationError"):
            document["components"]["schemas"].pop(unused, None)
        bearer = {"type": "http", "scheme": "bearer"}
        document["components"]["securitySchemes"] = {"key": bearer}
        document["security"] = [{"key": []}]
        return document

    app.openapi = openapi  # type: ignore[method-assign]
