"""Chooses the initialization of a job with `lora.init: "auto"`, or starts to try candidates. Nothing here commits.

An earlier experiment on the same rows decides (`history`), or candidates are tried (`probe`, `follow`), or the rule of
`Lora.resolve` does, where there is nothing to compare by or the job is too short.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import ValidationError
from sqlalchemy.orm import Session

from api.core.db.database import now
from api.core.db.tables import File, Job
from api.core.errors import Refusal
from api.core.experiments import experiments, probe
from api.core.experiments.auto import history
from api.core.experiments.auto.choice import INIT, settle, take_by_rule
from api.core.experiments.experiments import ExperimentOrder, Probe, choose_rate
from api.core.jobs import admission, events
from api.core.jobs import jobs as changes
from api.core.jobs.submit import PRIORITY_NAMES, Order
from api.core.jobs.transitions import lock_job
from api.core.models import catalogue
from api.core.queue import scheduling
from lorainit.config.errors import LorainitError
from lorainit.config.inits import Automatic, InitConfig
from lorainit.config.resolve import base_learning_rate, resolve, total_steps
from lorainit.config.spec import Choice, Hyperparameters, Lora


def consider(session: Session, job_id: str) -> admission.Decision:
    """As `admission.consider`, for a job whose initialization may still have to be chosen; "trying" if that begins."""
    job = session.get(Job, job_id)
    if job is not None and _waits_for_choice(job) and admission.has_usable_files(session, job):
        lock_job(session, job)  # because the web process and the reconciler may both come to choose
        session.refresh(job)
        if _waits_for_choice(job):
            try:
                _choose(session, job)
            except (Refusal, LorainitError) as refusal:
                changes.reject(session, job.id, admission.make_failure(refusal))
                return "failed"
            if job.experiment_id is not None:
                return "trying"
    return admission.consider(session, job_id)


def _waits_for_choice(job: Job) -> bool:
    return job.status == "validating_files" and job.experiment_id is None and admission.has_automatic_init(job)


def _choose(session: Session, job: Job) -> None:
    asked = _Asked.read(session, job)
    if asked.may_choose_rate:
        known = history.find(
            session, job, steps=asked.steps, batch_size=asked.batch_size, methods=asked.automatic.candidates
        )
        if known is not None:
            choice = Choice(param=INIT, value=known.lora.method.method, reason=known.reason)
            settle(job, known.lora, [choice], rate=known.learning_rate, reason=f"as in {known.experiment_id}")
            return
    try:
        with session.begin_nested():
            why = _start_probe(session, job, asked)
    except Refusal as refusal:
        why = f"candidates cannot be tried: {refusal.message.rstrip('.')}"
    if why is not None:
        take_by_rule(session, job, why)


@dataclass(frozen=True)
class _Asked:
    """What a job asks for, as far as it decides what is tried."""

    lora: Lora
    training: Hyperparameters
    entry: catalogue.Entry
    steps: int
    batch_size: int

    @classmethod
    def read(cls, session: Session, job: Job) -> "_Asked":
        lora = Lora.model_validate(job.recipe["lora"])
        training = Hyperparameters.model_validate(job.recipe["training"])
        entry = catalogue.require(job.model)
        rows = (session.get_one(File, job.training_file_id).validation or {})["valid_rows"]
        resolved, _ = resolve(training, rows=rows, model=entry.reference(), method=lora.resolve()[0].method)
        assert resolved.batch_size != "auto"
        return cls(lora, training, entry, total_steps(resolved, rows=rows), resolved.batch_size)

    @property
    def automatic(self) -> Automatic:
        assert isinstance(self.lora.init, Automatic)
        return self.lora.init

    @property
    def may_choose_rate(self) -> bool:
        return self.training.learning_rate is None and self.training.learning_rate_multiplier == "auto"

    @property
    def warmup(self) -> int:
        return math.ceil(self.training.warmup_ratio * self.steps)

    @property
    def budget(self) -> int:
        wanted = self.automatic.probe_steps
        return int(probe.BUDGET * self.steps) if wanted == "auto" else wanted

    def find_rate(self, init: InitConfig, factor: float) -> float:
        """The learning rate of a candidate."""
        if self.training.learning_rate is not None:
            return self.training.learning_rate
        usual = base_learning_rate(self.entry.reference(), init)
        multiplier = self.training.learning_rate_multiplier
        return choose_rate(usual, factor) if multiplier == "auto" else multiplier * usual


def _list_possible(lora: Lora, entry: catalogue.Entry) -> list[Lora]:
    """The adapter with each method that may be chosen and goes with the rest of the request."""
    assert isinstance(lora.init, Automatic)
    found = list[Lora]()
    for name in lora.init.candidates or probe.METHODS:
        try:
            made = lora.with_init(name)
            catalogue.resolve_targets(made.resolve()[0], entry)
        except (Refusal, ValidationError):
            continue
        found.append(made)
    return found


def _start_probe(session: Session, job: Job, asked: _Asked) -> str | None:
    """Start the experiment that chooses for a job; why nothing can be tried if so."""
    if job.validation_file_id is None:
        return "without a validation file nothing can be compared"
    loras = _list_possible(asked.lora, asked.entry)
    if len(loras) < 2:
        return f"only {loras[0].method.method if loras else 'none of the candidates'} goes with the rest of the request"
    own = asked.automatic.candidates is None
    wanted = probe.list_candidates(len(loras), own=own, fixed_rate=not asked.may_choose_rate)
    plan = probe.plan(asked.steps, warmup=asked.warmup, budget=asked.budget, available=len(wanted))
    if plan is None:
        return _explain_too_short(asked)
    order = _make_order(job, asked, loras, wanted[: plan.candidates], plan)
    experiment = experiments.create(session, job.project_id, order)
    job.experiment_id = experiment.id
    assert order.probe is not None
    data = {"kind": "init_probe", "experiment_id": experiment.id, "most_steps": plan.cost, "looks": list(plan.looks)}
    events.append(session, job.id, f"{order.probe.text} (experiment {experiment.id})", at=now(session), data=data)
    session.flush()
    return None


def _explain_too_short(asked: _Asked) -> str:
    text = (
        f"the job is too short to try candidates on its rows: {asked.steps} steps, of which {asked.budget} may be spent"
    )
    least = probe.find_least_steps(warmup_ratio=asked.training.warmup_ratio)
    enough = asked.automatic.probe_steps == "auto" and least
    return f"{text}; {least} steps are enough" if enough else text


def _make_order(
    job: Job, asked: _Asked, loras: Sequence[Lora], wanted: Sequence[probe.Candidate], plan: probe.ProbePlan
) -> ExperimentOrder:
    """The experiment that tries the candidates on the job's rows, in its order, on its schedule."""
    methods = sorted({one.method for one in wanted})
    inits = [loras[method] for method in methods]
    rates = [
        [asked.find_rate(loras[method].method, one.factor) for one in wanted if one.method == method]
        for method in methods
    ]
    given = {"model": job.model, "training_file": job.training_file_id, "validation_file": job.validation_file_id}
    first, second = plan.looks
    text = (
        f"{plan.candidates} candidates for the initialization are tried on the job's rows: {first} steps each, the best"
        f" {probe.LEFT} up to step {second}, of {asked.steps}"
    )
    return ExperimentOrder(
        name=f"choose for {job.id}",
        job=Order(
            model=job.model,
            training_file=job.training_file_id,
            validation_file=job.validation_file_id,
            suffix=None,
            seed=job.seed,
            metadata={"chosen_for": job.id},
            lora=asked.lora,
            training=asked.training.model_copy(update={"learning_rate_multiplier": "auto"}),
            priority=PRIORITY_NAMES[job.priority],
            on_row_error="skip" if job.on_row_error == "skip" else "fail",
            append_eos=job.append_eos,
            deterministic=job.deterministic,
            group=job.devices == 1,  # so that candidates share one base and one forward pass
            devices=job.devices,
            device=scheduling.device_for_queue(job.queue),
        ),
        given={**given, "lora": job.recipe["lora"]},
        loras={(place, lora.r): lora for place, lora in enumerate(inits)},
        inits=[lora.method.model_dump(mode="json", exclude_none=True) for lora in inits],
        ranks=[asked.lora.r],
        rates=rates,
        seeds=[job.seed],
        objective={"metric": "valid_loss", "goal": "min", "at": "final"},
        schedule="probe",
        extend=False,
        max_jobs=probe.MOST,
        confirm_seeds=0,
        metadata=None,
        max_parallel=None,
        # Half a step less, so that rounding up to whole steps gives exactly these.
        probe=Probe(job_id=job.id, looks=[(look - 0.5) / asked.steps for look in plan.looks], text=text),
    )
