"""Pretrains the decoder of the embedded model, of 64x64 pixels (22.4 M parameters), on everything that it does.

    python scripts/build_pictures.py out/pictures64
    python scripts/emoji_bundle.py scripts/picture_data/tokenizer -o out/pictures_start
    emu3-jax prepare out/pictures64/SET.jsonl --model out/pictures_start --keep-size -o out/pictures_tokens/SET
    emu3-jax train configs/pictures_pretrain.py
    emu3-jax train configs/pictures_sft.py
    emu3-jax train configs/pictures_refine.py
    emu3-jax train configs/pictures_further.py

SET stands for each data set below, such as arrangements/train. `bash scripts/pictures_model.sh` runs all these
commands.

As in the paper (arXiv 2409.18869, 3.2), all kinds of data are trained in one mixture.
"""

import dataclasses
import pathlib
import runpy

from emu3_jax.config import DecoderConfig
from emu3_jax.data.config import Source
from emu3_jax.data.sequences import ImageToText, Interleaved, NextFrame, TextOnly, TextToImage
from emu3_jax.text.tokenizer import special_tokens
from emu3_jax.training.config import SampleConfig, TrainConfig

EMOJI = runpy.run_path(str(pathlib.Path(__file__).with_name("emoji_pretrain.py")))
TOKENS = "out/pictures_tokens"
HELD_OUT = (
    ("t2i", Source(f"{TOKENS}/prompts_heldout", TextToImage())),
    ("i2t", Source(f"{TOKENS}/questions_heldout_style", ImageToText())),
    ("arrangements", Source(f"{TOKENS}/arrangements/heldout", TextToImage())),
    ("clip", Source(f"{TOKENS}/emoji/clip_heldout", NextFrame())),
    ("stories", Source(f"{TOKENS}/stories/stories_heldout", Interleaved())),
    ("edits", Source(f"{TOKENS}/stories/edits_heldout", Interleaved())),
)
PROMPTS = ("a cat", "a red car", "flag of Japan", "two blue stars and one red circle on a white background")


def decoder() -> DecoderConfig:
    # 2,048 text tokens, see scripts/emoji_bundle.py; 4,096 codes, see configs/vision_pictures.py.
    tokens = special_tokens(2048, 4096)
    return dataclasses.replace(
        EMOJI["decoder"](),
        vocab_size=tokens.visual_end,
        hidden_size=448,
        intermediate_size=1216,
        num_heads=14,
        max_positions=2048,
        image_area=64 * 64,
        tokens=tokens,
    )


def sources(loss: str, *, drawn: float = 1.0) -> tuple[Source, ...]:
    """All training data. `loss` is that of captioned pictures and clips, `drawn` multiplies the weight of drawings."""
    captioned = TextToImage(loss=loss, prompt_dropout=0.1, eos=True)
    documents = Interleaved(loss="answers" if loss == "vision" else loss, prompt_dropout=0.1)
    # A row holds six pictures with text (at most 341 tokens each), three edits or clips (687), four pictures with
    # several questions (480), or two stories (990).
    return (
        Source(f"{TOKENS}/prompts_train", captioned, weight=3.0 * drawn, parts=6),
        Source(f"{TOKENS}/emoji/t2i_upright", captioned, weight=2.0 * drawn, parts=6),
        Source(f"{TOKENS}/two_shapes/train", captioned, weight=0.5, parts=6),
        Source(f"{TOKENS}/arrangements/train", captioned, weight=1.0, parts=6),
        Source(f"{TOKENS}/questions_train", ImageToText(), weight=3.5, parts=6),
        Source(f"{TOKENS}/arrangements/questions_train", ImageToText(), weight=0.5, parts=4),
        Source(f"{TOKENS}/emoji/clip_train", NextFrame(loss=loss, prompt_dropout=0.1, eos=True), weight=1.2, parts=3),
        Source(f"{TOKENS}/emoji/clip_questions", ImageToText(), weight=0.5, parts=3),
        Source(f"{TOKENS}/stories/stories_train", documents, weight=0.7, parts=2),
        Source(f"{TOKENS}/stories/edits_train", documents, weight=0.9, parts=3),
        Source(f"{TOKENS}/emoji/text_train", TextOnly(), weight=0.3, parts=6),
    )


def config() -> TrainConfig:
    emoji = EMOJI["config"]()
    return dataclasses.replace(
        emoji,
        directory="out/pictures_pretrain",
        model=dataclasses.replace(
            emoji.model, bundle="out/pictures_start", decoder=decoder(), unroll=decoder().num_layers, noise_in="auto"
        ),
        data=dataclasses.replace(emoji.data, sources=sources("all"), sequence_length=2112),
        batch_size=64,
        steps=6_500,
        evaluation=HELD_OUT,
        evaluate_every=3_000,
        samples=SampleConfig(PROMPTS, every=6_000),
    )
