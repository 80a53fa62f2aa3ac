"""Trains the embedded model on short illustrated stories of coloured shapes and on edits of pictures alone.

    python scripts/stories.py out/stories
    emu3-jax prepare out/stories/SET.jsonl --keep-size -o out/stories_tokens/SET    # for each SET
    emu3-jax train configs/stories.py
    emu3-jax evaluate configs/eval_stories.py
    emu3-jax interleave "Tell a story in three pictures about a small red star" --model out/stories_run/model -o story

SET is stories_train, edits_train, stories_heldout and edits_heldout. The trained model decides by itself when a picture
begins. It forgets the emoji of the embedded model, because these data have none. The embedded model was trained on such
stories and edits beside other data. The values here were chosen with the former one, of 32x32 pixels, which was not.
"""

from emu3_jax.checkpoints.embedded import embedded_bundle
from emu3_jax.data.config import DataConfig, Source
from emu3_jax.data.sequences import Interleaved
from emu3_jax.training.config import ModelConfig, OptimizerConfig, TrainConfig

TOKENS = "out/stories_tokens"


def config() -> TrainConfig:
    task = Interleaved(prompt_dropout=0.1)
    return TrainConfig(
        directory="out/stories_run",
        model=ModelConfig(str(embedded_bundle()), remat="none", dropout=0.1, noise=1.0, noise_in="targets"),
        # A row holds two stories (at most 992 tokens each) or three edits (at most 661 each).
        data=DataConfig(
            (
                Source(f"{TOKENS}/stories_train", task, weight=2.0, parts=2),
                Source(f"{TOKENS}/edits_train", task, weight=2.0, parts=3),
            ),
            sequence_length=1984,
            packing=0,
            in_memory=True,
        ),
        batch_size=48,
        mesh="data=-1",
        steps=3_600,
        optimizer=OptimizerConfig(
            learning_rate=8e-4, final_learning_rate=4e-5, warmup_steps=100, clip_norm=1.0, eps=1e-8
        ),
        # A picture has 256 visual targets, a sentence about nine.
        vision_weight=0.2,
        log_every=20,
        checkpoint_every=500,
        keep=1,
        evaluation=(
            ("stories", Source(f"{TOKENS}/stories_heldout", task)),
            ("edits", Source(f"{TOKENS}/edits_heldout", task)),
        ),
        evaluate_every=500,
    )
