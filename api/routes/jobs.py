"""Fine-tuning jobs: create, list, retrieve, cancel, pause, resume, follow, download the adapter."""

import re
from typing import Annotated, Any

from fastapi import APIRouter, BackgroundTasks, Depends, Header, Query, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import Response, StreamingResponse
from sqlalchemy import Select

from api.core.access import keys
from api.core.access.idempotency import run_idempotent
from api.core.db.database import session_scope
from api.core.db.tables import ShownRow
from api.core.errors import InvalidValue
from api.core.jobs import checkpoints, events, jobs, lookup, pauses, results
from api.core.jobs.submit import submit
from api.core.jobs.transitions import unknown_job
from api.dependencies import CallerDep, IdentityDep, Reading, StorageDep, Writing
from api.http import access
from api.http.bodies import BoundedBody
from api.http.streams import EventStream
from api.http.threads import run_in_search_thread
from api.routes.download import BYTES, download
from api.routes.query import After, Empty, Limit100, Limit1000, Text
from api.schemas.event import CheckpointObject, EventObject, make_checkpoint_object, make_event_object
from api.schemas.job import JobObject, make_job_object
from api.schemas.job_request import MAX_LABELS, JobRequest
from api.schemas.wire import IDEMPOTENT_RESPONSES, V1_RESPONSES, Page, as_json, make_page

router = APIRouter(prefix="/v1", tags=["fine-tuning jobs"], route_class=BoundedBody, responses=V1_RESPONSES)
JOBS = "/fine_tuning/jobs"
# The schema of one event, because OpenAPI 3.1 cannot describe a stream of them.
_EVENT = {
    "type": "object",
    "properties": {
        "id": {"type": "string"},
        "event": {"enum": ["message", "metrics", "done"]},
        "data": {"type": "string", "description": "An event object as JSON, or `[DONE]`."},
        "retry": {"type": "integer"},
    },
    "required": ["event", "data"],
}
EVENT_STREAM: dict[int | str, dict[str, Any]] = {
    200: {"description": "Server-sent events.", "content": {"text/event-stream": {"schema": _EVENT}}}
}
_METADATA = re.compile(r"metadata\[(.*)\]", re.DOTALL)  # DOTALL, because a key may have a line break in it


def _find(request: Request, job_id: str, what: Select[Any]) -> tuple[keys.Caller, tuple[Any, ...]]:
    """The caller, and columns of the job with this id. One statement, because clients poll these routes."""
    secret = access.read_secret(request)
    key, job = lookup.find_with_key(keys.parse_key_id(secret), job_id, what)
    caller = access.authorize(request, key, secret)
    if job is None:
        raise unknown_job(job_id)
    return caller, job


def _find_id(fine_tuning_job_id: str, request: Request) -> tuple[keys.Caller, str]:
    """The caller, and the id of a job of its project. It is checked before the query parameters, so that a caller
    without a key learns only that."""
    caller, (job_id,) = _find(request, fine_tuning_job_id, lookup.KEY_AND_JOB_ID)
    return caller, job_id


JobIdDep = Annotated[tuple[keys.Caller, str], Depends(_find_id)]


@router.post(JOBS, response_model=JobObject, responses=IDEMPOTENT_RESPONSES)
def create(
    request: Request,
    body: JobRequest,
    attempt: IdentityDep,
    session: Writing,
    background: BackgroundTasks,
    reply: Response,
) -> Any:
    """Create a job. The answer never waits for checks of files or for a worker."""
    project = attempt.caller.project_id
    if body.priority == "high":
        keys.require_admin(attempt.caller, "priority 'high'", param="priority")

    def make() -> tuple[str, dict[str, Any]]:
        job = submit(session, project, body.order())
        return job.id, _shown(session, project, job.id)

    content = body.model_dump(mode="json", exclude_unset=True)
    outcome = run_idempotent(
        session, attempt, content, make=make, again=lambda job_id: _shown(session, project, job_id)
    )
    session.commit()
    # After the answer, because the broker may be slow or away, and the job is accepted whether it is or not.
    background.add_task(request.app.state.announcer.announce, outcome.object_id)
    if outcome.replayed:
        reply.headers["idempotency-replayed"] = "true"
    return outcome.body


@router.get(JOBS, response_model=Page[JobObject])
async def list_jobs(request: Request, caller: CallerDep, after: After = None, limit: Limit100 = None) -> Response:
    """Jobs of the project, newest first; `metadata[key]=value` filters."""
    pairs, unlabelled = _filter(request)

    def find() -> Response:
        with session_scope(read_only=True) as session:
            rows, more = lookup.list_page(
                session, caller.project_id, after=after, limit=limit or 20, metadata=pairs, unlabelled=unlabelled
            )
            return as_json(
                make_page([make_job_object(view) for view in lookup.load_views(session, rows)], has_more=more)
            )

    # A search by one pair is an index lookup. One by several pairs may read many jobs, so it has threads of its own.
    return await (run_in_search_thread(find) if len(pairs) > 1 else run_in_threadpool(find))


@router.get(JOBS + "/{fine_tuning_job_id}", response_model=JobObject)
def retrieve(fine_tuning_job_id: str, request: Request) -> Response:
    """One job, from the database alone."""
    # Clients repeat this until the job has ended: one thread, and for most jobs one statement (docs/decisions/0041).
    _, job = _find(request, fine_tuning_job_id, lookup.KEY_AND_JOB)
    with session_scope(read_only=True) as session:  # opens a connection only if a statement is needed
        return as_json(make_job_object(lookup.load_view(session, ShownRow._make(job))))


