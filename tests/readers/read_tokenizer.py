"""What the transformers that is installed here makes of tokenizers. JSON on stdin: folders, texts, messages."""

import json
import sys

import transformers
from transformers import AutoTokenizer


def read(asked):
    """Ids, texts, special tokens and a chat of each tokenizer."""
    found = {}
    for name, folder in asked["folders"].items():
        tokenizer = AutoTokenizer.from_pretrained(folder)
        ids = [tokenizer(text).input_ids for text in asked["texts"]]
        found[name] = {
            "ids": ids,
            "texts": [tokenizer.decode(row) for row in ids],
            "special": [tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token],
            "chat": tokenizer.apply_chat_template(asked["messages"], tokenize=False, add_generation_prompt=True),
        }
    return {"version": transformers.__version__, "found": found}


if __name__ == "__main__":
    print(json.dumps(read(json.load(sys.stdin))))
