"""Fine-tunes the embedded model by LoRA on a folder of your own captioned photos, on a laptop's CPU.

    emu3-jax prepare PHOTOS -o out/photos_data
    emu3-jax train configs/photos_laptop.py
    emu3-jax generate "a ginger cat looks at the camera" --model out/photos/model --guidance 1 -o out/pictures

PHOTOS is a folder of pictures with captions in text files of the same name: photo.jpg and photo.txt. docs/data.md
lists other formats. `python scripts/photos.py PHOTOS` writes 24 photographs with captions to try it.

The trained model generates each photograph from its caption, in the 64x64 pixels of the embedded model. With the former
embedded model, of 32x32 pixels and with 15.5 M instead of 22.4 M parameters, training took 6 to 8 minutes on two cores.
A step reads eight photos. For more photos use more steps, for example `--set steps=600`.
"""

from emu3_jax.checkpoints.embedded import embedded_bundle
from emu3_jax.data.config import DataConfig, Source
from emu3_jax.data.sequences import TextToImage
from emu3_jax.models.adapters import Adapter
from emu3_jax.training.config import ModelConfig, OptimizerConfig, TrainConfig


def config() -> TrainConfig:
    return TrainConfig(
        directory="out/photos",
        # Noise makes earlier tokens less predictive, so the model must use the caption. Without noise, guidance breaks
        # memorised pictures.
        model=ModelConfig(str(embedded_bundle()), dtype="float32", remat="none", dropout=0.05, noise=1.0),
        # A square picture takes about 285 tokens. The rest of a row is for long captions and wide pictures.
        data=DataConfig((Source("out/photos_data", TextToImage(prompt_dropout=0.1)),), 384, packing=0, in_memory=True),
        batch_size=8,
        steps=200,
        adapter=Adapter(rank=32, alpha=64.0, base="float32"),
        optimizer=OptimizerConfig(
            learning_rate=2e-3, final_learning_rate=1e-4, warmup_steps=20, clip_norm=1.0, weight_decay=0.0
        ),
        mesh="fsdp=1",
        log_every=10,
        checkpoint_every=100,
        keep=1,
    )
