"""Log-probabilities by llama.cpp. JSON on stdin: base, adapters (name to path), ids, out (a JSON file).

Of each next token of `ids`, after all tokens before it, by the base ("base") and by it with each adapter.
"""

import json
import sys
from pathlib import Path

import xllamacpp

asked = json.load(sys.stdin)
LETTER = 67  # "a"
names = list(asked["adapters"])
params = xllamacpp.CommonParams()
params.model.path = asked["base"]
params.n_ctx, params.n_parallel, params.warmup, params.fit_params = 256, 1, False, False
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
# What the base and the adapter are, without the rounding of a small cache.
params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
params.port = 0  # it serves HTTP too; any free port
params.lora_init_without_apply = True
params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(asked["adapters"][name], 1.0) for name in names]
server = xllamacpp.Server(params)


def logprob(prompt: list[int], token: int, chosen: str) -> float:
    lora = [{"id": i, "scale": float(name == chosen)} for i, name in enumerate(names)]
    # The probabilities told are the model's own, whatever is sampled; but a token that is no whole character, or the
    # end of the text, comes without them.
    sampled = {"n_predict": 1, "temperature": 0.0, "logit_bias": [[LETTER, 1000.0]], "cache_prompt": False}
    told = server.handle_completions({"prompt": prompt, "n_probs": asked["vocabulary"], "lora": lora, **sampled})
    told = json.loads(told) if isinstance(told, str) else told
    top = told["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    return {entry["id"]: entry["logprob"] for entry in top}[token]


ids = asked["ids"]
found = {one: [logprob(ids[:i], ids[i], one) for i in range(1, len(ids))] for one in ["base", *names]}
Path(asked["out"]).write_text(json.dumps(found))
