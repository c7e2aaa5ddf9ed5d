"""Mixtures of experts and latent attention (MLA)."""

from typing import Any

from tests.zoo.kind import COMMON, Kind, of_config

WINDOW = 16
_LATENT = {
    "q_lora_rank": 64, "kv_lora_rank": 64, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
    "num_key_value_heads": 4,
}  # fmt: skip
_DEEPSEEK = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 64,
    "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1,
}  # fmt: skip
_EIGHT = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
_TWO_WINDOWS = ["sliding_attention", "full_attention"]


def _mixture(name: str, notes: str, **more: Any) -> Kind:
    return of_config(name, "mixture", notes=notes, **{**COMMON, **more})


MIXTURES: dict[str, Kind] = {
    "mixtral": _mixture("MixtralConfig", "4 experts, 2 used", num_local_experts=4, num_experts_per_tok=2,
                        sliding_window=WINDOW),
    "qwen2_moe": _mixture("Qwen2MoeConfig", "shared expert with a gate", shared_expert_intermediate_size=64, **_EIGHT),
    "qwen3_moe": _mixture("Qwen3MoeConfig", "norms of queries and keys", head_dim=16, norm_topk_prob=True, **_EIGHT),
    "qwen3_next": _mixture("Qwen3NextConfig", "gated delta rule, then attention; shared expert", head_dim=16,
                           linear_key_head_dim=16, linear_value_head_dim=16, linear_num_key_heads=4,
                           linear_num_value_heads=8, shared_expert_intermediate_size=64,
                           layer_types=["linear_attention", "full_attention"], **_EIGHT),
    "qwen3_5_moe": _mixture("Qwen3_5MoeTextConfig", "gated delta rule, then attention; shared expert", head_dim=16,
                            linear_key_head_dim=16, linear_value_head_dim=16, linear_num_key_heads=4,
                            linear_num_value_heads=8, shared_expert_intermediate_size=64,
                            layer_types=["linear_attention", "full_attention"], **_EIGHT),
    "gpt_oss": _mixture("GptOssConfig", "attention sinks, windows, biased experts", head_dim=16, num_local_experts=4,
                        num_experts_per_tok=2, sliding_window=WINDOW, layer_types=_TWO_WINDOWS),
    "deepseek_v2": _mixture("DeepseekV2Config", "latent attention, shared expert", topk_method="greedy",
                            **_LATENT, **_DEEPSEEK),
    "deepseek_v3": _mixture("DeepseekV3Config", "latent attention, grouped sigmoid routing", **_LATENT, **_DEEPSEEK),
    "deepseek_v32": _mixture("DeepseekV32Config", "latent attention to 16 chosen tokens", index_topk=WINDOW,
                             index_head_dim=16, index_n_heads=4, **_LATENT, **{**_DEEPSEEK, "n_group": 1}),
    "glm4_moe": _mixture("Glm4MoeConfig", "a dense layer, then experts", head_dim=16, use_qk_norm=True,
                         **{**_DEEPSEEK, "n_group": 1}),
    "glm4_moe_lite": _mixture("Glm4MoeLiteConfig", "latent attention", mlp_layer_types=["dense", "sparse"], **_LATENT,
                              **{k: v for k, v in _DEEPSEEK.items() if k != "first_k_dense_replace"} | {"n_group": 1}),
    "dots1": _mixture("Dots1Config", "a dense layer, then experts; window", head_dim=16, sliding_window=WINDOW,
                      max_window_layers=1, **{**_DEEPSEEK, "n_group": 1}),
    "ernie4_5_moe": _mixture("Ernie4_5_MoeConfig", "a dense layer, then experts", moe_num_experts=4, moe_k=2,
                             moe_intermediate_size=64, moe_num_shared_experts=1, moe_layer_start_index=1),
    "laguna": _mixture("LagunaConfig", "a dense layer, then experts; gated attention", head_dim=16, **_EIGHT),
    "olmoe": _mixture("OlmoeConfig", "norms of queries and keys", num_experts=4, num_experts_per_tok=2),
    "phimoe": _mixture("PhimoeConfig", "a router that is a linear layer and returns a tuple", num_local_experts=4,
                       num_experts_per_tok=2, sliding_window=WINDOW, attention_bias=True, lm_head_bias=True),
    "granitemoe": _mixture("GraniteMoeConfig", "multipliers, experts in one matrix", num_local_experts=4,
                           num_experts_per_tok=2, attention_multiplier=0.2),
    "minimax_m2": _mixture("MiniMaxM2Config", "sigmoid routing", head_dim=16, num_local_experts=4,
                           num_experts_per_tok=2, intermediate_size=64),
    "hunyuan_v1_moe": _mixture("HunYuanMoEV1Config", "shared MLP", head_dim=16, num_experts=4, moe_topk=2),
    "llama4": _mixture("Llama4TextConfig", "attention in chunks of 16, then over all", head_dim=16,
                       intermediate_size_mlp=128, num_local_experts=4, num_experts_per_tok=1,
                       interleave_moe_layer_step=2, attention_chunk_size=16, no_rope_layers=[1, 0], floor_scale=8),
    "gemma4-moe": _mixture("Gemma4TextConfig", "experts beside an MLP", head_dim=16, global_head_dim=32,
                           sliding_window=WINDOW, layer_types=_TWO_WINDOWS, vocab_size_per_layer_input=320,
                           hidden_size_per_layer_input=64, enable_moe_block=True, num_experts=4, top_k_experts=2,
                           moe_intermediate_size=64),
}  # fmt: skip
