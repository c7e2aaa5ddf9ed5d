"""Dense transformers, each with what makes it different from Llama."""

from typing import Any

from tests.zoo.kind import COMMON, MAX_LENGTH, Kind, of_config

WINDOW = 16


def _dense(name: str, notes: str = "", **more: Any) -> Kind:
    return of_config(name, "dense", notes=notes, **{**COMMON, **more})


_FALCON = {k: v for k, v in COMMON.items() if k not in ("intermediate_size", "num_key_value_heads")}
_LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
_LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10_000.0, "original_max_position_embeddings": 16,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7], "long_factor": [2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0],
}  # fmt: skip
_TWO_WINDOWS = ["sliding_attention", "full_attention"]
_GEMMA = {"head_dim": 16, "sliding_window": WINDOW, "layer_types": _TWO_WINDOWS}
_OLD = {"vocab_size": 320, "initializer_range": 0.15, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

DENSE: dict[str, Kind] = {
    "llama": _dense("LlamaConfig"),
    "llama3": _dense("LlamaConfig", "llama3 rope scaling", rope_parameters=_LLAMA3, tie_word_embeddings=True),
    "mistral": _dense("MistralConfig", "sliding window", sliding_window=WINDOW),
    "ministral": _dense("MinistralConfig", "windows in every other layer", head_dim=16, sliding_window=WINDOW,
                        layer_types=_TWO_WINDOWS),
    "qwen2": _dense("Qwen2Config", "biases, sliding window in the second layer", use_sliding_window=True,
                    sliding_window=WINDOW, max_window_layers=1),
    "qwen3": _dense("Qwen3Config", "norms of queries and keys, wide heads", head_dim=32),
    "gemma": _dense("GemmaConfig", head_dim=16),
    "gemma2": _dense("Gemma2Config", "soft caps, windows", query_pre_attn_scalar=16, attn_logit_softcapping=5.0,
                     final_logit_softcapping=10.0, **_GEMMA),
    "gemma3": _dense("Gemma3TextConfig", "two rotary bases, windows", query_pre_attn_scalar=16, **_GEMMA),
    "gemma3n": _dense("Gemma3nTextConfig", "AltUp, LAuReL, per-layer embeddings, shared keys and values",
                      num_hidden_layers=4, head_dim=16, sliding_window=WINDOW, layer_types=_TWO_WINDOWS * 2,
                      vocab_size_per_layer_input=320, hidden_size_per_layer_input=64, num_kv_shared_layers=2,
                      laurel_rank=64, altup_num_inputs=2, activation_sparsity_pattern=[0.5, 0.0, 0.0, 0.0]),
    "gemma4": _dense("Gemma4TextConfig", "per-layer embeddings, wide heads in full layers, shared keys and values",
                     num_hidden_layers=4, head_dim=16, global_head_dim=32, sliding_window=WINDOW,
                     layer_types=_TWO_WINDOWS * 2, vocab_size_per_layer_input=320, hidden_size_per_layer_input=64,
                     num_kv_shared_layers=2),
    "phi": _dense("PhiConfig", "biases, parallel attention and MLP, rotary part"),
    "phi3": _dense("Phi3Config", "one matrix for queries, keys, values; sliding window", sliding_window=WINDOW),
    "phi3-longrope": _dense("Phi3Config", "longrope: other factors above 16 tokens", rope_parameters=_LONGROPE,
                            original_max_position_embeddings=16),
    "granite": _dense("GraniteConfig", "multipliers", embedding_multiplier=3.0, logits_scaling=2.0,
                      residual_multiplier=0.5, attention_multiplier=0.2),
    "olmo": _dense("OlmoConfig", "norms without weights, clipped"),
    "olmo2": _dense("Olmo2Config", "norms behind attention and MLP"),
    "olmo3": _dense("Olmo3Config", "olmo2 with windows", sliding_window=WINDOW, layer_types=_TWO_WINDOWS),
    "cohere": _dense("CohereConfig", "parallel layers, scaled logits", logit_scale=0.5),
    "cohere2": _dense("Cohere2Config", "cohere with windows, no positions in full layers", logit_scale=0.5,
                      sliding_window=WINDOW, layer_types=_TWO_WINDOWS),
    "smollm3": _dense("SmolLM3Config", "no positions in the second layer", no_rope_layers=[1, 0]),
    "stablelm": _dense("StableLmConfig", "rotary part, LayerNorm", use_qkv_bias=True),
    "starcoder2": _dense("Starcoder2Config", "biases, window", sliding_window=WINDOW, residual_dropout=0.1),
    "glm4": _dense("Glm4Config", "gate and up in one matrix, rotary part", head_dim=16),
    "exaone4": _dense("Exaone4Config", "windows, norms behind", sliding_window=WINDOW, layer_types=_TWO_WINDOWS),
    "helium": _dense("HeliumConfig", head_dim=16),
    "nemotron": _dense("NemotronConfig", "LayerNorm with one added, relu²", head_dim=16),
    "seed_oss": _dense("SeedOssConfig", "biases", head_dim=16),
    "apertus": _dense("ApertusConfig", "xIELU"),
    "arcee": _dense("ArceeConfig", "relu², no gate"),
    "diffllama": _dense("DiffLlamaConfig", "differential attention"),
    "gpt2": of_config("GPT2Config", "dense", notes="Conv1D, learned positions, dropout", n_positions=MAX_LENGTH,
                      n_embd=64, n_layer=2, n_head=4, **_OLD),
    "gpt_neo": of_config("GPTNeoConfig", "dense", notes="local attention of 16", hidden_size=64, num_layers=2,
                         num_heads=4,
                         attention_types=[[["global", "local"], 1]], window_size=WINDOW,
                         max_position_embeddings=MAX_LENGTH, **_OLD),
    "gpt_neox": _dense("GPTNeoXConfig", "one matrix for queries, keys, values; rotary part"),
    "gptj": of_config("GPTJConfig", "dense", notes="interleaved rotary part", n_positions=MAX_LENGTH, n_embd=64,
                      n_layer=2,
                      n_head=4, rotary_dim=8, **_OLD),
    "gpt_bigcode": of_config("GPTBigCodeConfig", "dense", notes="one key head", n_positions=MAX_LENGTH, n_embd=64,
                             n_layer=2, n_head=4, **_OLD),
    "codegen": of_config("CodeGenConfig", "dense", notes="mixed matrix of queries, values, keys",
                         n_positions=MAX_LENGTH,
                         n_embd=64, n_layer=2, n_head=4, rotary_dim=8, **_OLD),
    "opt": of_config("OPTConfig", "dense", notes="learned positions, biases, dropout", vocab_size=320, hidden_size=64,
                     num_hidden_layers=2, ffn_dim=128, max_position_embeddings=MAX_LENGTH, word_embed_proj_dim=64,
                     num_attention_heads=4, init_std=0.15, pad_token_id=0, bos_token_id=1, eos_token_id=2),
    "opt-narrow": of_config("OPTConfig", "dense", notes="opt whose embeddings are narrower (project_in, project_out)",
                            vocab_size=320, hidden_size=64, num_hidden_layers=2, ffn_dim=128, init_std=0.15,
                            max_position_embeddings=MAX_LENGTH, word_embed_proj_dim=32, num_attention_heads=4,
                            do_layer_norm_before=False, pad_token_id=0, bos_token_id=1, eos_token_id=2),
    "falcon": of_config("FalconConfig", "dense", notes="one key head, rotary", **_FALCON),
    "falcon-new": of_config("FalconConfig", "dense", notes="new decoder architecture, two key heads",
                            new_decoder_architecture=True, num_kv_heads=2, **_FALCON),
    "falcon-alibi": of_config("FalconConfig", "dense", attention="sdpa", alibi=True, bias=True, multi_query=False,
                              notes="ALiBi, biases; beside stock sdpa, since stock eager adds ALiBi twice",
                              parallel_attn=False, **_FALCON),
    "bloom": of_config("BloomConfig", "dense", notes="ALiBi, biases, one matrix", hidden_size=64, n_layer=2, n_head=4,
                       **_OLD),
    "mpt": of_config("MptConfig", "dense", notes="ALiBi, no biases", d_model=64, n_layers=2, n_heads=4,
                     expansion_ratio=2, max_seq_len=MAX_LENGTH, **_OLD),
    "xglm": of_config("XGLMConfig", "dense", notes="sinusoidal positions", d_model=64, ffn_dim=128, num_layers=2,
                      attention_heads=4, max_position_embeddings=MAX_LENGTH, vocab_size=320, init_std=0.15,
                      pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2),
    "minicpm3": _dense("MiniCPM3Config", "latent attention (MLA), scaled residuals", q_lora_rank=64, kv_lora_rank=64,
                       qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16, num_key_value_heads=4),
}  # fmt: skip
