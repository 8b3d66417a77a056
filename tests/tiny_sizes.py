"""Sizes of the tiny models of `tiny.py`, by the names that configurations have for them.

No two axes agree: batch 5, 11 tokens (7 in a decoder behind an encoder), width 32, 4 query heads
and 2 key heads of width 8, 128 words.
"""

SAMPLES, TOKENS, DECODER_TOKENS = 5, 11, 7
WIDTH, HEADS, KEY_HEADS, HEAD_WIDTH, WORDS, BLOCKS = 32, 4, 2, 8, 128, 2
IMAGE, CLASSES = 16, 3

# by value, the fields of a configuration that take it where it has them and their default is an int
_BY_VALUE = {
    WIDTH: """hidden_size d_model n_embd emb_dim dim embedding_size word_embed_proj_dim hidden_dim
        embed_dim dim_model out_hidden_size text_hidden_size encoder_hidden_size projection_dim
        projection_size decoder_hidden_size attention_hidden_size hidden_size_global
        pooler_hidden_size pooler_output_size output_dim vision_output_dim image_text_hidden_size
        projector_hidden_size fpn_hidden_size neck_hidden_size adapter_hidden_size
        patch_embed_hidden_size prediction_head_size embedding_dim adapter_in_dim adapter_out_dim
        adapter_input_size relative_attention_max_distance max_rel_pos
        position_bias_max_distance""",
    HEADS: """num_attention_heads num_heads n_head n_heads encoder_attention_heads
        decoder_attention_heads attention_heads swa_num_attention_heads
        speech_encoder_attention_heads t2u_encoder_attention_heads t2u_decoder_attention_heads
        linear_num_heads resampler_n_heads linear_num_value_heads linear_num_key_heads
        num_heads_per_layer num_experts n_routed_experts num_local_experts moe_num_experts
        num_codebooks index_n_heads mamba_n_heads mamba_num_heads sliding_window
        sliding_window_size attention_chunk_size local_attention keep_window_size
        local_attention_window_len num_query_tokens latent_query_num num_latents prompt_length
        index_block_size patch_size rotary_dim""",
    KEY_HEADS: """num_key_value_heads num_kv_heads kv_n_heads swa_num_key_value_heads
        num_global_key_value_heads num_experts_per_tok num_experts_per_token moe_topk moe_k
        moe_top_k top_k_experts index_topk index_topk_blocks num_mem_blocks eos_token_id
        sep_token_id forced_eos_token_id num_hidden_layers n_layer n_layers num_layers layers
        encoder_layers decoder_layers num_decoder_layers num_encoder_layers depth
        speech_encoder_layers t2u_encoder_layers t2u_decoder_layers num_blocks text_encoder_layers
        resampler_depth""",
    HEAD_WIDTH: """head_dim d_kv dim_head d_head kv_channels v_head_dim global_head_dim
        attention_head_dim swa_head_dim linear_key_head_dim linear_value_head_dim linear_head_dim
        qk_nope_head_dim qk_rope_head_dim resampler_head_dim swa_v_head_dim index_head_dim
        mamba_head_dim mamba_d_head relative_attention_num_buckets position_bias_num_buckets
        position_buckets num_mel_bins query_pre_attn_scalar num_conv_pos_embeddings
        rel_pos_bins""",
    16: """qk_head_dim moe_intermediate_size shared_expert_intermediate_size
        moe_shared_expert_intermediate_size shared_experts_intermediate_size q_lora_rank
        kv_lora_rank o_lora_rank hidden_size_per_layer_input laurel_rank mamba_d_state
        ssm_state_size state_size linear_d_state mamba_chunk_size chunk_size block_size
        ple_embed_dim expert_ffn_hidden_size latent_size moe_latent_size hc_lowrank d_rel
        coordinate_size shape_size lora_rank time_step_rank mamba_dt_rank codebook_dim
        image_size""",
    64: """intermediate_size d_ff ffn_dim encoder_ffn_dim decoder_ffn_dim n_inner dim_ff dff d_inner
        mlp_dim shared_intermediate_size intermediate_size_mlp dense_intermediate_size
        ffn_hidden_size speech_encoder_intermediate_size t2u_encoder_ffn_dim t2u_decoder_ffn_dim
        mamba_d_ssm lru_width state_rank max_position_embeddings n_positions n_ctx max_seq_len
        model_max_length max_source_positions max_target_positions max_2d_position_embeddings
        max_sequence_length num_position_embeddings tpu_short_seq_length rel_extent""",
    WORDS: """vocab_size vocab_size_per_layer_input src_vocab_size tgt_vocab_size
        unit_hifi_gan_vocab_size t2u_vocab_size char_vocab_size entity_vocab_size
        encoder_hash_byte_group_vocab unpadded_vocab_size""",
    0: """num_nextn_predict_layers num_kv_shared_layers num_mtp_layers mtp_num_hidden_layers
        pad_token_id""",
    1: """n_group topk_group num_expert_group n_shared_experts num_shared_experts
        moe_num_shared_experts n_groups first_k_dense_replace num_dense_layers mamba_n_groups
        zero_expert_num index_local_blocks pretraining_tp bos_token_id""",
    3: "decoder_start_token_id cls_token_id mask_token_id unk_index",
}
SIZES = {name: value for value, names in _BY_VALUE.items() for name in names.split()}

# ids of multimodal configurations: distinct, and of no word in a batch of text
SPECIAL_IDS = {
    f"{kind}_{end}"
    for kind, ends in {
        "image": "token_id token_index start_token_id end_token_id",
        "video": "token_id token_index start_token_id end_token_id",
        "audio": "token_id token_index bos_token_id eos_token_id start_token_id end_token_id",
        "vision": "start_token_id end_token_id token_id",
        "boi": "token_id token_index",
        "eoi": "token_id token_index",
        "boa": "token_id",
        "eoa": "token_index token_id",
        "im": "start_id end_id",
        "eod": "token_id",
    }.items()
    for end in ends.split()
}
