"""Authorizes a request by its API key, its project and its rate limit.

It is the same for every route, so that no route can leave out one of the checks.
"""

from fastapi import Request

from api.core.access import keys, rate_limits
from api.core.access.keys import Caller, Key
from api.core.db.database import session_scope
from api.core.db.tables import Project
from api.core.errors import InvalidValue
from api.errors import TooManyRequests, Unauthenticated
from api.http.concurrency import Permit


def read_secret(request: Request) -> str:
    """The API key of a request.

    Raises:
        Unauthenticated: it has none.
    """
    scheme, _, secret = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not secret.strip():
        raise Unauthenticated(
            "You didn't provide an API key: send it as 'Authorization: Bearer sk-lorainit-...'.", code="missing_api_key"
        )
    return secret.strip()


def authorize(request: Request, key: Key | None, secret: str) -> Caller:
    """The caller, if `secret` belongs to `key`. Notes the project for the log, and the rate limit for the headers.

    Raises:
        Unauthenticated: there is no such key, it is deleted or expired, or the request names another project.
        InvalidValue: the path or the query holds a NUL character.
        TooManyRequests: it has used up its requests per minute, or has too many under way.
    """
    caller = _authenticate(request, key, secret)  # first, so that a caller without a key learns nothing else
    _refuse_nul(request)
    request.scope["state"]["project"] = caller.project_id
    permit: Permit = request.scope["state"]["permit"]
    permit.count_key(caller.key_id)
    limiter = rate_limits.get_rate_limiter()
    allowance = request.scope["state"]["allowance"] = None if limiter is None else limiter.take(caller.key_id)
    if allowance is not None and allowance.wait:
        raise TooManyRequests(
            f"Rate limit reached for this API key: {allowance.limit} requests per minute."
            f" Please try again in {allowance.wait:.2g} s.",
            code="rate_limit_exceeded",
            wait=allowance.wait,
        )
    return caller


def _refuse_nul(request: Request) -> None:
    # Refused here, because PostgreSQL fails on a NUL character and SQLite does not. HTTP allows none in headers.
    if "\x00" not in request.scope["path"] and b"%00" not in request.scope["query_string"]:
        return
    for name, value in [*request.path_params.items(), *request.query_params.multi_items()]:
        if "\x00" in name or "\x00" in value:
            shown = name.replace("\x00", "").partition("[")[0]
            raise InvalidValue(f"{shown} holds a NUL character.", code="invalid_value", param=shown)


def _authenticate(request: Request, key: Key | None, secret: str) -> Caller:
    caller = None if key is None else keys.authenticate(key, secret)
    if caller is None:
        raise Unauthenticated(
            f"Incorrect API key provided: {_hint(secret)}. It is unknown, expired or deleted.", code="invalid_api_key"
        )
    # An unknown project id is ignored, because it is probably one of OpenAI's that is left in the environment.
    meant = request.headers.get("openai-project", "")
    if meant not in ("", caller.project_id) and _is_project(meant):
        raise Unauthenticated(
            f"OpenAI-Project {meant!r} is not the project of this API key.", code="mismatched_project"
        )
    return caller


def _is_project(name: str) -> bool:
    with session_scope(read_only=True) as session:
        return "\x00" not in name and session.get(Project, name) is not None


def _hint(secret: str) -> str:
    return f"{secret[:12]}...{secret[-4:]}" if len(secret) > 24 else "too short"