@router.post(JOBS + "/{fine_tuning_job_id}/cancel")
def cancel(fine_tuning_job_id: str, caller: CallerDep, session: Writing) -> JobObject:
    """Cancel at once and for good; a cancelled job stays cancelled."""
    job = jobs.cancel(session, lookup.find(session, caller.project_id, fine_tuning_job_id))
    answer = make_job_object(lookup.load_view(session, job))
    session.commit()
    return answer


@router.post(JOBS + "/{fine_tuning_job_id}/pause")
def pause(fine_tuning_job_id: str, caller: CallerDep, session: Writing) -> JobObject:
    """Free the device: a run writes a checkpoint first and is `pausing` until then."""
    job = pauses.pause(session, lookup.find(session, caller.project_id, fine_tuning_job_id))
    answer = make_job_object(lookup.load_view(session, job))
    session.commit()
    return answer


@router.post(JOBS + "/{fine_tuning_job_id}/resume")
def resume(
    fine_tuning_job_id: str, request: Request, caller: CallerDep, session: Writing, background: BackgroundTasks
) -> JobObject:
    """Go on from the last checkpoint, or from the start if there is none."""
    job = pauses.resume(session, lookup.find(session, caller.project_id, fine_tuning_job_id))
    answer = make_job_object(lookup.load_view(session, job))
    session.commit()
    background.add_task(request.app.state.announcer.announce, job.id)
    return answer


@router.get(JOBS + "/{fine_tuning_job_id}/events", response_model=Page[EventObject])
def list_events(found: JobIdDep, after: After = None, limit: Limit1000 = None) -> Response:
    """The events of a job, newest first."""
    _, job_id = found
    with session_scope(read_only=True) as session:
        rows, more = events.list_page(session, job_id, after=after, limit=limit or 20)
    return as_json(make_page([make_event_object(row) for row in rows], has_more=more))


@router.get(JOBS + "/{fine_tuning_job_id}/events/stream", response_class=StreamingResponse, responses=EVENT_STREAM)
def stream_events(
    found: JobIdDep,
    request: Request,
    after: Annotated[Text | None, Empty, Query(description="Id of the last event seen; unknown = all events.")] = None,
    last_event_id: Annotated[
        str | None, Header(max_length=255, description="The same, sent by clients that reconnect.")
    ] = None,
) -> StreamingResponse:
    """The events of a job as they happen, oldest first, as server-sent events; ends with the job."""
    caller, job_id = found
    with session_scope(read_only=True) as session:  # opens a connection only if an event is named
        seen = events.find_sequence(session, job_id, last_event_id or after)
    return EventStream(request.app.state.streams, caller, job_id, after=seen)


@router.get(JOBS + "/{fine_tuning_job_id}/checkpoints")
def list_checkpoints(
    fine_tuning_job_id: str, caller: CallerDep, session: Reading, after: After = None, limit: Limit100 = None
) -> Page[CheckpointObject]:
    """Stored checkpoints, newest first."""
    job = lookup.find(session, caller.project_id, fine_tuning_job_id)
    rows, more = checkpoints.list_page(session, job.id, after=after, limit=limit or 10)
    stored = results.find_files_of(session, rows)
    return make_page([make_checkpoint_object(row, stored[row.file_id]) for row in rows], has_more=more)


@router.head(JOBS + "/{fine_tuning_job_id}/adapter", include_in_schema=False)
@router.get(JOBS + "/{fine_tuning_job_id}/adapter", response_class=Response, responses=BYTES)
def adapter(
    fine_tuning_job_id: str,
    request: Request,
    caller: CallerDep,
    session: Reading,
    storage: StorageDep,
    checkpoint: Annotated[Text | None, Empty, Query(description="Id or step of a checkpoint.")] = None,
) -> Response:
    """The trained adapter as one tar. Stock PEFT loads it on the unchanged base model."""
    job = lookup.find(session, caller.project_id, fine_tuning_job_id)
    file = results.find_tar(session, job, checkpoint=checkpoint)
    return download(request, storage, file, media_type="application/x-tar", name=f"{job.id}.tar", digest=True)


def _shown(session: Writing, project_id: str, job_id: str) -> dict[str, Any]:
    return make_job_object(lookup.load_view(session, lookup.find(session, project_id, job_id))).model_dump(mode="json")


def _filter(request: Request) -> tuple[dict[str, str], bool]:
    """The metadata pairs of a list, and whether jobs without metadata are wanted."""
    items = [(key, value) for key, value in request.query_params.multi_items() if key.startswith("metadata")]
    odd = [key for key, _ in items if key != "metadata" and not _METADATA.fullmatch(key)]
    if odd:
        text = f"metadata is searched as metadata[key]=value (got {odd[0]!r})."
        raise InvalidValue(text, code="invalid_value", param="metadata")
    pairs = {match[1]: value for key, value in items if (match := _METADATA.fullmatch(key))}
    if len(items) > MAX_LABELS or len(pairs) < sum(_METADATA.fullmatch(key) is not None for key, _ in items):
        text = f"metadata takes at most {MAX_LABELS} pairs, as a job has no more, and each key once (got {len(items)})."
        raise InvalidValue(text, code="invalid_value", param="metadata")
    plain = [value for key, value in items if key == "metadata" and value != ""]
    if plain and (pairs or plain != ["null"]):
        raise InvalidValue(
            f"metadata must be 'null' or pairs metadata[key]=value, not both (got {plain[0]!r}).",
            code="invalid_value",
            param="metadata",
        )
    return pairs, bool(plain)
