"""What preflight has to find in families of pipelines, and what it sets."""

# For all families that are not listed: nothing.
FOUND = {
    "Chroma": {"checkpointing": "step"},
    "HunyuanImage": {"checkpointing": "step"},
    "CogView4": {"rollout_batch_size": 1},
    "Kandinsky5": {"rollout_batch_size": 1},
    "QwenImage": {"freeze": ["attn.to_add_out", "txt_mlp"]},
    "QwenImageEdit": {"freeze": ["attn.to_add_out", "txt_mlp"]},
    "HiDreamImage": {
        "train_mode": [
            "transformer.double_stream_blocks.*.block.ff_i",
            "transformer.single_stream_blocks.*.block.ff_i",
        ]
    },
}
