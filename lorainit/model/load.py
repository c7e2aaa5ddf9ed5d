"""Finds a base model and loads its tokenizer and its weights.

Weights are read from safetensors only, never from pickles, because loading a pickle can run code. Code of a model
repository is never run either.
"""

import hashlib
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorainit.config.errors import SequenceTooLong, UnsupportedModel
from lorainit.config.inits import Quantization
from lorainit.data.chat import tokenizer_time
from lorainit.model.forward.positions import forget_lengths
from lorainit.model.layers.quantize import loading_options, settle
from lorainit.model.source import tokenizer_files
from lorainit.model.source.completeness import collect_logs, require_nothing_left
from lorainit.model.source.digest import write_digest
from lorainit.model.source.examine import build, read_config, require_language_model
from lorainit.model.source.files import check_folder, list_stored_weights
from lorainit.model.source.find import find
from lorainit.model.source.gguf_header import check_header
from lorainit.model.targets.four_bits import choose_four_bits
from lorainit.runtime.refusal import as_unsupported

# The version of the conversion. It is part of the folder's name, so that old conversions are not used after a change.
CONVERTER = 3
# A text that each tokenizer must read, because some load and then crash at the first word, at an unknown letter, or
# between two words.
_SAMPLE = "a b ab A1234 \u00e9 \u6f22\u5b57 \U0001f642\n\n\t  <x>"


@dataclass(frozen=True)
class Location:
    """A folder with safetensors and a tokenizer, and the context length that its config.json names (or None)."""

    folder: Path
    max_length: int | None


# --- sources -----------------------------------------------------------------------------------


def locate_base(source: str, *, cache: Path, path: Path | None = None) -> Location:
    """Find a base model and, if it is a GGUF file, convert it once into a folder under `cache`.

    Args:
        source: as `lorainit.config.sources` says.
        path: the result of `find`, if it was called already.

    Raises:
        UnsupportedModel: nothing is there, or it cannot be loaded safely.
    """
    path = path or find(source).path
    folder = path if path.is_dir() else _converted(path, cache)
    if not (folder / "config.json").is_file():
        raise UnsupportedModel(f"{source!r} has no config.json: it is not a transformers model folder.", param="model")
    if not list(folder.glob("*.safetensors")):
        pickles = [p.name for suffix in ("*.bin", "*.pt", "*.pth") for p in folder.glob(suffix)]
        why = f"only {pickles[0]}, and pickles are never loaded" if pickles else "no weights"
        raise UnsupportedModel(f"{source!r} has no safetensors ({why}): convert it first.", param="model")
    return Location(folder, _context_length(check_folder(folder)))


def _converted(path: Path, cache: Path) -> Path:
    """The safetensors folder of a GGUF file, converted once.

    The conversion is written elsewhere and renamed when it is complete, so that several workers can do it at once.
    """
    if path.suffix != ".gguf" or not path.is_file():
        raise UnsupportedModel(f"{path} is neither a folder nor a .gguf file.", param="model")
    check_header(path)
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    folder = cache / f"{path.stem}-{digest[:16]}-{CONVERTER}"
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=".converting-", dir=cache))
    try:
        _convert(path, work)
        try:
            work.rename(folder)
        except OSError:
            if not folder.is_dir():  # otherwise another worker was faster, and its folder is used
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return folder


def _convert(path: Path, out: Path) -> None:
    with as_unsupported(f"{path.name} cannot be read as GGUF"), collect_logs():
        # `trust_remote_code=False` is needed here too, because files beside the GGUF file may name code.
        tokenizer = AutoTokenizer.from_pretrained(
            path.parent, gguf_file=path.name, trust_remote_code=False, local_files_only=True
        )
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path.parent,
            gguf_file=path.name,
            dtype=torch.float32,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
        )
        model, report = loaded
        require_nothing_left(report)
    # save_pretrained refuses a model that is marked as quantized. The tensors are not quantized any more, so the marks
    # are removed.
    del model.config.quantization_config
    for trace in ("hf_quantizer", "is_quantized", "quantization_method"):
        vars(model).pop(trace, None)
    _restore_exact_floats(model.config)
    tokenizer.model_max_length = model.config.max_position_embeddings  # because loading from GGUF leaves 1e30
    model.save_pretrained(out)
    tokenizer_files.write(tokenizer, out)
    write_digest(out)


