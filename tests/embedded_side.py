"""The size of the embedded model's pictures."""

from emu3_jax.checkpoints.bundle import Bundle
from emu3_jax.checkpoints.embedded import DIRECTORY


def embedded_side() -> int:
    """Pixels of a side."""
    return round(Bundle.open(DIRECTORY).decoder_config.image_area ** 0.5)
