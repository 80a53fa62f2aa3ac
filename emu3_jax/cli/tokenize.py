"""Encode pictures and clips to codes: one int32 array per input, keyed by file stem, [h, w] or [t, h, w]."""

import argparse

from emu3_jax.cli import common


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("files", nargs="+", type=common.path, metavar="FILE", help="pictures or clips")
    common.add_model(command)
    common.add_resampling(command)
    common.add_independent(command)
    common.add_tile(command)
    command.add_argument("-o", "--output", type=common.path, required=True, metavar="CODES.npz")


def run(options: argparse.Namespace) -> None:
    import numpy as np
    from tqdm import tqdm

    from emu3_jax.errors import Emu3Error
    from emu3_jax.files import new_file

    stems = [file.stem for file in options.files]
    for file, stem in zip(options.files, stems, strict=True):
        if stems.count(stem) > 1:
            raise Emu3Error(f"{file}: another input is called {stem!r} too; codes are keyed by file stem: rename one")
    if options.output.suffix != ".npz":
        raise Emu3Error(f"output {options.output}: its name must end in .npz")
    model = common.load_model(options)
    with new_file(options.output) as temporary:
        bar = tqdm(options.files, unit=" files", disable=True if options.quiet else None, leave=False)
        settings = {name: getattr(options, name) for name in ("independent", "fps", "frames", "tile")}
        codes = {file.stem: model.tokenize([file], **settings)[0] for file in bar}
        np.savez(temporary, **codes)
    for stem, array in codes.items():
        print(f"{stem}: {'x'.join(map(str, array.shape))} codes")
