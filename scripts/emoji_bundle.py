"""Makes the bundle that pretraining of the emoji decoder starts from: a vision tokenizer and a small vocabulary.

    python scripts/emoji_bundle.py out/vision_emoji/model -o out/emoji_start

The first ranks of Emu3's vocabulary are a complete byte-pair vocabulary, because longer merges have higher ranks. So a
small model can use the real tokenizer without 150,000 table rows that its captions never need.
"""

import argparse
import base64
import pathlib
import shutil
import sys

from small_checkpoint import public_vocabulary

from emu3_jax.checkpoints.bundle import VOCABULARY, Bundle
from emu3_jax.checkpoints.parts import write_config
from emu3_jax.errors import Emu3Error
from emu3_jax.files import new_directory
from emu3_jax.text.tokenizer import Tokenizer, special_tokens

RANKS = 2048


def write_bundle(vision: pathlib.Path, target: pathlib.Path, ranks: int = RANKS) -> pathlib.Path:
    """Writes a bundle with the vision tokenizer of the bundle `vision` and the first `ranks` ranks of the vocabulary.

    Returns:
        `target`.

    Raises:
        Emu3Error: `vision` has no vision tokenizer, `target` exists, or the public vocabulary is not installed.
    """
    bundle = Bundle.open(vision)
    bundle.require("vision")
    lines = public_vocabulary().splitlines()[:ranks]
    table = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, lines)}
    tokenizer = Tokenizer(table, special_tokens(ranks, bundle.vision_config.codebook_size))
    with new_directory(target, 0) as temporary:
        shutil.copytree(bundle.path / "vision", temporary / "vision")
        write_config(temporary / "tokenizer", {"template": "chat"})
        tokenizer.to_file(temporary / "tokenizer" / VOCABULARY)
    return target


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("vision", type=pathlib.Path, metavar="BUNDLE", help="bundle with the vision tokenizer")
    parser.add_argument("-o", "--output", type=pathlib.Path, required=True, metavar="BUNDLE", help="new bundle")
    parser.add_argument("--ranks", type=int, default=RANKS, help="size of the vocabulary (default: %(default)s)")
    options = parser.parse_args()
    try:
        print(write_bundle(options.vision, options.output, options.ranks))
    except Emu3Error as error:
        sys.exit(f"emoji_bundle: error: {error}")
