"""Checks the files of a model folder, because their sizes and shapes may be wrong on purpose.

After the checks, the folder has only plain files, JSON of limited size and depth, and safetensors files whose headers
describe exactly the bytes that follow. Nothing here loads a weight or calls transformers.
"""

import json
import math
import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorainit.config.errors import UnsupportedModel
from lorainit.config.model_facts import MAX_SIDE
from lorainit.model.source.tokenizer_files import TEMPLATES
from lorainit.system.host_failure import is_host_failure

# The largest files of their kind seen on the hub are tokenizer.json of 35 MB and an index of 15 MB.
MAX_TEXT_BYTES = 256 << 20
MAX_CONFIG_BYTES = 16 << 20
MAX_ENTRIES = 10_000  # the folder of a base of 1.5 TB has some 300 files
MAX_HEADER_BYTES = 100_000_000  # the format's own bound
MAX_LAYERS = 2_000  # the deepest model of transformers 5 has 126
MAX_COUNT = 100_000  # heads, experts and other parts that are built one by one
MAX_DIMENSIONS = 16
# Lengths that a job's `max_length` is checked against; the longest context of transformers 5 has 10,485,760 tokens.
_CONTEXTS = ("max_position_embeddings", "n_positions")
# The smallest allowed values of numbers that every kind of model uses.
_LEAST = dict.fromkeys(
    (
        "hidden_size", "n_embd", "d_model", "vocab_size", "num_hidden_layers", "num_layers", "n_layer", "n_layers",
        "num_attention_heads", "num_heads", "n_head", "n_heads", "num_key_value_heads",
        "n_groups", "conv_kernel",
    ),
    1,
) | {"intermediate_size": 0, "head_dim": 0}  # fmt: skip
# Entries of rotary positions that must be above zero, because the code divides by them or raises them to a power.
_ABOVE_ZERO = (
    "rope_theta", "factor", "low_freq_factor", "high_freq_factor", "short_factor", "long_factor",
    "original_max_position_embeddings",
)  # fmt: skip

_BITS = {
    "F64": 64, "I64": 64, "U64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16, "I16": 16, "U16": 16,
    "I8": 8, "U8": 8, "BOOL": 8, "C64": 64,
}  # fmt: skip
# Formats of quantized weights. They are refused, because they mean nothing without separate scales.
_QUANTIZED = ("F8_", "F6_", "F4", "E8M0")


@dataclass(frozen=True)
class Stored:
    """One tensor of a safetensors file, as its header describes it."""

    dtype: str
    shape: tuple[int, ...]
    file: str


def check_folder(folder: Path) -> dict[str, Any]:
    """Refuse a folder that is unsafe to load; return its config.

    Raises:
        UnsupportedModel: an entry is not a plain file, is too large, or has another content than its name says.
    """
    for entry in _entries(folder):
        _check_entry(entry)
        if entry.name == TEMPLATES and entry.is_dir():
            for template in _entries(entry):
                _check_entry(template)
    if (folder / "adapter_config.json").exists():
        # Refused, because transformers would load the base model that this file names, from anywhere.
        raise _refusal(f"{folder.name} is a PEFT adapter, not a base model.")
    config = read_object(folder / "config.json", MAX_CONFIG_BYTES)
    check_config(config)
    _check_generation_config(folder / "generation_config.json")
    return config


