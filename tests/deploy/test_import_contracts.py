"""The contracts in `pyproject.toml` refuse imports in the wrong direction.

Each wrong import is added to the graph of the imports of today, so nothing is written.
"""

from collections.abc import Iterator
from pathlib import Path

import grimp
import pytest
from importlinter.api import read_configuration
from importlinter.contracts.acyclic_siblings import AcyclicSiblingsContract
from importlinter.contracts.layers import LayersContract
from importlinter.domain.contract import Contract

CONFIGURED = read_configuration(str(Path(__file__).parents[2] / "pyproject.toml"))
SESSION = CONFIGURED["session_options"]
KINDS: dict[str, type[Contract]] = {"layers": LayersContract, "acyclic_siblings": AcyclicSiblingsContract}
OPTIONS = [options for options in CONFIGURED["contracts_options"] if options["type"] in KINDS]
CONTRACTS = [KINDS[options["type"]](options["name"], SESSION, options) for options in OPTIONS]
WRONG = [
    ("lorainit.config.paths", "lorainit.progress"),
    ("lorainit.model.finite", "lorainit.leases"),
    ("lorainit.runtime.settings", "lorainit.warm"),
    ("lorainit.init.methods.kaiming", "lorainit.init.report"),
    ("lorainit.init.methods.eva", "lorainit.init.collectors.directions"),
    ("lorainit.init.collectors.rows", "lorainit.init.stage"),
    ("lorainit.train.optimizers", "lorainit.train.loop"),
    ("lorainit.export.float64", "lorainit.export.finish"),
    ("lorainit.model.memory", "lorainit.model.base"),
    ("lorainit.system.bounded_command", "lorainit.system.driver"),
    ("api.core.jobs.labels", "api.core.experiments.grid"),
    ("api.core.files.quota", "api.core.experiments.experiments"),
    ("api.core.experiments.grid", "api.core.maintenance.doctor"),
    ("api.core.experiments.probe", "api.core.experiments.auto.follow"),
    ("api.core.settings", "api.core.traces"),
    ("api.routes.health", "api.cli.commands"),
    ("api.middleware", "api.cli.commands"),
    ("api.http.threads", "api.embedded"),
    ("worker.host.memory", "worker.pool"),
]


@pytest.fixture(scope="module")
def today() -> grimp.ImportGraph:
    """The imports of the repository, without those of other packages."""
    return grimp.build_graph(*SESSION["root_packages"], cache_dir=None)


def refusing(graph: grimp.ImportGraph) -> Iterator[str]:
    """The names of the contracts that the graph breaks."""
    return (contract.name for contract in CONTRACTS if not contract.check(graph, verbose=False).kept)


def test_the_imports_of_today_are_refused_by_no_contract(today: grimp.ImportGraph) -> None:
    assert list(refusing(today)) == []


@pytest.mark.parametrize(("importer", "imported"), WRONG)
def test_a_wrong_import_is_refused(today: grimp.ImportGraph, importer: str, imported: str) -> None:
    assert {importer, imported} <= today.modules
    today.add_import(importer=importer, imported=imported)
    try:
        assert any(refusing(today))
    finally:
        today.remove_import(importer=importer, imported=imported)


@pytest.mark.parametrize("module", ["lorainit.new", "lorainit.init.new", "api.new", "api.core.new", "worker.new"])
def test_a_new_module_without_a_layer_is_refused(today: grimp.ImportGraph, module: str) -> None:
    today.add_module(module)
    try:
        assert any(refusing(today))
    finally:
        today.remove_module(module)


def test_every_contract_of_layers_lists_all_modules_of_its_folder() -> None:
    layers = [contract for contract in CONTRACTS if isinstance(contract, LayersContract)]
    assert [contract.name for contract in layers if not contract.exhaustive or contract.exhaustive_ignores] == []
