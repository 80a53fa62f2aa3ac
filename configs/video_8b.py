"""Second stage of pretraining the 8 B model: clips and pictures in rows of 131,072 tokens.

    emu3-jax plan configs/video_8b.py --topology v5p:4x4x8
    emu3-jax prepare clips.jsonl --model out/emu3-stage1 -o out/clips
    emu3-jax prepare pictures.jsonl --model out/emu3-stage1 -o out/pictures
    emu3-jax train configs/video_8b.py

The trained model generates clips and continues them (next-frame prediction). As in the paper (arXiv 2409.18869, 3.2),
this stage has a context of 131,072 tokens, visual targets have weight 0.5, and the learning rate falls from 5e-5 as a
cosine. A clip of 5 s at 24 frames per second is 30 latent frames; at 512x512 pixels it has 124,830 tokens. Shorter
examples are packed into rows. No weights for clips are published. Training starts from `out/emu3-stage1`, the bundle of
the first stage, which was trained on shorter rows.

Eight chips share a row. Each chip holds 16,384 tokens of it and, in attention, one KV head of the whole row. Sixteen
rows are 2.1 million tokens per step. The data mixture, the batch size and the number of steps are our choices. By
`emu3-jax plan`, a chip needs 18.3 GiB.
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
