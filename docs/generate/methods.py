"""The tables of initializations: one row of each in the README and in docs/methods/README.md, its facts on its page."""

import json
from pathlib import Path
from typing import Any

from docs.generate.marks import table
from lorainit.config.inits import INITS, InitConfig
from lorainit.config.rates import RATES, SIZES

# Where a start lies that is not the base model; and the settings that change a method's facts.
ELSEWHERE = {
    "lora_one": "one step ahead of the base model",
    "hrp": "ahead of the base model",
    "loftq": "nearer to the full-precision model than the NF4 base",
}
VARIANTS: dict[str, dict[str, Any]] = {"lora_one": {"version": "v1"}, "hrp": {"b_init": "carry"}}

PAGE = """# {title}

`"init": "{name}"`

{description}

![Where A and B start](../pictures/methods/{name}.svg)

The picture is from one small layer ([how to read it](README.md#the-pictures)).

<!-- facts -->
<!-- /facts -->

**When to use it.** To be written.

**Cost.** To be written.

**Learning rate.** To be written.

## Parameters

{parameters}

Beside `seed`, as with every method: `null` = the job's.

## Source

To be written.

## Not verified

To be written.
"""


def default_of(name: str) -> InitConfig:
    """The method with nothing but defaults."""
    return INITS[name].model_validate({"method": name})


def overview() -> str:
    """The README's table."""
    rows = [[f"[`{name}`](docs/methods/{name}.md)", *_told(name), default_of(name).export_rank] for name in INITS]
    return table(["`lora.init`", "method", "what it does", "rank of the download"], rows)


def index() -> str:
    """The table of docs/methods/README.md."""
    rows = []
    for name, kind in INITS.items():
        default = default_of(name)
        rows.append(
            [f"[`{name}`]({name}.md)", kind.facts.description, kind.facts.needs, _start(default), default.export_rank]
        )
    return table(["method", "what it does", "looks at", "starts as", "rank of the download"], rows)


def facts(name: str) -> str:
    """What a method's own page says of it: its facts, also with the setting that changes them, and its rates."""
    kinds = [("defaults", default_of(name))]
    if name in VARIANTS:
        ((field, value),) = VARIANTS[name].items()
        kinds.append((f'`{field}: "{value}"`', INITS[name].model_validate({"method": name, **VARIANTS[name]})))
    columns = ["", "looks at", "starts as", "trained as", "rank of the download", "recommended scale", "maturity"]
    rates = [[told, *(f"{rate.value:g}" for rate in RATES[config.rates])] for told, config in kinds]
    rates = [row for number, row in enumerate(rates) if row[1:] not in [other[1:] for other in rates[:number]]]
    return "\n\n".join(
        [
            table(columns, [[told, *_facts(config)] for told, config in kinds]),
            "Default learning rate by the size of the base ([where from, and sizes in between](../rates.md)):",
            table(["", *SIZES], rates),
        ]
    )


def page(name: str) -> str:
    """A new page, with everything that the code knows and the headings of all others."""
    kind = INITS[name]
    own = {field: info for field, info in kind.model_fields.items() if field not in ("method", "seed")}
    rows = [[f"`{field}`", f"`{json.dumps(info.default)}`", "To be written."] for field, info in own.items()]
    parameters = table(["parameter", "default", "meaning"], rows) if rows else "None of its own."
    return PAGE.format(name=name, title=kind.facts.title, description=kind.facts.description, parameters=parameters)


def unfinished(pages: Path) -> list[str]:
    """The pages of methods that somebody has to write on."""
    return [f"docs/methods/{name}.md" for name in INITS if "To be written." in (pages / f"{name}.md").read_text()]


def _told(name: str) -> list[str]:
    facts = INITS[name].facts
    return [f"[{facts.title}](https://arxiv.org/abs/{facts.arxiv})" if facts.arxiv else facts.title, facts.description]


def _start(config: InitConfig) -> str:
    return "the base model" if config.function_preserving else ELSEWHERE[config.method]


def _facts(config: InitConfig) -> list[str]:
    facts = config.facts
    alpha = "alpha = r" if facts.alpha is None else f"alpha = {facts.alpha:g}"
    trained = "W + s(BA − B₀A₀)" if config.offset == "subtract" else "W + sBA"
    scale = f"{alpha}, s = alpha/{'√r' if facts.rslora else 'r'}"
    return [facts.needs, _start(config), trained, config.export_rank, scale, facts.maturity]
