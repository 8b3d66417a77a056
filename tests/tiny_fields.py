"""Fields of the configurations that `tiny_sizes.py` cannot make small by name, and variants."""

from tiny_sizes import CLASSES, HEADS, KEY_HEADS, TOKENS, WORDS


def _mrope(sections=(2, 1, 1), **more):
    # the sections of rotary positions in several axes fill half a head
    return {"rope_type": "default", "rope_theta": 1e4, "mrope_section": list(sections)} | more


def _stages(widths=(16, 16, 16, 16), **more):
    return {"hidden_sizes": list(widths), "depths": [1] * len(widths), "image_size": 64} | more


_MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 8}
_TWO_KINDS = ["full_attention", "sliding_attention"]
_SWIN = {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 2}
_PYRAMID = _stages((16, 16, 32, 32), num_attention_heads=[1, 2, 4, 4])
_DEBERTA = {
    # as released checkpoints have it; the default does without
    "relative_attention": True,
    "pos_att_type": ["p2c", "c2p"],
    "max_relative_positions": 16,
}
_SIX_BLOCKS = {
    "num_kv_shared_layers": 2,
    "num_hidden_layers": 6,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
}

# by model type, or by task and model type: fields; "_default" lists those left at their default
FIELDS = {
    "bamba": _MAMBA2 | {"attn_layer_indices": [1]},
    "blt": {"use_cache": False},
    "canine": {
        "num_hash_buckets": 64,
        "local_transformer_stride": 2,
        "downsampling_rate": 2,
        "num_hash_functions": 4,
    },
    "causal-lm:reformer": {"is_decoder": True},
    "cohere_compass_text": {
        "layer_types": _TWO_KINDS,
        "rope_parameters": {kind: _mrope() for kind in _TWO_KINDS},
    },
    "cvt": {
        "embed_dim": [16, 32],
        "num_heads": [1, 4],
        "depth": [1, 2],
        "patch_sizes": [7, 3],
        "patch_stride": [4, 2],
        "patch_padding": [2, 1],
        "mlp_ratio": [2.0, 2.0],
        "attention_drop_rate": [0.0, 0.0],
        "drop_rate": [0.0, 0.0],
        "drop_path_rate": [0.0, 0.0],
        "qkv_bias": [True, True],
        "cls_token": [False, True],
        "qkv_projection_method": ["dw_bn", "dw_bn"],
        "kernel_qkv": [3, 3],
        "padding_kv": [1, 1],
        "stride_kv": [2, 2],
        "padding_q": [1, 1],
        "stride_q": [1, 1],
        "image_size": 32,
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deberta": _DEBERTA,
    "deberta-v2": _DEBERTA
    | {
        "position_buckets": 8,
        "share_att_key": True,
        "norm_rel_ebd": "layer_norm",
        "position_biased_input": False,
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "efficientnet": {
        "width_coefficient": 0.2,
        "depth_coefficient": 0.2,
        "image_size": 64,
        "hidden_dim": 256,
    },
    "esm": {"position_embedding_type": "rotary", "token_dropout": False, "vocab_size": WORDS}
    | {"mask_token_id": 3, "pad_token_id": 0},
    "esmc": {"num_key_value_heads": HEADS},
    "falcon_h1": _MAMBA2 | {"mamba_d_ssm": 64},
    "flint": {"mlp_only_layers": [0]},
    "focalnet": {"embed_dim": 16, "hidden_sizes": [16, 32], "depths": [1, 1]}
    | {"focal_levels": [2, 2], "focal_windows": [3, 3]},
    "gemma3n_text": {"num_kv_shared_layers": 0, "intermediate_size": 64},
    "gpt_neo": {
        "attention_types": [[["global", "local"], 1]],
        "window_size": 4,
        "attention_layers": ["global", "local"],
    },
    "granitemoehybrid": _MAMBA2
    | {"layer_types": ["linear_attention", "full_attention"], "num_hidden_layers": 2},
    "hiera": {
        "embed_dim": 8,
        "depths": [1, 1],
        "num_heads": [1, 2],
        "query_stride": [2, 2],
        "masked_unit_size": [2, 2],
        "masked_unit_attention": [True, False],
        "num_query_pool": 1,
        "image_size": [32, 32],
        "patch_stride": [4, 4],
        "patch_size": [7, 7],
        "patch_padding": [3, 3],
    },
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
    },
    "layoutlmv3": {"coordinate_size": 6, "shape_size": 4},
    "led": {
        "attention_window": 4,
        "max_encoder_position_embeddings": 64,
        "max_decoder_position_embeddings": 64,
    },
    "levit": _stages((16, 32, 32), num_attention_heads=[2, 4, 4], key_dim=[8, 8, 8], patch_size=16),
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "lilt": {"hidden_size": 48},
    # positions count within a test's length
    "llama4_text": {"no_rope_layers": [1, 0], "floor_scale": 2},
    "longformer": {"attention_window": 4},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1},
    "markuplm": {
        "max_xpath_tag_unit_embeddings": 16,
        "max_xpath_subs_unit_embeddings": 16,
        "xpath_unit_hidden_size": 8,
        "max_depth": 4,
        "tag_pad_id": 15,
        "subs_pad_id": 15,
    },
    "mobilevit": {"hidden_sizes": [16, 24, 32], "image_size": 64, "patch_size": 2}
    | {"neck_hidden_sizes": [8, 8, 8, 8, 16, 16, 16]},
    "mobilevitv2": {
        "image_size": 64,
        "patch_size": 2,
        "base_attn_unit_dims": [16, 16, 16],
        "n_attn_blocks": [1, 1, 1],
        "width_multiplier": 0.25,
    },
    "mpnet": {"relative_attention_num_buckets": 32},
    "nemotron": {"num_key_value_heads": KEY_HEADS},
    "neomme": {"head_dim": 16},
    "nllb-moe": {"encoder_sparse_step": 2, "decoder_sparse_step": 2},
    "perceiver": {
        "d_latents": 32,
        "num_latents": 6,
        "d_model": 32,
        "num_self_attends_per_block": 2,
        "num_self_attention_heads": 4,
        "num_cross_attention_heads": 4,
        "max_position_embeddings": TOKENS,
        "train_size": [16, 16],
    },
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
    },
    "recurrent_gemma": {
        "block_types": ["recurrent", "attention"],
        "attention_window_size": 4,
        "lru_width": 32,
    },
    "reformer": {
        "attn_layers": ["local", "lsh"],
        "axial_pos_embds": False,
        "attention_head_size": 8,
        "feed_forward_size": 64,
        "local_attn_chunk_length": TOKENS,
        "lsh_attn_chunk_length": TOKENS,
        "num_buckets": 4,
        "hash_seed": 0,
    },
    "roc_bert": {
        "pronunciation_vocab_size": 16,
        "shape_vocab_size": 16,
        "pronunciation_embed_dim": 16,
        "shape_embed_dim": 16,
    },
    "smollm3": {"no_rope_layers": [1, 0]},
    "swiftformer": {"embed_dims": [8, 16, 16, 16], "depths": [1, 1, 1, 1]}
    | {"image_size": 64, "num_labels": CLASSES},
    "switch_transformers": {"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1},
    "vibevoice_acoustic_tokenizer_encoder": {"num_filters": 2, "depths": [1] * 7},
    "xlstm": {"mode": "train", "chunk_size": TOKENS, "hidden_size": 128, "embedding_dim": 128},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "_default": ("attention_head_dim", "attention_hidden_size"),
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
        "num_hidden_layers": 3,
        "num_key_value_heads": HEADS,
    },
    "zamba2": {
        "_default": ("attention_head_dim", "head_dim", "kv_channels", "attention_hidden_size"),
        "layers_block_type": ["linear_attention", "hybrid"],
        "num_hidden_layers": 2,
        "n_mamba_heads": 8,
        "num_key_value_heads": HEADS,
    },
    "zaya": {"num_experts_per_tok": 1},
}
FIELDS |= {name: {"decoder_start_token_id": 0} for name in ("t5", "mt5", "umt5")}
_MROPE = "qwen2_vl qwen2_5_vl glm4v glm_ocr glmga paddleocr_vl qwen2_5_omni qwen3_omni_moe"
FIELDS |= {f"{name}_text": {"rope_parameters": _mrope()} for name in _MROPE.split()}
FIELDS["glm4v_moe_text"] = {"head_dim": 16, "rope_parameters": _mrope(partial_rotary_factor=0.5)}
FIELDS |= dict.fromkeys(("swin", "donut-swin", "maskformer-swin"), _SWIN)
FIELDS["swinv2"] = _SWIN | {"pretrained_window_sizes": [0, 0]}
FIELDS |= {name: _stages((8, 16, 16, 16)) for name in ("convnext", "convnextv2")}
FIELDS |= {
    name: _stages((8, 16, 16, 16), embedding_size=8, **more)
    for name, more in {
        "resnet": {},
        "regnet": {"groups_width": 4},
        "bit": {"num_groups": 2},
    }.items()
}
FIELDS |= {"pvt": _PYRAMID, "pvt_v2": _PYRAMID, "poolformer": _stages()}
FIELDS["segformer"] = _PYRAMID | {"decoder_hidden_size": 16}
FIELDS |= {
    name: {"depth_multiplier": 0.25, "image_size": 64} for name in ("mobilenet_v1", "mobilenet_v2")
}
FIELDS |= {name: {"image_size": 64} for name in ("textnet", "hgnet_v2", "pp_lcnet")}

