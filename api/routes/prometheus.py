"""`GET /metrics` for Prometheus: with a token of its own, or for this host only. Outside /v1."""

import hmac
from ipaddress import ip_address
from typing import Annotated

from fastapi import APIRouter, Header, Request, Response
from prometheus_client import generate_latest

from api.core.settings import get_settings
from api.errors import Unauthenticated
from api.http.exposition import CONTENT_TYPE
from api.schemas.wire import OTHER_RESPONSES

router = APIRouter(tags=["health"], responses=OTHER_RESPONSES)
# Headers that a proxy on this host adds: with them the connection is local, but the caller is not.
FORWARDED = ("forwarded", "x-forwarded-for", "x-real-ip", "via")


@router.get("/metrics", include_in_schema=False)
def metrics(request: Request, authorization: Annotated[str, Header()] = "") -> Response:
    """Everything in Prometheus' text format."""
    _require_access(request, authorization)
    return Response(generate_latest(request.app.state.registry), media_type=CONTENT_TYPE)


def _require_access(request: Request, authorization: str) -> None:
    token = get_settings().metrics_token
    if token is None:
        if not _is_local(request):
            raise Unauthenticated(
                "/metrics answers only the server's own host; its operator can set LORAINIT_METRICS_TOKEN.",
                code="invalid_api_key",
            )
    elif not hmac.compare_digest(authorization.encode(), f"Bearer {token.get_secret_value()}".encode()):
        raise Unauthenticated("/metrics needs LORAINIT_METRICS_TOKEN as its bearer token.", code="invalid_api_key")


def _is_local(request: Request) -> bool:
    if request.client is None or any(name in request.headers for name in FORWARDED):
        return False
    try:
        return ip_address(request.client.host).is_loopback
    except ValueError:  # not an address: a test's client, a Unix socket
        return False
