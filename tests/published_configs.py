"""The config files of Emu3's published checkpoints, in three layouts."""

UPSTREAM_DECODER = {
    "model_type": "Emu3", "vocab_size": 184622, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_act": "silu",
    "max_position_embeddings": 9216, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "rope_scaling": None,
    "attention_dropout": 0.1, "tie_word_embeddings": False, "pretraining_tp": 1, "pad_token_id": 151643,
    "bos_token_id": 151849, "eos_token_id": 151850, "img_token_id": 151851, "boi_token_id": 151852,
    "eoi_token_id": 151853, "eol_token_id": 151846, "eof_token_id": 151847, "image_area": 518400,
    "torch_dtype": "bfloat16", "transformers_version": "4.44.0", "use_cache": True,
}  # fmt: skip
UPSTREAM_VISION = {
    "model_type": "Emu3VisionVQ", "codebook_size": 32768, "embed_dim": 4, "z_channels": 4, "double_z": False,
    "in_channels": 3, "out_channels": 3, "temporal_downsample_factor": 4, "ch": 256, "ch_mult": [1, 2, 2, 4],
    "num_res_blocks": 2, "attn_resolutions": [3], "dropout": 0.0,
}  # fmt: skip
IMAGE = {
    "do_convert_rgb": True, "do_resize": True, "resample": 3, "do_rescale": True, "rescale_factor": 0.00392156862745098,
    "do_normalize": True, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5],
    "min_pixels": 262144, "max_pixels": 1048576, "spatial_factor": 8,
}  # fmt: skip
_TEXT_FIELDS = [
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "hidden_act", "max_position_embeddings", "rms_norm_eps", "pad_token_id", "bos_token_id",
    "eos_token_id", "tie_word_embeddings",
]  # fmt: skip
TEXT = {field: UPSTREAM_DECODER[field] for field in _TEXT_FIELDS} | {"model_type": "emu3_text_model"}
VQ = {
    "model_type": "emu3_vqgan", "codebook_size": 32768, "embed_dim": 4, "latent_channels": 4, "double_latent": False,
    "in_channels": 3, "out_channels": 3, "temporal_downsample_factor": 4, "base_channels": 256,
    "channel_multiplier": [1, 2, 2, 4], "num_res_blocks": 2, "attn_resolutions": [3], "hidden_size": 1024,
    "num_attention_heads": 1, "attention_dropout": 0.0,
}  # fmt: skip
TRANSFORMERS_4 = {
    "model_type": "emu3", "vq_config": VQ, "vocabulary_map": {"<image>": 151646},
    "text_config": {**TEXT, "rope_theta": 1000000.0, "rope_scaling": None, "mlp_bias": False, "attention_bias": False},
}  # fmt: skip
TRANSFORMERS_5 = {
    "model_type": "emu3", "vq_config": VQ, "vocabulary_map": {"<image>": 151646},
    "text_config": {**TEXT, "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}},
}  # fmt: skip
