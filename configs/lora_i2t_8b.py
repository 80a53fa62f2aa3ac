"""Fine-tunes the 8 B model by LoRA on questions and answers about pictures.

    emu3-jax prepare conversations.json --model out/emu3-chat --validation 0.05 -o out/data
    emu3-jax train configs/lora_i2t_8b.py
    emu3-jax chat photo.jpg --prompt "What is this?" --model out/lora_i2t/model

`emu3-jax convert BAAI/Emu3-Chat BAAI/Emu3-VisionTokenizer -o out/emu3-chat` makes the bundle. `--set model.bundle=DIR`
names another one.

The loss counts only the answers. All other settings are those of lora_t2i_8b.py. If an example has a caption but no
conversation, the question is `ImageToText.question` and the caption is the answer. On small slices,
`--set adapter.base=nf4` stores the frozen weights in 4 bits.
"""

from emu3_jax.config import DecoderConfig
from emu3_jax.data.config import DataConfig, Source
from emu3_jax.data.sequences import ImageToText
from emu3_jax.models.adapters import Adapter
from emu3_jax.training.config import ModelConfig, OptimizerConfig, TrainConfig


def config() -> TrainConfig:
    return TrainConfig(
        directory="out/lora_i2t",
        model=ModelConfig("out/emu3-chat", DecoderConfig()),
        data=DataConfig((Source("out/data", ImageToText(loss="text")),), sequence_length=10_240),
        batch_size=16,
        steps=1_000,
        adapter=Adapter(rank=16, alpha=32.0),
        optimizer=OptimizerConfig(learning_rate=1e-4, final_learning_rate=1e-5, clip_norm=1.0, weight_decay=0.0),
        log_every=10,
        checkpoint_every=100,
        evaluation=(("validation", Source("out/data/validation", ImageToText(loss="text"))),),
        evaluate_every=100,
    )