def _restore_exact_floats(config: Any) -> None:
    """Round to six digits, because GGUF stores 1e-5 as float32, which reads back as 9.999999747e-06."""
    epsilon = getattr(config, "rms_norm_eps", None)
    if epsilon is not None:
        config.rms_norm_eps = float(f"{epsilon:.6g}")


MAX_STRETCH = 1024


def _context_length(config: dict[str, Any]) -> int | None:
    text = config.get("text_config")
    text = text if isinstance(text, dict) else config
    value = text.get("max_position_embeddings") or text.get("n_positions")
    if not isinstance(value, int):
        return None
    # With dynamic NTK the entry is the length before stretching, and the factor gives the real one. The entry itself
    # cannot be raised in config.json, because that would change the frequencies.
    rope = text.get("rope_scaling") or text.get("rope_parameters")
    rope = rope if isinstance(rope, dict) else {}
    factor = rope.get("factor") if "dynamic" in (rope.get("type"), rope.get("rope_type")) else None
    return int(value * factor) if isinstance(factor, int | float) and 1 <= factor <= MAX_STRETCH else value


def check_length(location: Location, max_length: int) -> None:
    """Raise `SequenceTooLong` if `max_length` is above the model's context length."""
    if location.max_length and max_length > location.max_length:
        raise SequenceTooLong(
            f"max_length {max_length} is above the {location.max_length} tokens that the base model's config.json"
            " allows (max_position_embeddings, with dynamic NTK times its factor).",
            param="training.max_length",
        )


# --- loading -----------------------------------------------------------------------------------


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a base. Only fast ones are accepted, because loss masks need character offsets."""
    if not tokenizer_files.find_tokenizer_files(folder):
        raise UnsupportedModel("The base model has no tokenizer.", param="model")
    try:
        with as_unsupported("The base model's tokenizer cannot be loaded"):
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except UnsupportedModel as error:
        if "contains custom code" not in error.message:
            raise
        text = "The base model's tokenizer is code of its own (auto_map in tokenizer_config.json), which is never run."
        raise UnsupportedModel(text, param="model") from error
    if not tokenizer.is_fast:
        raise UnsupportedModel("The base model has no fast tokenizer (tokenizer.json).", param="model")
    tokenizer_time.read(tokenizer, _SAMPLE)
    tokenizer_time.require_quick(tokenizer)
    return tokenizer


def load_model(
    folder: Path,
    *,
    dtype: torch.dtype | Literal["auto"],
    device: torch.device,
    quantization: Quantization | None = None,
    kind: Any = AutoModelForCausalLM,
) -> nn.Module:
    """The base model in evaluation mode with every parameter frozen.

    Args:
        dtype: "auto" = as stored; the weights then stay mapped from the files until they are used.
        kind: the model's class; by default the configuration decides.
        quantization: the format of its linear layers (`lorainit.model.targets.four_bits`); None = `dtype`.

    Raises:
        UnsupportedModel: it is no causal language model of this transformers version, its files are quantized or
            incomplete, or it cannot be quantized as asked.
        InitFailed: quantized weights cannot be read back on this machine.
    """
    options: dict[str, Any] = {}
    if quantization is not None:
        assert dtype != "auto"
        options = loading_options(dtype=dtype, device=device, skip=choose_four_bits(build_skeleton(folder)).skip)
    config = read_config(folder)
    require_language_model(config)
    with as_unsupported("The base model cannot be loaded"), collect_logs():
        loaded: Any = kind.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
            **options,
        )
    model, report = loaded
    require_nothing_left(report, list_stored_weights(folder))
    if kind is AutoModelForCausalLM:  # a sharded model has another class, and its parts are on their devices already
        model.to(device)
    model.requires_grad_(requires_grad=False).eval()
    if quantization is not None:
        settle(model)
    model.config.use_cache = False
    forget_lengths(model)
    return cast(nn.Module, model)


def free_model(model: nn.Module) -> None:
    """Free a model's weights now; the model cannot be used any more.

    Modules that refer to each other, such as PEFT's, stay in memory until a garbage collection, so the next base would
    have to fit beside them. A collection instead would take a second each time, because transformers has so many
    objects.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if not hasattr(tensor, "full_tensor"):  # parts of a sharded weight are freed with the model
            tensor.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)


def build_skeleton(folder: Path) -> nn.Module:
    """The model's modules without any weights (on the meta device)."""
    return build(read_config(folder))
