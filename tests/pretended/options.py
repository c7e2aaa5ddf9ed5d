"""What a spec can ask for beside a method, an optimizer and a base: a run for each option."""

from typing import Any

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
