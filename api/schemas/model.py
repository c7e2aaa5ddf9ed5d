"""Models and initialization methods as the caller sees them."""

from typing import Any, Literal

from api.core.db.tables import Checkpoint
from api.core.models.catalogue import Entry
from api.core.models.registry import Model
from api.schemas.wire import Element, Wire, to_unix
from lorainit.config.inits import INITS, ExportRank, InitConfig, Quantization
from lorainit.config.inits.plain import Kaiming
from lorainit.config.model_facts import LeftOut
from lorainit.config.resolve import base_learning_rate

ModelType = Literal["base", "adapter", "checkpoint"]


class ModelLimits(Wire):
    """The limits of a base model; `left_out`: layers that get no LoRA, with the reason."""

    max_r: int
    max_length: int
    quantization: list[Quantization]
    methods: list[str]
    base_learning_rate: float
    target_modules: list[str]
    left_out: list[LeftOut]


class Capabilities(Wire):
    """What a model can be used for on this server."""

    fine_tuning: bool
    chat: bool


class ModelObject(Element):
    """A base model, a finished adapter or a checkpoint."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    shutdown_date: str | None = None
    type: ModelType
    parent: str | None
    root: str | None
    fine_tuning_job_id: str | None
    capabilities: Capabilities
    limits: ModelLimits | None


class MethodObject(Element):
    """An initialization: its facts, its parameters as JSON Schema, what we recommend."""

    id: str
    object: Literal["lora.method"] = "lora.method"
    name: str
    description: str
    paper: dict[str, str | None] | None
    available: bool
    maturity: Literal["stable", "experimental"]
    needs: list[str]
    function_preserving: bool
    offset: Literal["none", "subtract"]
    export_rank: ExportRank
    supports: dict[str, Any]
    parameters: dict[str, Any]
    recommended: dict[str, Any]
    base_learning_rate: float | None
    estimate: dict[str, Any] | None


def make_model_object(model: Model) -> ModelObject:
    """A base, adapter or checkpoint as the caller sees it."""
    named = model.named
    if isinstance(named, Entry):
        return _base(named)
    return ModelObject(
        id=named.name,
        created=to_unix(named.created_at),
        owned_by=named.project_id,
        type="checkpoint" if isinstance(named, Checkpoint) else "adapter",
        parent=model.base.id if model.base else None,
        root=model.base.root if model.base else None,
        fine_tuning_job_id=named.job_id,
        capabilities=Capabilities(fine_tuning=False, chat=False),
        limits=None,
    )


def _base(entry: Entry) -> ModelObject:
    return ModelObject(
        id=entry.id,
        created=entry.created,
        owned_by="system",
        type="base",
        parent=None,
        root=entry.root,
        fine_tuning_job_id=None,
        capabilities=Capabilities(fine_tuning=True, chat=False),
        limits=ModelLimits(
            max_r=entry.max_r,
            max_length=entry.max_length,
            quantization=entry.quantization,
            methods=["supervised"],
            base_learning_rate=base_learning_rate(entry.reference(), Kaiming(method="kaiming")),
            target_modules=list(dict.fromkeys(target.name for target in entry.targets)),
            left_out=entry.left_out,
        ),
    )


def make_method_object(name: str, *, entry: Entry | None, r: int) -> MethodObject:
    """A method with its default parameters; rates and availability are filled in for a base and a rank."""
    kind = INITS[name]
    default, facts = kind.model_validate({"method": name}), kind.facts
    fits = r >= facts.min_rank and not (facts.even_rank and r % 2) and (entry is None or r <= entry.max_r)
    fits = fits and (entry is None or not {None, *entry.quantization}.isdisjoint(facts.quantization))
    return MethodObject(
        id=name,
        name=facts.title,
        description=facts.description,
        paper={"title": facts.paper, "arxiv": facts.arxiv} if facts.paper else None,
        available=fits,
        maturity=facts.maturity,
        needs=[facts.needs],
        function_preserving=default.function_preserving,
        offset=default.offset,
        export_rank=default.export_rank,
        supports={
            "quantization": [name for name in facts.quantization if name],
            "dora": default.supports_dora,
            "rslora": True,
        },
        parameters=describe_parameters(kind),
        recommended={
            "r": r,
            "alpha": facts.alpha or r,
            "use_rslora": facts.rslora,
            "dropout": 0.0,
            "quantization": facts.quantization[0],
        },
        base_learning_rate=base_learning_rate(entry.reference(), default) if entry else None,
        estimate=None,
    )


def describe_parameters(kind: type[InitConfig]) -> dict[str, Any]:
    """The JSON Schema of a method, from the very class that checks requests."""
    schema = kind.model_json_schema()
    return {key: schema[key] for key in ("type", "additionalProperties", "properties", "required")}
