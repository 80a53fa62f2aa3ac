"""Second stage of pretraining the 8 B model: clips beside pictures, at 131,072 tokens a row. For clips and next frames.

    emu3-jax plan configs/video_8b.py --topology v5p:4x4x8
    emu3-jax prepare clips.jsonl --model out/emu3-stage1 -o out/clips
    emu3-jax prepare pictures.jsonl --model out/emu3-stage1 -o out/pictures
    emu3-jax train configs/video_8b.py

As in the paper (arXiv 2409.18869, 3.2), video comes in with a context of 131,072 tokens, visual targets weigh half and
the rate falls by a cosine from 5e-5. A clip of 5 s at 24 frames a second is 30 latent frames: at 512x512 pixels 124,830
tokens. What is shorter is packed. No weights for clips are published: `out/emu3-stage1` is the first stage's bundle,
which knew shorter rows.

Eight chips share a row: each holds 16,384 of its tokens, and in attention one KV head of the whole row. Sixteen rows
are 2.1 million tokens a step. Mixture, batch and length of the run are choices. By its plan a chip needs 18.3 GiB.
"""

from emu3_jax.config import DecoderConfig
from emu3_jax.data.config import DataConfig, Source
from emu3_jax.data.sequences import NextFrame, TextToImage
from emu3_jax.training.config import ModelConfig, OptimizerConfig, TrainConfig


def config() -> TrainConfig:
    decoder = DecoderConfig(max_positions=131_072, clip_frames=120)
    return TrainConfig(
        directory="out/video",
        model=ModelConfig("out/emu3-stage1", decoder),
        data=DataConfig(
            (
                Source("out/clips", NextFrame(loss="all", eos=True)),
                Source("out/pictures", TextToImage(loss="all", eos=True)),
            ),
            sequence_length=131_072,
        ),
        batch_size=16,
        steps=20_000,
        optimizer=OptimizerConfig(learning_rate=5e-5, final_learning_rate=0.0, warmup_steps=500, clip_norm=1.0),
        vision_weight=0.5,
        mesh="fsdp=16,sequence=8",
        log_every=10,
        checkpoint_every=500,
    )
