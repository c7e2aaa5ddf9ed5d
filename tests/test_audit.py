"""What must not be in the sources, looked for in their syntax trees rather than in their text."""

import ast
from collections.abc import Iterator
from pathlib import Path

import api
from lorainit.model.source import hub
from worker import app as worker_app

ROOT = Path(api.__file__).parents[1]
SOURCES = sorted(path for part in ("api", "worker", "lorainit", "migrations") for path in (ROOT / part).rglob("*.py"))
CODE_FROM_DATA = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "jsonpickle"}
RUNS_TEXT = {"eval", "exec", "compile", "__import__"}
RUNS_A_SHELL = {"os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"}


def nodes(kind: type[ast.AST]) -> Iterator[tuple[str, ast.AST]]:
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, kind):
                yield f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}", node


def calls() -> Iterator[tuple[str, str, dict[str, ast.expr]]]:
    """(place, dotted name, keyword arguments) of every call."""
    for place, node in nodes(ast.Call):
        assert isinstance(node, ast.Call)
        yield place, ast.unparse(node.func), {word.arg: word.value for word in node.keywords if word.arg}


def is_constant(value: ast.expr | None, wanted: object) -> bool:
    return isinstance(value, ast.Constant) and value.value is wanted


def test_nothing_imports_what_runs_code_from_data() -> None:
    for place, node in nodes(ast.Import):
        assert not {name.name.partition(".")[0] for name in node.names} & CODE_FROM_DATA, place  # type: ignore[attr-defined]
    for place, node in nodes(ast.ImportFrom):
        assert (node.module or "").partition(".")[0] not in CODE_FROM_DATA, place  # type: ignore[attr-defined]


def test_no_call_loads_pickles_or_runs_text_or_a_shell() -> None:
    seen = 0
    for place, name, words in calls():
        seen += 1
        last = name.rpartition(".")[2]
        assert name not in {"torch.load", "torch.save", "yaml.load", "yaml.unsafe_load"} | RUNS_A_SHELL, place
        assert name not in RUNS_TEXT, place
        assert not is_constant(words.get("shell"), True), place
        assert not is_constant(words.get("allow_pickle"), True), place
        assert not is_constant(words.get("weights_only"), False), place
        assert last != "extractall" or is_constant_text(words.get("filter"), "data"), place
    assert seen > 1000


def is_constant_text(value: ast.expr | None, wanted: str) -> bool:
    return isinstance(value, ast.Constant) and value.value == wanted


def test_every_loader_of_a_model_refuses_the_models_own_code() -> None:
    loaders = 0
    for place, name, words in calls():
        # A class in a variable may be one of transformers' Auto classes, too: then it is told so.
        loads = name.endswith((".from_pretrained", ".from_config")) and (
            name.startswith("Auto") or "trust_remote_code" in words
        )
        if loads:
            loaders += 1
            assert is_constant(words.get("trust_remote_code"), False), place
        assert loads or "trust_remote_code" not in words, place
    assert loaders >= 4


def test_weights_are_loaded_from_safetensors_alone() -> None:
    loaders = 0
    for place, name, words in calls():
        given = "state_dict" in words  # weights that are in memory
        if name in ("AutoModelForCausalLM.from_pretrained", "kind.from_pretrained") and not given:
            loaders += 1
            assert is_constant(words.get("use_safetensors"), True) or "gguf_file" in words, place
    assert loaders == 2
    assert all(not pattern.endswith((".bin", ".pt", ".pth", ".pkl", ".py")) for pattern in hub.FILES)


def test_one_place_fetches_from_a_hub() -> None:
    places = [
        place for place, name, _ in calls() if name.rpartition(".")[2] in ("snapshot_download", "hf_hub_download")
    ]
    assert len(places) == 1 and places[0].startswith("lorainit/model/source/hub.py")


def test_the_queue_takes_json_and_nothing_else() -> None:
    conf = worker_app.app.conf
    assert (conf.accept_content, conf.task_serializer, conf.result_backend) == (["json"], "json", None)


def test_digests_of_keys_are_compared_in_constant_time() -> None:
    compared = [place for place, name, _ in calls() if name == "hmac.compare_digest"]
    assert any(place.startswith("api/core/access/keys.py") for place in compared)
    for place, node in nodes(ast.Compare):
        assert isinstance(node, ast.Compare)
        assert "sha256" not in ast.unparse(node.left) or not place.startswith("api/core/access/keys.py"), place


def test_ids_and_keys_come_from_the_systems_randomness() -> None:
    for place, node in nodes(ast.Import):
        modules = {alias.name for alias in node.names}  # type: ignore[attr-defined]
        assert place.startswith("lorainit/") or "random" not in modules, f"{place}: use secrets"