# other configurations of popular types
VARIANTS = {
    "bert@decoder": {"is_decoder": True},
    "beit@relpos": {"use_relative_position_bias": True},
    "beit@sharedrelpos": {"use_shared_relative_position_bias": True},
    "deberta-v2@conv": {"conv_kernel_size": 3, "conv_act": "gelu"},
    "deberta-v2@plain": {"relative_attention": False},
    "falcon@alibi": {"alibi": True},
    "falcon@new_decoder": {"new_decoder_architecture": True, "num_kv_heads": KEY_HEADS},
    "gemma3n_text@kvshare": _SIX_BLOCKS,
    "gemma4_text@kvshare": _SIX_BLOCKS,
    "gpt2@upcast": {"reorder_and_upcast_attn": True, "scale_attn_by_inverse_layer_idx": True},
    "llama4_text@no_tuning": {"attn_temperature_tuning": False},
    "llama@tp": {"pretraining_tp": 1, "attention_bias": True, "mlp_bias": True},
    "mistral@no_window": {"sliding_window": None},
    "opt@postnorm": {"do_layer_norm_before": False},
    "phi3@window": {"sliding_window": 4},
    "qwen2@window": {
        "use_sliding_window": True,
        "sliding_window": 4,
        "max_window_layers": 1,
        "layer_types": _TWO_KINDS,
    },
}
