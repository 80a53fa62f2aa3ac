"""Decode codes: DIR/NAME.png per [h, w] array, an animated DIR/NAME.webp (or --clip-format) per [t, h, w] array."""

import argparse

from emu3_jax.cli import common


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("codes", type=common.path, metavar="CODES.npz")
    common.add_model(command)
    common.add_fast_pixels(command)
    common.add_clip_format(command, "--clip-format")
    command.add_argument("--fps", type=float, default=12.0, help="frame rate of clips (default: %(default)s)")
    command.add_argument(
        "--frames", type=int, metavar="N", help="end clips after N frames: tokenize fills them up to a multiple of 4"
    )
    common.add_independent(command)
    common.add_tile(command)
    command.add_argument("-o", "--output", type=common.place, required=True, metavar="DIR")


def run(options: argparse.Namespace) -> None:
    from emu3_jax.files import files_into
    from emu3_jax.media.clips import Clip, check_writable, save_clip
    from emu3_jax.media.codes import load_codes
    from emu3_jax.media.images import save_png
    from emu3_jax.progress import each

    arrays = load_codes(options.codes)
    if any(codes.ndim == 3 for codes in arrays.values()):
        check_writable(options.output / f"clip.{options.clip_format}", options.fps)
    settings = {name: getattr(options, name) for name in ("independent", "frames", "tile")}
    written = []
    model = common.load_model(options)
    with files_into(options.output) as directory:
        for name, codes in each(arrays.items(), common.progress(options), "files", name="detokenize"):
            (media,) = model.detokenize([codes], **settings)
            if isinstance(media, Clip):
                written.append(f"{name}.{options.clip_format}")
                save_clip(media.frames, directory / written[-1], options.fps)
            else:
                written.append(f"{name}.png")
                save_png(media, directory / written[-1], {"model": model.name, "software": "emu3-jax"})
    for name in written:
        print(options.output / name)
