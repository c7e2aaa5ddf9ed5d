"""Where adapters of stock PEFT 0.21 are measurably wrong once saved, switched off or put together, and ours are not.

A failure of the first half of a test says that PEFT has changed, and that our reason is gone. LoRA-GA's
reload is in `test_lora_ga.py`.
"""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from lorainit.config.spec import Lora
from lorainit.data.batches import collate
from lorainit.export.peft_adapter import export
from lorainit.model.forward.loss import logits_of
from lorainit.model.layers.layer import adapted_layers, disable_adapters
from tests.lorainit.reference import eight_rows, tiny
from tests.lorainit.stock_peft import ALPHA, INITS, TARGETS, R, ours, pefts

# Stock PEFT's own warnings are not under test.
pytestmark = pytest.mark.filterwarnings("ignore")

RIGHT = 1e-5  # logits of size 1


@pytest.fixture(autouse=True)
def _own_random_state():
    """PEFT draws from the global generator."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def logits(model):
    with torch.no_grad():
        return logits_of(model, collate(eight_rows()[:4], pad=0))


def apart(one, other):
    return float((one - other).abs().max())


def shaken(parameters):
    """Stands for training."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in parameters:
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)


def pefts_trained(init):
    model = pefts(init)
    shaken(parameter for name, parameter in model.named_parameters() if "lora_" in name)
    return model


def ours_trained(init, folder):
    """A trained adapter in `folder`, and its logits."""
    model = ours(init)
    shaken(p for layer in adapted_layers(model).values() for p in layer.trained_parameters().values())
    export(model, adapted_layers(model), folder, root="tests/tiny")
    return logits(model)


# --- the base model ----------------------------------------------------------------------------


@pytest.mark.parametrize("init", INITS)
def test_base_is_gone_after_peft_and_comes_back_after_ours(init):
    base, model = logits(tiny()), pefts(init)
    assert apart(logits(model), base) < RIGHT
    with model.disable_adapter():
        assert apart(logits(model), base) > 0.2
    model = ours(init)
    assert apart(logits(model), base) < RIGHT
    with disable_adapters(model):
        assert torch.equal(logits(model), base)


# --- reloading ---------------------------------------------------------------------------------


def reload(folder, *, low=False):
    torch.manual_seed(99)
    return PeftModel.from_pretrained(tiny(), folder, low_cpu_mem_usage=low).eval()


def test_fast_pissa_of_peft_reloads_wrong_under_another_random_state(tmp_path):
    model = pefts_trained("pissa_niter_4")
    model.save_pretrained(tmp_path)
    assert apart(logits(reload(tmp_path)), logits(model)) > 0.3


def test_corda_of_peft_cannot_be_reloaded_without_its_calibration(tmp_path):
    pefts_trained("corda").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="preprocess_corda"):
        reload(tmp_path)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
def test_peft_cannot_reload_a_changed_base_with_little_memory(init, tmp_path):
    pefts_trained(init).save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="set_data"):
        reload(tmp_path, low=True)


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("low", [False, True], ids=["plainly", "with little memory"])
def test_ours_reloads_under_another_random_state(init, low, tmp_path):
    trained = ours_trained(init, tmp_path)
    assert apart(logits(reload(tmp_path, low=low)), trained) < RIGHT


def test_two_raw_pissa_adapters_are_both_wrong_and_spoil_a_plain_one(tmp_path):
    trained = {}
    for name, init in {"one": "pissa", "two": "pissa", "plain": True}.items():
        model = pefts_trained(init)
        trained[name] = logits(model)
        model.save_pretrained(tmp_path / name)
    model = PeftModel.from_pretrained(tiny(), tmp_path / "one", adapter_name="one")
    for name in ("two", "plain"):
        model.load_adapter(tmp_path / name, name)
    for name, expected in trained.items():
        model.set_adapter(name)
        assert apart(logits(model.eval()), expected) > 0.3, name


def test_ours_live_side_by_side(tmp_path):
    inits = ("pissa", "olora", "kaiming")
    trained = {init: ours_trained(init, tmp_path / init) for init in inits}
    model = PeftModel.from_pretrained(tiny(), tmp_path / "pissa", adapter_name="pissa")
    for init in inits[1:]:
        model.load_adapter(tmp_path / init, init)
    for init, expected in trained.items():
        model.set_adapter(init)
        assert apart(logits(model.eval()), expected) < RIGHT, init
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(tiny()))


def test_peft_converts_dora_to_plain_lora_without_its_magnitudes_and_we_refuse(tmp_path):
    config = LoraConfig(r=R, lora_alpha=ALPHA, target_modules=TARGETS, init_lora_weights="pissa", use_dora=True)
    model = get_peft_model(tiny(), config).eval()
    model.peft_config["default"].init_lora_weights = True  # type: ignore[attr-defined]
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = "pissa"  # type: ignore[attr-defined]
    shaken(parameter for name, parameter in model.named_parameters() if "lora_" in name)
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=tmp_path / "start")
    assert apart(logits(PeftModel.from_pretrained(tiny(), tmp_path / "plain").eval()), logits(model)) > 0.05
    with pytest.raises(ValueError, match="lose DoRA's magnitudes"):
        Lora.model_validate({"init": "pissa", "use_dora": True})
