"""Defaults of generation for the API, the commands and the configs. `--help` reads them without importing JAX."""

GUIDANCE = 3.0  # classifier-free guidance scale, as in the reference's example
TEMPERATURE = 1.0
TOP_K = 2048  # as in the reference
TOP_P = 1.0
SEED = 0
BATCH_SIZE = 8  # rows computed at once
MOST_ROWS = 4096  # largest batch size; far more than fits on any device
MAX_NEW_TOKENS = 1024  # most tokens of an answer, as in the reference's example
FRAMES = 8  # new frames of a clip
FPS = 8.0  # frames per second of a new clip

MAX_PICTURES = 1_000_000  # most pictures of one call; each needs a few kilobytes of host memory from the start
PARALLEL = "auto"  # tokens of a pass of the decoder
MOST_PARALLEL = 128
LEGAL_PARALLEL = f"auto, off, or a whole number from 2 to {MOST_PARALLEL}"
MOST_ZIPAR = 100_000  # far more than the columns of any picture, which give the exact picture
LEGAL_ZIPAR = f"a whole number from 1 to {MOST_ZIPAR}: the tokens that a row of the picture is ahead of the next row"
