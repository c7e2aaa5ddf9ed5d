"""Facts of a base model that requests are checked against: which of its layers can carry a LoRA, and which cannot.

`lorainit.model.inspect` collects them once and a catalogue stores them, so that a request is checked without opening
the model (`lorainit.config.target_modules`). Loads no torch.
"""

from typing import Annotated, Literal

from pydantic import Field

from lorainit.config.inits import Quantization
from lorainit.config.paths import count_matches, count_names
from lorainit.config.schema import Strict

NF4_BLOCK = 64  # weights that share a scale in an NF4 base; a block must not extend into the next row

Group = Literal["attention", "mlp", "other"]
MAX_SIDE = 10**9  # far above any real side of a matrix: the largest vocabulary has about 3e5 entries
Side = Annotated[int, Field(ge=1, le=MAX_SIDE)]


class Target(Strict):
    """One kind of linear layer of a base that can carry a LoRA, with matrices of one shape (out x in).

    `name` is the shortest end of the layers' full names that covers these layers and no others of the model, with `*`
    for a number: `q_proj`, `mlp.c_proj`, `language_model.layers.*.mlp.up_proj`. Layers of one name but several shapes
    have an entry for each shape. `count`: how many layers; `group`: the group of `target_modules` that they belong to.
    `dora`: whether PEFT can put a DoRA there; it cannot if it adapts a parameter instead of a module. `experts`: each
    matrix belongs to one expert of a mixture. `paths`: the full names, folded (`lorainit.config.paths`); for experts
    the names of their common parameters. Catalogue entries of older versions have no paths.
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
        """How many of these layers a caller's name covers: those whose full names end in it."""
        if self.name == given or self.name.endswith(f".{given}"):
            return self.count
        held = sum(map(count_names, self.paths))
        return self.count * sum(count_matches(path, given) for path in self.paths) // held if held else 0


class LeftOut(Target):
    """A kind of layer that gets no LoRA. `reason` completes a sentence that begins with the layer's name."""

    reason: Annotated[str, Field(max_length=1024)]


class ModelFacts(Strict):
    """Everything that a request is checked against (`lorainit.model.inspect` collects it).

    `source` and `root` are as in `lorainit.config.sources`. `left_out` is empty in catalogue entries of older versions.
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
        """The values that `lora.quantization` may have: NF4 if every row of every target is a multiple of a block.

        Only targets count here. Experts of a mixture are never quantized, and layers without a LoRA that do not fit
        stay in full precision (`lorainit.model.targets.four_bits`).
        """
        whole = all(target.in_features % NF4_BLOCK == 0 for target in self.targets if not target.experts)
        return ["nf4"] if whole else []