def _check_generation_config(path: Path) -> None:
    """Refuse a file with JSON that is no object, because transformers crashes on it. It ignores a file without JSON."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        if is_host_failure(error):
            raise
        return
    if not isinstance(value, dict):
        raise _refusal(f"{path.name} is not a JSON object.")


def _entries(folder: Path) -> Iterator[Path]:
    try:
        for count, entry in enumerate(folder.iterdir()):
            if count == MAX_ENTRIES:
                raise _refusal(f"{folder.name} holds more than {MAX_ENTRIES} files.")
            yield entry
    except OSError as error:
        raise _unreadable(folder, error) from error


def _check_entry(entry: Path) -> None:
    try:
        facts = entry.stat()
    except OSError as error:
        if entry.is_symlink() and isinstance(error, FileNotFoundError):
            return  # a link without a target, left by a partial download; an error follows only if the file is needed
        raise _unreadable(entry, error) from error
    if stat.S_ISDIR(facts.st_mode):
        return
    if not stat.S_ISREG(facts.st_mode):
        raise _refusal(f"{entry.name} is not a plain file.")  # because reading a pipe could block for ever
    if entry.suffix in (".json", ".jinja", ".txt", ".model") and facts.st_size > MAX_TEXT_BYTES:
        raise _refusal(f"{entry.name} has {facts.st_size} bytes, more than the {MAX_TEXT_BYTES} we would read.")


# --- JSON ----------------------------------------------------------------------------------------


def read_object(path: Path, limit: int) -> dict[str, Any]:
    """The JSON object in a file of at most `limit` bytes.

    Raises:
        UnsupportedModel: it is larger, no JSON, nested too deep, or something else than an object.
    """
    try:
        with path.open("rb") as stream:
            content = stream.read(limit + 1)
    except OSError as error:
        raise _unreadable(path, error) from error
    if len(content) > limit:
        raise _refusal(f"{path.name} has more than the {limit} bytes we would read.")
    return _object(content, path.name)


def _object(content: bytes, name: str) -> dict[str, Any]:
    try:
        value = json.loads(content.decode("utf-8"), parse_constant=_constant)
    except RecursionError as error:
        raise _refusal(f"{name} is nested too deep.") from error
    except ValueError as error:
        raise _refusal(f"{name} is not JSON: {str(error)[:200]}.") from error
    if not isinstance(value, dict):
        raise _refusal(f"{name} is not a JSON object.")
    return value


def _constant(text: str) -> float:
    if text == "NaN":
        raise ValueError("NaN is not a number to configure a model with")
    return float(text)  # Infinity is allowed, because Mamba's configurations have it


def check_config(config: dict[str, Any]) -> None:
    """Refuse numbers that would build a model of absurd size, in a config or any part of it.

    Raises:
        UnsupportedModel: with the name of the number.
    """
    for name, value in _numbers(config):
        limit = _limit(name)
        if name in _CONTEXTS and not 1 <= value <= limit:
            raise _refusal(f"config.json says {name} = {_digits(value)}, and a context has 1 to {limit} tokens.")
        if "token" not in name and limit < abs(value) < math.inf and "max" not in name:
            raise _refusal(f"config.json says {name} = {_digits(value)}, and {limit} is the most we would believe.")
    _check_parts(config)
    if config.get("return_dict") is False:
        raise _refusal("config.json says return_dict = false, and outputs are read by their names: remove it.")
    if config.get("layerdrop"):
        probability = str(config["layerdrop"])[:20]
        text = f"config.json says layerdrop = {probability}: a step would skip layers at random. Set it to 0."
        raise _refusal(text)
    if not isinstance(config.get("model_type"), str):
        raise _refusal("config.json does not say which model_type it is.")
    if "transformers_weights" in config:
        raise _refusal("config.json names a file of weights of its own (transformers_weights), which is not read.")


def _check_parts(config: dict[str, Any]) -> None:
    """Refuse numbers that transformers would only report as a division by zero or as a tensor of negative size."""
    for name, value in config.items():
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, dict):
                _check_parts(one)
            elif one is None:
                continue  # transformers then uses its default
            elif name in _LEAST and (type(one) is not int or one < _LEAST[name]):
                raise _refusal(f"config.json says {name} = {_digits(one)}, and it is a number from {_LEAST[name]} on.")
            elif name in _ABOVE_ZERO and not (type(one) in (int, float) and 0 < one < math.inf):
                raise _refusal(f"config.json says {name} = {_digits(one)}, and it is a number above 0.")
    heads, shared = config.get("num_attention_heads"), config.get("num_key_value_heads")
    if isinstance(heads, int) and isinstance(shared, int) and heads % shared:
        many = f"num_attention_heads = {heads} and num_key_value_heads = {shared}"
        raise _refusal(f"config.json says {many}, and the first is a multiple of the second.")


def _digits(value: Any) -> str:
    return text if len(text := repr(value)) <= 40 else f"{text[:40]}…"


def _limit(name: str) -> int:
    if "num_" in name or name.startswith("n_") or name.endswith("layers"):
        return MAX_LAYERS if "layer" in name else MAX_COUNT
    return MAX_SIDE


def _numbers(value: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """All numbers of a config with the name of their entry; numbers in a list have the list's name."""
    for name, item in value.items():
        for one in item if isinstance(item, list) else [item]:
            if isinstance(one, dict):
                yield from _numbers(one)
            elif isinstance(one, int | float) and not isinstance(one, bool):
                yield name, one


# --- weights -------------------------------------------------------------------------------------


