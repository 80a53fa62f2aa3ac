"""Generate one picture per prompt: DIR/000.png ..., each carrying how it was made in its PNG text fields."""

import argparse

from emu3_jax.cli import common


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("prompts", nargs="+", metavar="PROMPT", help="what to draw")
    common.add_model(command)
    common.add_adapter(command)
    common.add_fast_pixels(command)
    command.add_argument("--ratio", nargs="+", default=["1:1"], metavar="W:H", help="one for all prompts, or one each")
    common.add_generation(command)
    command.add_argument("--save-tokens", action="store_true", help="also write DIR/tokens.npz: row i, the full ids")
    command.add_argument("-o", "--output", type=common.place, required=True, metavar="DIR")


def run(options: argparse.Namespace) -> None:
    import contextlib

    from emu3_jax import distributed
    from emu3_jax.files import files_into
    from emu3_jax.media.codes import save_codes
    from emu3_jax.media.images import save_png

    distributed.start()
    model = common.load_model(options)
    # All processes of a mesh compute; the first one shows and writes.
    first = distributed.first()
    with files_into(options.output) if first else contextlib.nullcontext() as directory:
        generations = model.generate_sequences(
            options.prompts,
            ratio=common.one_or_each(options.ratio),
            **common.generation(options),
            progress=common.progress(options),
        )
        if not first:
            return
        for index, generation in enumerate(generations):
            save_png(generation.image, directory / f"{index:03d}.png", generation.image.info)
        if options.save_tokens:
            save_codes(directory / "tokens.npz", {str(i): made.ids for i, made in enumerate(generations)})
    for index in range(len(generations)):
        print(options.output / f"{index:03d}.png")
