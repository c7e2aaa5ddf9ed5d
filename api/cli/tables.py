"""Rows for the terminal: methods, jobs, and a base model's catalogue entry."""

import json
from collections.abc import Iterable, Sequence
from typing import Any

from openai.types import Model
from openai.types.fine_tuning import FineTuningJob
from rich.table import Table
from rich.text import Text

from api.cli.client import get_field
from lorainit.config.inits import INITS
from lorainit.config.model_facts import ModelFacts, Target
from lorainit.config.sources import HUB, LOCAL

METHOD_COLUMNS = ("method", "looks at", "export", "what it does")
MODEL_COLUMNS = ("model", "type", "base", "job")
JOB_COLUMNS = ("job", "status", "%", "model", "init", "r", "result")


def make_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """A table without borders and markup. Its first column is never cut, because people copy names from it."""
    rows = list(rows)
    drawn = Table(box=None, pad_edge=False)
    drawn.add_column(columns[0], no_wrap=True, min_width=max((len(row[0]) for row in rows), default=0))
    for column in columns[1:]:
        drawn.add_column(column, overflow="fold")
    for row in rows:
        drawn.add_row(*map(Text, row))
    return drawn


def list_installed_methods() -> list[tuple[str, ...]]:
    """The initializations of this installation."""
    defaults = (kind.model_validate({"method": name}) for name, kind in INITS.items())
    return [_method(d.method, [d.facts.needs], d.export_rank, d.facts.description) for d in defaults]


def list_offered_methods(catalogue: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """The initializations a server offers, from its `/v1/lora/methods`."""
    return [_method(m["id"], m["needs"], m["export_rank"], m["description"]) for m in catalogue]


def make_job_row(job: FineTuningJob) -> tuple[str, ...]:
    """One job in `lorainit list`."""
    lora, progress = get_field(job, "lora") or {}, get_field(job, "progress") or {}
    init = lora.get("init", {})
    return (
        job.id,
        job.status,
        f"{progress['percent']:.0f}" if progress.get("percent") is not None else "",
        job.model,
        init if isinstance(init, str) else init.get("method", ""),
        str(lora.get("r", "")),
        _result(job),
    )


def make_model_row(model: Model) -> tuple[str, ...]:
    """One model in `lorainit models list`."""
    extra = model.model_extra or {}
    return (model.id, *(str(extra.get(name) or "") for name in ("type", "parent", "fine_tuning_job_id")))


def _result(job: FineTuningJob) -> str:
    """The result of a job, and the codes of its warnings."""
    result = job.fine_tuned_model or (job.error.code if job.error else None) or get_field(job, "queue_reason") or ""
    codes = ", ".join(warning["code"] for warning in get_field(job, "warnings") or [])
    return f"{result} ({codes})" if codes else result


def format_catalogue_entry(facts: ModelFacts, *, model_id: str, given: bool) -> str:
    """One `[[models]]` block of the file that LORAINIT_CATALOGUE names; `given`: the root was an option."""
    lines = [
        "[[models]]",
        f"id = {_toml(model_id)}",
        *([] if given or facts.source.startswith(HUB) else _about_root(facts.root)),
        f"root = {_toml(facts.root)}",
        f"source = {_toml(facts.source)}",
        f"max_length = {facts.max_length}",
        f"chat = {_toml(facts.chat)}",
        *([f"base_sha256 = {_toml(facts.base_sha256)}"] if facts.base_sha256 else []),
        "# The best peak rate of a few short runs with init = kaiming. Without it: docs/rates.md, by the model's size.",
        "# base_learning_rate = 2e-4",
        "targets = [",
    ]
    lines += [*_rows(facts.targets), "]"]
    if facts.left_out:
        lines += ["# These get no LoRA.", "left_out = [", *_rows(facts.left_out), "]"]
    return "\n".join(lines) + "\n"


def _about_root(root: str) -> list[str]:
    """A comment above a root that was guessed, because adapters will carry this name."""
    if root.startswith(LOCAL):
        return ["# Adapters will name their base like this. If the model is on a hub: `--root OWNER/NAME`."]
    return [f"# Taken from the folder. If the weights were trained further, write {LOCAL}NAME: adapters fit only them."]


def _rows(kinds: Sequence[Target]) -> list[str]:
    """Inline tables of TOML, whose strings are JSON's."""
    rows = (
        ", ".join(f"{key} = {_toml(value)}" for key, value in kind.model_dump(exclude_defaults=True).items())
        for kind in kinds
    )
    return [f"  {{ {row} }}," for row in rows]


def _method(name: str, needs: list[str], export_rank: str, description: str) -> tuple[str, ...]:
    looks_at = ", ".join(need for need in needs if need != "none") or "nothing"
    return (name, looks_at, f"rank {export_rank}", description)


def _toml(value: Any) -> str:
    """The value as JSON, which is TOML, too. Not in ASCII, because TOML refuses JSON's escapes beyond U+FFFF."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
