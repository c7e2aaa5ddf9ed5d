"""Experiments: create, list, retrieve, cancel and delete comparisons of initializations."""

from typing import Any

from fastapi import APIRouter
from fastapi.responses import HTMLResponse, Response

from api.core.access.idempotency import run_idempotent
from api.core.access.keys import require_admin
from api.core.experiments import experiments
from api.core.experiments.report import make_report
from api.core.experiments.results import Results
from api.dependencies import CallerDep, IdentityDep, Reading, Writing
from api.http.bodies import BoundedBody
from api.routes.query import After, Limit100
from api.schemas.experiment import ExperimentObject, make_experiment_object
from api.schemas.experiment_request import ExperimentRequest
from api.schemas.wire import IDEMPOTENT_RESPONSES, V1_RESPONSES, Deleted, Page, make_page

router = APIRouter(prefix="/v1", tags=["experiments"], route_class=BoundedBody, responses=V1_RESPONSES)
EXPERIMENTS = "/experiments"
PAGE: dict[int | str, dict[str, Any]] = {
    200: {"description": "The report.", "content": {"text/html": {"schema": {"type": "string"}}}}
}


@router.post(EXPERIMENTS, response_model=ExperimentObject, responses=IDEMPOTENT_RESPONSES)
def create(body: ExperimentRequest, attempt: IdentityDep, session: Writing, reply: Response) -> Any:
    """Create an experiment and all its jobs, or none of them."""
    project = attempt.caller.project_id
    if body.job.priority == "high":
        require_admin(attempt.caller, "priority 'high'", param="job.priority")

    def make() -> tuple[str, dict[str, Any]]:
        made = experiments.create(session, project, body.order())
        return made.id, _shown(session, project, made.id)

    content = body.model_dump(mode="json", exclude_unset=True)
    outcome = run_idempotent(session, attempt, content, make=make, again=lambda found: _shown(session, project, found))
    session.commit()
    if outcome.replayed:
        reply.headers["idempotency-replayed"] = "true"
    return outcome.body


@router.get(EXPERIMENTS)
def list_experiments(
    caller: CallerDep, session: Reading, after: After = None, limit: Limit100 = None
) -> Page[ExperimentObject]:
    """Experiments of the project, newest first, without results: retrieve one for its results."""
    rows, more = experiments.page(session, caller.project_id, after=after, limit=limit or 20)
    counts = experiments.count_statuses(session, [row.id for row in rows])
    # No results, because the curves of all cells of twenty experiments would fill the memory.
    return make_page([make_experiment_object(row, (), counts[row.id]) for row in rows], has_more=more)


@router.get(EXPERIMENTS + "/{experiment_id}")
def retrieve(experiment_id: str, caller: CallerDep, session: Reading) -> ExperimentObject:
    """One experiment, with the results of the jobs that have ended."""
    return _object(session, caller.project_id, experiment_id)


@router.get(EXPERIMENTS + "/{experiment_id}/report", response_class=Response, responses=PAGE)
def report(experiment_id: str, caller: CallerDep, session: Reading) -> Response:
    """The results as one HTML file that needs nothing else."""
    found = experiments.find(session, caller.project_id, experiment_id)
    results = Results(found, experiments.read_cells(session, found.id))
    page = make_report(results, status=found.status)
    # The page has no scripts, and the header makes sure that nothing in it is taken for one.
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return HTMLResponse(page, headers={"content-security-policy": policy})


@router.post(EXPERIMENTS + "/{experiment_id}/cancel")
def cancel(experiment_id: str, caller: CallerDep, session: Writing) -> ExperimentObject:
    """Cancel all jobs that have not ended."""
    experiments.cancel(session, experiments.find(session, caller.project_id, experiment_id))
    answer = _object(session, caller.project_id, experiment_id)
    session.commit()
    return answer


@router.delete(EXPERIMENTS + "/{experiment_id}")
def delete(experiment_id: str, caller: CallerDep, session: Writing) -> Deleted:
    """Delete an ended experiment and its table. Its jobs and their adapters stay."""
    experiments.delete(session, experiments.find(session, caller.project_id, experiment_id))
    session.commit()
    return Deleted(id=experiment_id, object="experiment")


def _object(session: Reading, project_id: str, experiment_id: str) -> ExperimentObject:
    found = experiments.find(session, project_id, experiment_id)
    counts = experiments.count_statuses(session, [found.id])[found.id]
    return make_experiment_object(found, experiments.read_cells(session, found.id), counts)


def _shown(session: Writing, project_id: str, experiment_id: str) -> dict[str, Any]:
    return _object(session, project_id, experiment_id).model_dump(mode="json")
