"""What is known of a base model without opening it: which kinds of its layers can carry a LoRA, and which cannot.

Torch-free. `lorainit.model.inspect` finds these facts out, a catalogue keeps them, and `lorainit.config.target_modules`
decides with them. Knows nothing of jobs or of the service.
"""

from typing import Annotated, Literal

from pydantic import Field

from lorainit.config.inits import Quantization
from lorainit.config.paths import count_matches, count_names
from lorainit.config.schema import Strict

NF4_BLOCK = 64  # weights that share a scale in an NF4 base; no block runs over the end of a row

Group = Literal["attention", "mlp", "other"]
MAX_SIDE = 10**9  # of one side of a weight; the largest vocabulary has some 3e5 entries
Side = Annotated[int, Field(ge=1, le=MAX_SIDE)]


class Target(Strict):
    """One kind of linear layer of a base that can carry a LoRA: its name, its place and its matrix, out x in.

    `name` is the shortest end of the layers' full names that means these layers and no others of the model, with `*`
    for a number: `q_proj`, `mlp.c_proj`, `language_model.layers.*.mlp.up_proj`. Layers of one name may have several
    shapes, and then an entry each. `count` = how many layers; `group` is what `target_modules` can ask for. `dora`:
    whether PEFT can put a DoRA there, which it cannot where it adapts a parameter. `experts`: each of them is the
    matrix of one expert of a mixture. `paths`: the full names, folded (`lorainit.config.paths`), of experts those of
    their common parameters; none in catalogue entries that an older version wrote.
    """

    name: Annotated[str, Field(min_length=1, max_length=256)]
    group: Group
    out_features: Side
    in_features: Side
    count: Annotated[int, Field(ge=1, le=MAX_SIDE)]
    dora: bool = True
    experts: bool = False
    paths: list[Annotated[str, Field(max_length=1024)]] = Field(default_factory=list, max_length=512, fail_fast=True)

    @property
    def smaller_side(self) -> int:
        """The largest rank that a matrix of this shape can have."""
        return min(self.out_features, self.in_features)

    @property
    def weights(self) -> int:
        """How many numbers these matrices hold together."""
        return self.out_features * self.in_features * self.count

    def count_matches(self, given: str) -> int:
        """How many of these layers a name that a caller gave means: it is an end of their full names."""
        if self.name == given or self.name.endswith(f".{given}"):
            return self.count
        held = sum(map(count_names, self.paths))
        return self.count * sum(count_matches(path, given) for path in self.paths) // held if held else 0


class LeftOut(Target):
    """A kind of layer that gets no LoRA, and why, as the end of a sentence that begins with its name."""

    reason: Annotated[str, Field(max_length=1024)]


class ModelFacts(Strict):
    """What a request can be checked against without opening the model (`lorainit.model.inspect`).

    `source` and `root` are as in `lorainit.config.sources`. `left_out` is empty in catalogue entries that an older
    version wrote.
    """

    root: str
    source: str
    max_length: Annotated[int, Field(ge=8)]
    chat: bool
    base_sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    targets: Annotated[list[Target], Field(min_length=1)]
    left_out: list[LeftOut] = Field(default_factory=list)

    @property
    def quantization(self) -> list[Quantization]:
        """What `lora.quantization` can be: NF4 where every row of what can carry a LoRA is whole blocks.

        Experts of a mixture are not quantized, and other layers only where they can be
        (`lorainit.model.targets.four_bits`).
        """
        whole = all(target.in_features % NF4_BLOCK == 0 for target in self.targets if not target.experts)
        return ["nf4"] if whole else []
