"""Pretrains the decoder of the former embedded model (15.5 M parameters): emoji, clips, questions and texts.

    python scripts/build_emoji.py out/emoji
    emu3-jax train configs/vision_emoji.py
    python scripts/emoji_bundle.py out/vision_emoji/model -o out/emoji_start
    emu3-jax prepare out/emoji/SET.jsonl --model out/emoji_start --keep-size -o out/emoji_tokens/SET    # for each SET
    emu3-jax train configs/emoji_pretrain.py
    emu3-jax train configs/emoji_sft.py

SET is the name of each data set below, such as t2i_train. `bash scripts/emoji_model.sh` runs all these commands.

As in the paper (arXiv 2409.18869, 3.2), all kinds of data are trained in one mixture. Visual targets have weight 0.1;
the paper uses 0.5. The lower weight compensates for short answers: they have only a few text tokens.
"""

from emu3_jax.config import DecoderConfig
from emu3_jax.data.config import DataConfig, Source
from emu3_jax.data.sequences import ImageToText, NextFrame, TextOnly, TextToImage
from emu3_jax.text.tokenizer import special_tokens
from emu3_jax.training.config import ModelConfig, OptimizerConfig, SampleConfig, TrainConfig

TOKENS = "out/emoji_tokens"
HELD_OUT = (
    ("t2i", Source(f"{TOKENS}/t2i_heldout", TextToImage())),
    ("i2t", Source(f"{TOKENS}/i2t_heldout_style", ImageToText())),
    ("clip", Source(f"{TOKENS}/clip_heldout", NextFrame())),
    ("clip_questions", Source(f"{TOKENS}/clip_questions_heldout", ImageToText())),
)
PROMPTS = ("3d emoji of dog face", "noto emoji of pizza", "flat emoji of rocket", "twemoji emoji of rose")


def decoder() -> DecoderConfig:
    # 2,048 text tokens, see scripts/emoji_bundle.py; 2,048 codes, see configs/vision_emoji.py.
    tokens = special_tokens(2048, 2048)
    return DecoderConfig(
        vocab_size=tokens.visual_end,
        hidden_size=384,
        intermediate_size=1024,
        num_layers=8,
        num_heads=12,
        num_kv_heads=2,
        max_positions=1024,
        rope_theta=10_000.0,
        image_area=32 * 32,
        clip_frames=8,
        tokens=tokens,
    )


def config() -> TrainConfig:
    captioned = TextToImage(loss="all", prompt_dropout=0.1, eos=True)
    sources = (
        # Mostly pictures at full size. Fewer pictures are smaller and off-centre, as an augmentation.
        Source(f"{TOKENS}/t2i_upright", captioned, weight=3.5, parts=2),
        Source(f"{TOKENS}/t2i_train", captioned, weight=1.5, parts=2),
        Source(f"{TOKENS}/i2t_train", ImageToText(), weight=4.0, parts=2),
        Source(f"{TOKENS}/clip_train", NextFrame(loss="all", prompt_dropout=0.1, eos=True), weight=1.6),
        Source(f"{TOKENS}/clip_questions", ImageToText(), weight=0.6),
        Source(f"{TOKENS}/text_train", TextOnly(), weight=0.5, parts=4),
    )
    return TrainConfig(
        directory="out/emoji_pretrain",
        # Training reads each picture hundreds of times. Without dropout, the held-out loss rises after 1,000 steps.
        model=ModelConfig("out/emoji_start", decoder(), random=True, remat="none", dropout=0.1, noise=1.0),
        # A row holds a clip (with or without questions), two pictures with text (at most 338 tokens each), or four
        # texts.
        data=DataConfig(sources, sequence_length=688, packing=0, in_memory=True),
        batch_size=192,
        mesh="data=-1",
        steps=13_000,
        optimizer=OptimizerConfig(
            learning_rate=1.5e-3, final_learning_rate=1.5e-4, warmup_steps=200, clip_norm=1.0, eps=1e-8
        ),
        vision_weight=0.1,
        log_every=20,
        checkpoint_every=2_000,
        keep=1,
        evaluation=HELD_OUT,
        evaluate_every=2_000,
        samples=SampleConfig(PROMPTS, every=8_000),
    )