def list_stored_weights(folder: Path) -> dict[str, Stored]:
    """All tensors of the files that transformers would load, by name, from the files' headers alone.

    Raises:
        UnsupportedModel: a file is missing, broken or outside of the folder, or its weights are quantized.
    """
    found: dict[str, Stored] = {}
    for file in _weight_files(folder):
        for name, stored in read_header(file).items():
            if name in found:
                raise _refusal(f"{name} is in two files, {found[name].file} and {file.name}.")
            found[name] = stored
    for name, stored in found.items():
        if stored.dtype.startswith(_QUANTIZED):
            raise _refusal(f"{name} is quantized ({stored.dtype}): use the model's full-precision weights.")
    return found


def _weight_files(folder: Path) -> list[Path]:
    """`model.safetensors` alone, or the files of the index."""
    if shards := [file.name for file in folder.glob("shard-*.safetensors")]:
        raise _refusal(f"{shards[0]} belongs to a distributed checkpoint: save the model as a whole first.")
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        return [single]
    if not index.exists():
        raise _refusal(f"{folder.name} has neither model.safetensors nor an index of several files.")
    content = read_object(index, MAX_TEXT_BYTES)
    if not isinstance(content.get("metadata"), dict):
        raise _refusal(f'{index.name} has no "metadata" object, and transformers opens none without: add an empty one.')
    names = content.get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise _refusal(f"{index.name} has no weight_map from weights to files.")
    files = [folder / name for name in sorted(set(names.values()))]
    for file in files:
        if file.parent != folder or file.name in (".", ".."):
            raise _refusal(f"{index.name} names {str(file)[:200]!r}, which is not a file of this folder.")
        if not file.exists():
            raise _refusal(f"{index.name} names {file.name}, which is not there.")
    for file in files:
        held = set(read_header(file))
        if lost := [name for name, where in names.items() if where == file.name and name not in held]:
            raise _refusal(f"{file.name} lacks {list_first(lost)}, which {index.name} promises.")
    return files


def read_header(file: Path) -> dict[str, Stored]:
    """The tensors that a safetensors file describes, after a check that they fill it exactly, without gaps or overlaps.

    Raises:
        UnsupportedModel: otherwise.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
        if not 0 <= length <= min(MAX_HEADER_BYTES, size - 8):
            raise _broken(file, "its header is longer than the file" if length >= 0 else "it has no header")
        content = stream.read(length)
    header = _object(content, f"the header of {file.name}")
    header.pop("__metadata__", None)
    data, end = size - 8 - length, 0
    spans = {name: _span(file, name, entry) for name, entry in header.items()}
    for name, (begin, stop) in sorted(spans.items(), key=lambda item: item[1]):
        if begin != end:
            raise _broken(file, f"{_short(name)} does not begin where the tensor before it ends")
        end = stop
    if end != data:
        raise _broken(file, f"its header describes {end} bytes of weights, and {data} are there")
    return {name: Stored(entry["dtype"], tuple(entry["shape"]), file.name) for name, entry in header.items()}


def _span(file: Path, name: str, entry: Any) -> tuple[int, int]:
    """First and last byte + 1 of a tensor, checked against its shape and type."""
    try:
        dtype, shape, (begin, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
        whole = isinstance(shape, list) and len(shape) <= MAX_DIMENSIONS
        whole = whole and all(type(n) is int and 0 <= n < 1 << 63 for n in (*shape, begin, stop))
        bits = 4 if str(dtype).startswith("F4") else 8 if str(dtype).startswith(_QUANTIZED) else _BITS[dtype]
    except (KeyError, TypeError, ValueError) as error:
        raise _broken(file, f"the entry of {_short(name)} makes no sense") from error
    if not whole or stop - begin != -(-math.prod(shape) * bits // 8):
        raise _broken(file, f"the entry of {_short(name)} makes no sense")
    return begin, stop


def list_first(names: list[str], most: int = 5) -> str:
    """Names for a message: the first few, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(_short, sorted(names)[:most])) + more


def _short(name: str) -> str:
    return name if len(name) <= 120 else f"{name[:120]}…"


def _broken(file: Path, why: str) -> UnsupportedModel:
    return _refusal(f"{file.name} is not a whole safetensors file: {why}.")


def _unreadable(path: Path, error: OSError) -> Exception:
    """A refusal of the file, or the error itself where the host is to blame."""
    return error if is_host_failure(error) else _refusal(f"{path.name} cannot be read: {error.strerror}.")


def _refusal(message: str) -> UnsupportedModel:
    return UnsupportedModel(message, param="model")
