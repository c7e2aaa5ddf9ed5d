"""What a spec can ask for beside a method, an optimizer and a base: a run for each value of each option."""

from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

from lorainit.config.inits import INITS
from lorainit.config.inits.base import InitConfig

Asked = dict[str, Any]
# Of the spec's parts. What a processor or a GPU alone can do is with the cases of that device.
OF_A_RUN: dict[str, Asked] = {
    "rank-stabilized": {"lora": {"use_rslora": True}},
    "attention alone": {"lora": {"target_modules": "attention"}},
    "two matrices by name": {"lora": {"target_modules": ["q_proj", "down_proj"]}},
    "alpha": {"lora": {"alpha": 3.0}},
    "epochs": {"training": {"max_steps": None, "n_epochs": 2}},
    "a linear schedule": {"training": {"lr_scheduler": "linear", "warmup_ratio": 0.5}},
    "a constant rate": {"training": {"lr_scheduler": "constant"}},
    "weight decay": {"training": {"weight_decay": 0.1}},
    "gradients not clipped": {"training": {"max_grad_norm": None}},
    "short rows": {"training": {"max_length": 24}},
    "one row at a time": {"micro_batch_size": 1},
    "few tokens at a time": {"tokens_per_pass": 40},
    "not deterministic": {"deterministic": False},
    "DoRA and dropout, layers computed again": {
        "lora": {"use_dora": True, "dropout": 0.1},
        "training": {"gradient_checkpointing": True},
    },
}


def of_methods() -> dict[str, Asked]:
    """Every method with every value of its settings that are words or switches, but the default one."""
    return {
        f"{method}, {setting} {value}": {"lora": {"init": {"method": method, setting: value}, "r": 4}}
        for method, config in INITS.items()
        if None in config.facts.quantization
        for setting, value in _values(config)
    }


def _values(config: type[InitConfig]) -> Iterator[tuple[str, object]]:
    for name, field in config.model_fields.items():
        kinds = (field.annotation, *get_args(field.annotation))
        words = [word for kind in kinds if get_origin(kind) is Literal for word in get_args(kind)]
        switch = [True, False] if field.annotation is bool else []
        yield from ((name, value) for value in (*words, *switch) if value != field.default and name != "method")
