"""What is measured: the experiments in the order of their importance, and the request for each.

All of them train on the same rows with the same seeds, so their cells can be compared with each other, too.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lorainit.config.inits import INITS

MODEL = "smollm2-135m-instruct"
STEPS, BATCH, RANK = 50, 4, 16
EVALUATIONS = 10  # of a run, beside the one before step 1: halving looks at 10 %, 30 % and 60 % of the steps
RATES = (1e-4, 3e-4, 1e-3, 3e-3)
SEEDS = (1, 2, 3)
LABEL = "evidence_request"  # the metadata that holds the digest of an experiment's request

Init = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Study:
    """One experiment.

    `key`: its name in files; `title`: on the page; `variant`: what a treatment's name says beside its initialization.
    `lora` and `training` are added to the job's.
    """

    key: str
    title: str
    inits: Sequence[Init]
    variant: str = ""
    lora: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    rates: Sequence[float] = RATES
    seeds: Sequence[int] = SEEDS
    extend: bool = True

    @property
    def names(self) -> list[str]:
        """A name for each initialization, with its parameters and the variant."""
        return [_name(init, self.variant) for init in self.inits]

    @property
    def planned(self) -> int:
        """How many cells its grid has before rates are added at its edges."""
        return len(self.inits) * len(self.rates) * len(self.seeds)

    def make_request(self, training_file: str, validation_file: str) -> dict[str, Any]:
        """The body of `POST /v1/experiments`; files are named by their id there, and by their digest in `digest`."""
        hyperparameters = {
            "max_steps": STEPS,
            "batch_size": BATCH,
            "eval_interval": STEPS // EVALUATIONS,
            "checkpoint_interval": STEPS // 2,
            "precision": "bf16",
            "compile": False,
            **self.training,
        }
        return {
            "name": f"evidence: {self.title}",
            "job": {
                "model": MODEL,
                "training_file": training_file,
                "validation_file": validation_file,
                "method": {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}},
                "lora": {"r": RANK, **self.lora},
                "resources": {"group": False},
            },
            "grid": {
                "init": [dict(init) for init in self.inits],
                "learning_rates": list(self.rates),
                "seeds": list(self.seeds),
            },
            "extend": self.extend,
            "max_parallel": 1,
        }


def compute_digest(request: Mapping[str, Any]) -> str:
    """The digest of a request whose files are named by their digests; the same for what asks for the same."""
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()


def _name(init: Init, variant: str) -> str:
    given = [f"{name} {value}".replace("_", " ") for name, value in init.items() if name != "method"]
    parts = [init["method"], *([f"({', '.join(given)})"] if given else []), *([f"+ {variant}"] if variant else [])]
    return " ".join(parts)


def _init(method: str, **given: Any) -> Init:
    return {"method": method, **given}


def list_unquantized() -> list[Init]:
    """Every method of the registry that works on a base in full precision."""
    return [_init(name) for name, kind in INITS.items() if None in kind.facts.quantization]


_SAME_SIZE = (3e-4, 1e-3, 3e-3)  # rates of the experiments on magnitude
_NO_CLIPPING = {"max_grad_norm": None}  # because clipping depends on the size of the factors

STUDIES = (
    Study(key="initializations", title="every initialization", inits=list_unquantized()),
    Study(
        key="rslora", title="rsLoRA", variant="rsLoRA", inits=[_init("kaiming")],
        lora={"use_rslora": True, "alpha": float(RANK)},
    ),
    Study(key="dora", title="DoRA", variant="DoRA", inits=[_init("kaiming")], lora={"use_dora": True}),
    Study(
        key="lora-plus", title="LoRA+", variant="LoRA+", inits=[_init("kaiming")],
        training={"optimizer": {"name": "adamw_lora_plus"}},
    ),
    Study(
        key="preconditioned", title="the preconditioned optimizer", variant="preconditioned",
        inits=[_init("kaiming"), _init("lora_one"), _init("pissa"), _init("lora_ga")],
        training={"optimizer": {"name": "adamw_preconditioned"}},
    ),
    Study(
        key="four-bits", title="a base in four bits", variant="nf4", inits=[_init("kaiming"), _init("loftq")],
        lora={"quantization": "nf4"},
    ),
    Study(
        key="loram-bases", title="other bases for LoRAM",
        inits=[_init("loram", basis="random_orthogonal"), _init("loram", basis="gaussian")],
    ),
    Study(
        key="hrp-ranks", title="lower preheating ranks for HRP",
        inits=[_init("hrp", preheat_rank=RANK), _init("hrp", preheat_rank=2 * RANK)],
    ),
    Study(
        key="magnitude", title="orthogonal without clipping", variant="no clipping", inits=[_init("orthogonal")],
        lora={"alpha": float(RANK)}, training=_NO_CLIPPING, rates=_SAME_SIZE, extend=False,
    ),
    # Factors half as large, a scale four times as large, half the rate: every update of s·B·A is as large as before.
    Study(
        key="magnitude-equal", title="the same magnitude by other factors, alpha and rates",
        variant="no clipping, alpha x 4, rates / 2", inits=[_init("orthogonal", divisor=20.0)],
        lora={"alpha": 4.0 * RANK}, training=_NO_CLIPPING,
        rates=tuple(rate / 2 for rate in _SAME_SIZE), extend=False,
    ),
    # The same smaller factors and nothing else changed, so its updates are smaller: does that show?
    Study(
        key="magnitude-unequal", title="a smaller magnitude by smaller factors alone", variant="no clipping",
        inits=[_init("orthogonal", divisor=20.0)], lora={"alpha": float(RANK)}, training=_NO_CLIPPING,
        rates=_SAME_SIZE, extend=False,
    ),
)  # fmt: skip
