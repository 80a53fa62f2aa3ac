"""Defaults of generation that the API, the commands and the configs share. `--help` reads them without loading JAX."""

GUIDANCE = 3.0  # classifier-free guidance scale of pictures and clips; the reference's example uses it
TEMPERATURE = 1.0
TOP_K = 2048  # the reference's, too
TOP_P = 1.0
SEED = 0
BATCH_SIZE = 8  # rows that are computed at once
MAX_NEW_TOKENS = 1024  # of an answer, as in the reference's example
FRAMES = 8  # of a new clip
FPS = 8.0  # of a new clip that goes on from none
