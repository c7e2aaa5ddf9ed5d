"""The tables of initializations: one row of each in the README and in docs/methods/README.md, its facts on its page."""

import json
import re
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo

from docs.generate.marks import table
from lorainit.config.inits import INITS, InitConfig
from lorainit.config.rates import SIZES, find_rates

# Where a start lies that is not the base model; and the settings that change a method's facts.
ELSEWHERE = {
    "lora_one": "one step ahead of the base model",
    "hrp": "ahead of the base model",
    "loftq": "nearer to the full-precision model than the NF4 base",
}
VARIANTS: dict[str, dict[str, Any]] = {"lora_one": {"version": "v1"}, "hrp": {"b_init": "carry"}}

NO_PARAMETERS = "This method has no parameters of its own."

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

Every method has `seed`, too: `null` = the job's.

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
        kinds.append((_setting(VARIANTS[name]), INITS[name].model_validate({"method": name, **VARIANTS[name]})))
    columns = ["", "looks at", "starts as", "trained as", "rank of the download", "recommended scale", "maturity"]
    rates = [[told, *(f"{rate.value:g}" for rate in find_rates(config))] for told, config in kinds]
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
    fields = _own_parameters(name).items()
    rows = [[f"`{field}`", f"`{json.dumps(info.default)}`", "To be written."] for field, info in fields]
    parameters = table(["parameter", "default", "meaning"], rows) if rows else NO_PARAMETERS
    return PAGE.format(name=name, title=kind.facts.title, description=kind.facts.description, parameters=parameters)


def dora() -> str:
    """Which methods take DoRA, and with which settings one of them does not."""
    return f"These take DoRA: {', '.join(_with_dora(name) for name in INITS if default_of(name).supports_dora)}."


def _with_dora(name: str) -> str:
    variant = VARIANTS.get(name, {})
    if INITS[name].model_validate({"method": name, **variant}).supports_dora:
        return f"`{name}`"
    return f"`{name}` (not with {_setting(variant)})"


def find_unwritten(pages: Path) -> list[str]:
    """What somebody has to write by hand on the pages of methods, a sentence each."""
    return [sentence for name in INITS for sentence in _unwritten(name, (pages / f"{name}.md").read_text())]


def _unwritten(name: str, page: str) -> list[str]:
    path, fields = f"docs/methods/{name}.md", _own_parameters(name)
    rows = re.findall(r"^\| `(\w+)` \| `.*?` \| .+ \|$", page, re.MULTILINE)
    found = [f"{path} says 'To be written.': write it."] if "To be written." in page else []
    found += [
        f"{path} has no row for `{field}` under Parameters: write"
        f" | `{field}` | `{json.dumps(info.default)}` | and what it means |."
        for field, info in fields.items()
        if field not in rows
    ]
    gone = [row for row in rows if row not in fields]
    return found + [f"{path} has a row for `{row}`, which is no parameter of {name}: remove it." for row in gone]


def _own_parameters(name: str) -> dict[str, FieldInfo]:
    return {field: info for field, info in INITS[name].model_fields.items() if field not in ("method", "seed")}


def _setting(variant: dict[str, Any]) -> str:
    ((field, value),) = variant.items()
    return f'`{field}: "{value}"`'


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
