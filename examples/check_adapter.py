"""Loads an adapter with stock PEFT on its untouched base, and shows what it changed.

    python examples/check_adapter.py ADAPTER --base MODEL --validation ROWS.jsonl

Needs torch, transformers and peft; nothing of Lorainit, on purpose: this is what anybody does who
got the adapter from somebody else. MODEL is a folder, a hub id or a .gguf file. Prints the loss per
trained token on the held-out rows and one completion, before and after; `--json` writes them, too.
"""

import argparse
import json
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

BATCH = 8


def load_base(name: str) -> PreTrainedModel:
    """The base model in float32."""
    if not name.endswith(".gguf"):
        return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    file = Path(name)
    return AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)


def encode(tokenizer: PreTrainedTokenizerBase, messages: list[dict]) -> tuple[list[int], list[int]]:
    """Token ids of a conversation, and labels that look at its last answer only."""
    prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    text = tokenizer.apply_chat_template(messages, tokenize=False).rstrip("\n")
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    labels = [
        token if start >= len(prompt) else -100
        for token, (start, _) in zip(encoded.input_ids, encoded.offset_mapping, strict=True)
    ]
    return encoded.input_ids, labels


@torch.no_grad()
def held_out_loss(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, rows: list[list[dict]]) -> float:
    """Nats per trained token over all rows."""
    total, count = 0.0, 0
    encoded = sorted((encode(tokenizer, row) for row in rows), key=lambda pair: len(pair[0]))
    for first in range(0, len(encoded), BATCH):
        batch = encoded[first : first + BATCH]
        length = max(len(ids) for ids, _ in batch)
        ids = torch.tensor([ids + [0] * (length - len(ids)) for ids, _ in batch])
        mask = torch.tensor([[1] * len(ids) + [0] * (length - len(ids)) for ids, _ in batch])
        labels = torch.tensor([labels + [-100] * (length - len(labels)) for _, labels in batch])
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
        total += loss.item()
        count += int((labels[:, 1:] != -100).sum())
    return total / count


@torch.no_grad()
def complete(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, messages: list[dict]) -> str:
    """The most likely answer, up to 48 tokens."""
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    answer = model.generate(**prompt, max_new_tokens=48, do_sample=False, eos_token_id=end, pad_token_id=end)
    return tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", type=Path)
    parser.add_argument("--base", required=True)
    parser.add_argument("--validation", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    rows = [json.loads(line)["messages"] for line in arguments.validation.read_text("utf-8").splitlines() if line]
    tokenizer = AutoTokenizer.from_pretrained(arguments.adapter)
    model = load_base(arguments.base).eval()
    asked, wanted = rows[0][:-1], rows[0][-1]["content"]
    found = {"prompt": asked[-1]["content"], "wanted": wanted}
    found["before"] = {
        "loss": held_out_loss(model, tokenizer, rows),
        "completion": complete(model, tokenizer, asked),
    }
    tuned = PeftModel.from_pretrained(model, arguments.adapter).eval()
    found["after"] = {
        "loss": held_out_loss(tuned, tokenizer, rows),
        "completion": complete(tuned, tokenizer, asked),
    }
    print(f"held-out loss  {found['before']['loss']:.4f} -> {found['after']['loss']:.4f}  ({len(rows)} rows)")
    print(f"prompt         {found['prompt']}\nbefore         {found['before']['completion']}")
    print(f"after          {found['after']['completion']}\nwanted         {wanted}")
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
