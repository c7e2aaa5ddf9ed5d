"""Models: bases, finished adapters, checkpoints; and the catalogue of initializations."""

from typing import Annotated

from fastapi import APIRouter, BackgroundTasks, Query
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import Response
from pydantic import Field

from api.core.db.database import session_scope
from api.core.errors import NotFound
from api.core.models import catalogue, registry
from api.dependencies import CallerDep, IdentityDep, Reading, StorageDep, Writing
from api.http.threads import run_in_search_thread
from api.routes.clear import clear
from api.routes.query import After, Empty, Limit1000, Text
from api.schemas.model import MethodObject, ModelObject, make_method_object, make_model_object
from api.schemas.wire import V1_RESPONSES, Deleted, Page, as_json, make_page, stream_list
from lorainit.config.inits import INITS

router = APIRouter(prefix="/v1", tags=["models"], responses=V1_RESPONSES)
Base = Annotated[Text | None, Empty, Query(description="A base model: fills in rates and availability.")]
Search = Annotated[Text | None, Empty, Query(description="Only models with this in their name, in any case.")]
Rank = Annotated[Annotated[int, Field(ge=1, le=1024)] | None, Empty, Query()]


@router.get("/models", response_model=Page[ModelObject])
async def list_models(
    caller: CallerDep, after: After = None, limit: Limit1000 = None, search: Search = None
) -> Response:
    """Every base, then this project's adapters, newest first; with `limit`, `after` or `search` a page of them."""
    # OpenAI's clients ask for models without a page, so that answer has all of them, and is streamed in batches.
    if not (after or limit or search):
        batches = (
            [make_model_object(model) for model in models] for models in registry.iterate_batches(caller.project_id)
        )
        return await run_in_threadpool(stream_list, batches)

    def find() -> Response:
        project, most = caller.project_id, limit or 20
        with session_scope(read_only=True) as session:
            models, more = registry.list_page(session, project, after=after, limit=most, search=search or "")
            return as_json(make_page([make_model_object(model) for model in models], has_more=more))

    return await (run_in_search_thread(find) if search else run_in_threadpool(find))


# A hub name contains a slash, raw or encoded, so there can be no routes below the name of a model.
@router.get("/models/{model:path}")
def retrieve(model: str, caller: CallerDep, session: Reading) -> ModelObject:
    """One model by its name."""
    return make_model_object(registry.find(session, caller.project_id, model))


@router.delete("/models/{model:path}")
def delete(
    model: str, attempt: IdentityDep, session: Writing, storage: StorageDep, background: BackgroundTasks
) -> Deleted:
    """Delete an adapter with its checkpoints, or one checkpoint. The job stays."""
    keys = registry.delete(session, attempt, model)
    session.commit()  # before the bytes are deleted, because these cannot be brought back if the commit fails
    for key in keys:
        background.add_task(clear, storage, key)
    return Deleted(id=model, object="model")


@router.get("/lora/methods")
def list_methods(_: CallerDep, model: Base = None, r: Rank = None) -> Page[MethodObject]:
    """Every initialization this server offers, with its parameters as JSON Schema."""
    entry = catalogue.require(model) if model else None
    return make_page([make_method_object(name, entry=entry, r=r or 16) for name in INITS], has_more=False)


@router.get("/lora/methods/{method}")
def retrieve_method(method: str, _: CallerDep, model: Base = None, r: Rank = None) -> MethodObject:
    """One initialization."""
    entry = catalogue.require(model) if model else None
    if method not in INITS:
        text = f"There is no initialization {method!r}. Available: {', '.join(INITS)}."
        raise NotFound(text, code="unsupported_init_method", param="method")
    return make_method_object(method, entry=entry, r=r or 16)
