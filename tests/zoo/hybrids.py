"""State-space models, and those that mix such layers, convolutions or recurrences with attention."""

from typing import Any

from tests.zoo.kind import COMMON, MAX_LENGTH, Kind, of_config

CHUNK = 16
_SSM = {"vocab_size": 320, "hidden_size": 64, "num_hidden_layers": 2, "initializer_range": 0.15, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
_MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 16, "mamba_chunk_size": CHUNK}


def _hybrid(name: str, notes: str, **more: Any) -> Kind:
    return of_config(name, "hybrid", notes=notes, **{**COMMON, **more})


HYBRIDS: dict[str, Kind] = {
    "mamba": of_config("MambaConfig", "hybrid", notes="Mamba layers only", state_size=8, time_step_rank=64, **_SSM),
    "falcon_mamba": of_config("FalconMambaConfig", "hybrid", notes="Mamba with norms inside", state_size=8,
                              time_step_rank=64, **_SSM),
    "mamba2": of_config("Mamba2Config", "hybrid", notes="Mamba-2, chunks of 16", num_heads=8, head_dim=16,
                        state_size=16,
                        n_groups=1, chunk_size=CHUNK, **_SSM),
    "jamba": _hybrid("JambaConfig", "Mamba, attention, experts", num_hidden_layers=4, attn_layer_period=2,
                     attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1, num_experts=4,
                     num_experts_per_tok=2, mamba_d_state=8, mamba_dt_rank=64),
    "bamba": _hybrid("BambaConfig", "Mamba-2, then attention", attn_layer_indices=[1], **_MAMBA2),
    "falcon_h1": _hybrid("FalconH1Config", "Mamba-2 beside attention in each layer, multipliers", mamba_d_ssm=128,
                         key_multiplier=0.8, attention_out_multiplier=0.9, ssm_in_multiplier=1.1,
                         ssm_out_multiplier=0.9, ssm_multipliers=[0.9, 1.1, 0.8, 1.2, 1.0],
                         mlp_multipliers=[0.9, 1.1], embedding_multiplier=2.0, lm_head_multiplier=0.5, **_MAMBA2),
    "granitemoehybrid": _hybrid("GraniteMoeHybridConfig", "Mamba-2, attention, experts, shared MLP",
                                layer_types=["linear_attention", "full_attention"], num_local_experts=4,
                                num_experts_per_tok=2, shared_intermediate_size=64, attention_multiplier=0.2,
                                **_MAMBA2),
    "zamba2": _hybrid("Zamba2Config", "Mamba-2 with one shared block of attention", num_hidden_layers=4,
                      num_key_value_heads=4, layers_block_type=["linear_attention", "hybrid", "linear_attention",
                                                                "hybrid"],
                      mamba_d_state=16, n_mamba_heads=8, mamba_ngroups=1, chunk_size=CHUNK, num_mem_blocks=1,
                      adapter_rank=64, use_shared_attention_adapter=True),
    "nemotron_h": _hybrid("NemotronHConfig", "Mamba-2, experts, attention, MLP", num_hidden_layers=4, head_dim=16,
                          layers_block_type=["linear_attention", "moe", "full_attention", "mlp"], ssm_state_size=16,
                          mamba_num_heads=8, mamba_head_dim=16, n_groups=1, chunk_size=CHUNK, n_routed_experts=4,
                          num_experts_per_tok=2, moe_intermediate_size=64, moe_shared_expert_intermediate_size=64),
    "lfm2": _hybrid("Lfm2Config", "short convolutions, then attention", layer_types=["conv", "full_attention"],
                    block_auto_adjust_ff_dim=False),
    "recurrent_gemma": of_config("RecurrentGemmaConfig", "hybrid", notes="recurrent layers, attention over 16",
                                 num_hidden_layers=3, intermediate_size=256, attention_window_size=16, lru_width=64,
                                 w_init_variance_scale=1.0, num_attention_heads=4, num_key_value_heads=1,
                                 vocab_size=320, hidden_size=64, pad_token_id=0, bos_token_id=1, eos_token_id=2),
    "olmo_hybrid": _hybrid("OlmoHybridConfig", "gated delta rule, then attention", num_key_value_heads=4,
                           layer_types=["linear_attention", "full_attention"], linear_num_key_heads=4,
                           linear_num_value_heads=8, linear_key_head_dim=16, linear_value_head_dim=16),
    "qwen3_5": _hybrid("Qwen3_5TextConfig", "gated delta rule, then attention", head_dim=16, linear_key_head_dim=16,
                       linear_value_head_dim=16, linear_num_key_heads=4, linear_num_value_heads=8,
                       layer_types=["linear_attention", "full_attention"]),
    "kimi_linear": _hybrid("KimiLinearConfig", "Kimi delta rule in a loop over 64 tokens, latent attention, experts",
                           num_hidden_layers=4, num_attention_heads=2, linear_num_heads=2, linear_head_dim=32,
                           kv_lora_rank=64, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=32,
                           moe_intermediate_size=64, num_local_experts=4, num_experts_per_tok=2,
                           layer_types=["linear_attention", "linear_attention", "full_attention",
                                        "linear_attention"]),
    "rwkv": of_config("RwkvConfig", "hybrid", notes="RWKV-4", context_length=MAX_LENGTH, hidden_size=64,
                      num_hidden_layers=2, attention_hidden_size=64, intermediate_size=128, vocab_size=320,
                      pad_token_id=0, bos_token_id=1, eos_token_id=2),
}  # fmt: skip
