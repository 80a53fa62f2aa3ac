"""Encode pictures and clips to codes.

CODES.npz gets an int32 array for each FILE, under the file's name without its ending: [rows, columns] for a picture,
[latent frames, rows, columns] for a clip. Four frames of a clip make one latent frame. The vision tokenizer of Emu3.5
knows pictures alone.

examples:
  emu3-jax tokenize photo.jpg -o codes.npz
  emu3-jax tokenize photo.jpg clip.webp --frames 8 -o codes.npz
  emu3-jax tokenize photo.jpg --model out/emu35-vision --area 518400 -o codes.npz
"""

import argparse

from emu3_jax.cli import common, outputs


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("files", nargs="+", type=common.path, metavar="FILE", help="pictures and clips")
    common.add_vision_model(command)
    common.add_resampling(command)
    common.add_independent(
        command,
        "cut clips into pieces of 4 frames, each encoded on its own, as the reference's script does: other codes",
    )
    common.add_tile(command, "encode")
    command.add_argument(
        "--area",
        type=int,
        metavar="N",
        help="with the vision tokenizer of Emu3.5: resize pictures to about N pixels (default: as the bundle says)",
    )
    command.add_argument("-o", "--output", type=common.place, required=True, metavar="CODES.npz", help="file to write")
    outputs.add_no_clobber(command)


def run(options: argparse.Namespace) -> None:
    from emu3_jax.errors import Emu3Error
    from emu3_jax.files import new_file
    from emu3_jax.media.codes import code_names, save_codes
    from emu3_jax.media.frames import check_resampling
    from emu3_jax.progress import each

    names = code_names(options.files)
    if options.output.suffix != ".npz":
        raise Emu3Error(f"output {options.output}: its name must end in .npz")
    check_resampling(options.fps, options.frames)
    written = outputs.Outputs([options.output], no_clobber=options.no_clobber)
    model = common.load_model(options)
    with new_file(options.output, replace=not options.no_clobber) as temporary:
        settings = {name: getattr(options, name) for name in ("independent", "fps", "frames", "tile", "area")}
        files = each(options.files, common.progress(options), "files", name="tokenize")
        codes = {name: model.tokenize([file], **settings)[0] for name, file in zip(names, files, strict=True)}
        save_codes(temporary, codes)
        written.look()
    written.report()
    for name, array in codes.items():
        print(f"{name}: {'x'.join(map(str, array.shape))} codes")
