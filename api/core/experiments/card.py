"""The comparison card: what all cells of an experiment had in common, what differed, and how cells were compared."""

from collections.abc import Mapping, Sequence
from typing import Any

from api.core.experiments.ranking import RELIABLE_SEEDS, Ranking, Row

SELECTION = "each init at its best learning rate by mean objective; {rates} for all"
# Facts that a seed may change, because it decides which rows a run of so many steps sees.
BY_SEED = ("trained_tokens",)


def make_card(
    cells: Sequence[tuple[int, str, Mapping[str, Any]]],
    ranking: Ranking,
    names: Mapping[Any, str],
    *,
    has_ended: bool = True,
) -> dict[str, Any] | None:
    """The card of an experiment; None before any cell has succeeded.

    Args:
        cells: seed, name and facts (`outcome["same"]`) of each cell that has succeeded.
        names: a name for each treatment.
        has_ended: whether no further cell will end; before, nobody is warned of cells that are missing.
    """
    if not cells:
        return None
    differences = [found for field in cells[0][2] if (found := _find_difference(cells, field)) is not None]
    same = {field: _find_common(cells, field) for field in cells[0][2]}
    warnings = [f"{found['field']} differs between cells: {found['text']}." for found in differences]
    return {
        "comparable": not differences,
        "same": {"row_order": "per seed", **same},
        "differences": [{"field": found["field"], "values": found["values"]} for found in differences],
        "selection": SELECTION.format(rates=_describe_counts(ranking.rows)),
        "noise": ranking.noise.deviation if ranking.noise else None,
        "warnings": warnings + _find_warnings(ranking, names, has_ended=has_ended),
    }


def _find_common(cells: Sequence[tuple[int, str, Mapping[str, Any]]], field: str) -> Any:
    """The value of all cells; None if it is not the same in all."""
    first = cells[0][2][field]
    return first if all(facts[field] == first for _, _, facts in cells) else None


def _find_difference(cells: Sequence[tuple[int, str, Mapping[str, Any]]], field: str) -> dict[str, Any] | None:
    """Which cells have which value, if there are several; within a seed for facts that the seed may change."""
    groups: dict[int | None, dict[str, list[str]]] = {}
    values = {}
    for seed, name, facts in cells:
        group = groups.setdefault(seed if field in BY_SEED else None, {})
        group.setdefault(repr(facts[field]), []).append(name)
        values[repr(facts[field])] = facts[field]
    mixed = next((group for group in groups.values() if len(group) > 1), None)
    if mixed is None:
        return None
    shown = [{"value": values[key], "cells": sorted(names)} for key, names in mixed.items()]
    text = "; ".join(f"{key} in {len(names)} cells" for key, names in mixed.items())
    return {"field": field, "values": shown, "text": text}


def _describe_counts(rows: Sequence[Row]) -> str:
    counts = {len(row.by_rate) for row in rows}
    if len(counts) == 1:
        return "same number of rates"
    return f"{min(counts)} to {max(counts)} rates (more where a best rate lay at the edge of the grid), the same seeds"


def _find_warnings(ranking: Ranking, names: Mapping[Any, str], *, has_ended: bool) -> list[str]:
    rows, found = ranking.rows, list[str]()
    ended = [row for row in rows if row.summary is not None]
    edge = [row for row in ended if row.at_edge]
    few = [row for row in rows if has_ended and (row.summary is None or row.summary.n < 2)]
    if edge and len(edge) == len(ended):
        rates = max(len(row.by_rate) for row in edge)
        found.append(
            f"every best learning rate lies at the edge of a grid of {rates}: widen the grid before drawing conclusions"
        )
    elif edge:
        which = ", ".join(names[row.treatment] for row in edge)
        found.append(f"the best learning rate lies at the edge of the grid for {which}: a better one may lie beyond it")
    if few:
        which = ", ".join(names[row.treatment] for row in few)
        found.append(f"fewer than 2 seeds have finished for {which}: ranked last and compared with nothing")
    if has_ended and any(2 <= row.summary.n < RELIABLE_SEEDS for row in ended if row.summary):
        found.append(f"fewer than {RELIABLE_SEEDS} seeds: the spread between seeds is unreliable")
    if ranking.unsteady:
        which = ", ".join(sorted(names[treatment] for treatment in ranking.unsteady))
        found.append(f"the results of {which} vary far more between seeds than the others: compared by those alone")
    failed = sum(row.failed_runs for row in rows)
    if failed:
        found.append(f"{failed} runs failed or were cancelled; their cells count for nothing")
    return found
