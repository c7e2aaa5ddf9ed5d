"""Replaces "auto" in the hyperparameters by numbers, once the number of rows is known. Loads no torch.

The service does it after validating the files, the command line after reading them. Both call `resolve`. Resolving
twice changes nothing, so a run may resolve a recipe that the service has resolved before.
"""

import math
from collections.abc import Callable

from lorainit.config import rates
from lorainit.config.errors import LorainitError
from lorainit.config.inits import InitConfig
from lorainit.config.spec import BaseModelRef, Choice, Hyperparameters


class ConflictingRates(LorainitError):
    """`learning_rate` and `learning_rate_multiplier` contradict each other."""

    code = "invalid_value"


def steps_per_epoch(rows: int, batch_size: int) -> int:
    """Optimizer steps in one pass over `rows`; the last batch may be smaller."""
    return math.ceil(rows / batch_size)


def total_steps(training: Hyperparameters, *, rows: int) -> int:
    """Optimizer steps of a resolved recipe on `rows` rows."""
    assert training.n_epochs != "auto" and training.batch_size != "auto"
    return training.max_steps or training.n_epochs * steps_per_epoch(rows, training.batch_size)


def base_learning_rate(model: BaseModelRef, method: InitConfig) -> float:
    """The rate that `learning_rate_multiplier` = 1 stands for: from the table, or the one measured for this base."""
    weights = model.weights or 0
    if model.base_learning_rate is None:
        return rates.default_rate(method, weights=weights)
    return model.base_learning_rate * rates.share_of_baseline(method, weights=weights)


def with_base_rate(model: BaseModelRef, training: Hyperparameters, method: InitConfig) -> BaseModelRef:
    """`model` with the base rate that `training` was resolved with.

    The rate is stored with the job. Otherwise a later change of the table or of the catalogue would change a job that
    already exists.
    """
    rate, multiplier = training.learning_rate, training.learning_rate_multiplier
    if rate is None or multiplier == "auto":
        return model
    share = rates.share_of_baseline(method, weights=model.weights or 0)
    return model.model_copy(update={"base_learning_rate": rate / multiplier / share})


def resolve(
    training: Hyperparameters, *, rows: int, model: BaseModelRef, method: InitConfig
) -> tuple[Hyperparameters, list[Choice]]:
    """Replace every "auto" in `training`; return one `Choice` for each of them.

    Args:
        rows: usable training rows, at least 1.

    Raises:
        ConflictingRates: both rates are given and disagree.
    """
    update: dict[str, float | int] = {}
    choices: list[Choice] = []

    def choose(name: str, value: float | int, reason: str) -> None:
        update[name] = value
        choices.append(Choice(param=f"training.{name}", value=value, reason=reason))

    if training.n_epochs == "auto":
        choose("n_epochs", *_epochs(rows))
    if training.batch_size == "auto":
        choose("batch_size", _batch_size(rows), f"0.2 % of {rows} rows, to the nearest power of two in 8-64")
    if training.max_length == "auto":
        choose("max_length", min(model.max_length, 2048), "the model's limit, at most 2048")
    _resolve_rate(training, base_learning_rate(model, method), choose, update)

    batch_size = int(update.get("batch_size", 0)) or training.batch_size
    assert batch_size != "auto"
    epoch = steps_per_epoch(rows, batch_size)
    if training.eval_interval == "auto":
        choose("eval_interval", epoch, "once per epoch")
    if training.checkpoint_interval == "auto":
        choose("checkpoint_interval", epoch, "once per epoch")
    return training.model_copy(update=update), choices


def _epochs(rows: int) -> tuple[int, str]:
    if 3 * rows < 100:
        return min(25, math.ceil(100 / rows)), f"{rows} rows are few: enough epochs to see 100 of them"
    if 3 * rows > 25_000:
        return max(1, 25_000 // rows), f"{rows} rows are many: at most 25000 of them in all"
    return 3, "three epochs, unless the rows are few or many"


def _batch_size(rows: int) -> int:
    nearest = 1 << round(math.log2(max(1.0, 0.002 * rows)))
    return min(rows, max(8, min(64, nearest)))


def _resolve_rate(
    training: Hyperparameters,
    base: float,
    choose: Callable[[str, float | int, str], None],
    update: dict[str, float | int],
) -> None:
    rate, multiplier = training.learning_rate, training.learning_rate_multiplier
    if rate is None:
        if multiplier == "auto":
            multiplier = 1.0
            choose("learning_rate_multiplier", 1.0, f"the base rate of this model and method, {base:g}")
        update["learning_rate"] = multiplier * base
    elif multiplier == "auto":
        update["learning_rate_multiplier"] = rate / base
    elif not math.isclose(rate, multiplier * base, rel_tol=1e-6):
        raise ConflictingRates(
            f"learning_rate {rate:g} and learning_rate_multiplier {multiplier:g} (x base rate {base:g}) disagree:"
            " give one of them.",
            param="training.learning_rate",
        )
