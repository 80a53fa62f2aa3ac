"""Decode codes to pictures and clips.

CODES.npz is what tokenize wrote. An array [rows, columns] becomes the picture DIR/NAME.png. An array
[latent frames, rows, columns] becomes the clip DIR/NAME.webp, with four frames for each latent frame. Codes hold no
frame rate: give the clip's rate with --fps.

examples:
  emu3-jax detokenize codes.npz -o decoded
  emu3-jax detokenize codes.npz --clip-format gif --fps 24 -o decoded
"""

import argparse

from emu3_jax.cli import common, outputs
from emu3_jax.generation import defaults


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("codes", type=common.path, metavar="CODES.npz", help="codes, as tokenize writes them")
    common.add_vision_model(command)
    common.add_fast_pixels(command)
    common.add_clip_format(command, "--clip-format")
    command.add_argument(
        "--fps",
        type=float,
        default=defaults.FPS,
        metavar="X",
        help="frames per second of clips, which codes do not tell (default: %(default)s)",
    )
    command.add_argument(
        "--frames",
        type=int,
        metavar="N",
        help="end clips after N frames: tokenize repeats the last frame up to a multiple of 4",
    )
    common.add_independent(command, "decode codes that `tokenize --independent` made")
    common.add_tile(command, "decode")
    command.add_argument(
        "-o", "--output", type=common.place, required=True, metavar="DIR", help="directory to write to"
    )
    outputs.add_no_clobber(command)


def run(options: argparse.Namespace) -> None:
    from emu3_jax.files import files_into
    from emu3_jax.media.clips import Clip, check_writable, save_clip
    from emu3_jax.media.codes import load_codes
    from emu3_jax.media.images import save_png
    from emu3_jax.progress import each

    arrays = load_codes(options.codes)
    endings = {name: options.clip_format if codes.ndim == 3 else "png" for name, codes in arrays.items()}
    if any(codes.ndim == 3 for codes in arrays.values()):
        check_writable(options.output / f"clip.{options.clip_format}", options.fps)
    files = {name: options.output / f"{name}.{ending}" for name, ending in endings.items()}
    written = outputs.Outputs(files.values(), no_clobber=options.no_clobber)
    settings = {name: getattr(options, name) for name in ("independent", "frames", "tile")}
    model = common.load_model(options)
    with files_into(options.output, replace=not options.no_clobber) as directory:
        for name, codes in each(arrays.items(), common.progress(options), "files", name="detokenize"):
            (media,) = model.detokenize([codes], **settings)
            if isinstance(media, Clip):
                save_clip(media.frames, directory / files[name].name, options.fps)
            else:
                save_png(media, directory / files[name].name, {"model": model.name, "software": "emu3-jax"})
        written.look()
    written.report()
    for file in files.values():
        print(file)
