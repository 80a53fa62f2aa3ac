"""Generate or extend one clip per prompt: DIR/000.webp ... For models trained on clips; no published weights are."""

import argparse

from emu3_jax.cli import common, outputs
from emu3_jax.generation import defaults


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("prompts", nargs="+", metavar="PROMPT", help="what to show")
    common.add_model(command)
    common.add_adapter(command)
    common.add_fast_pixels(command)
    command.add_argument(
        "--frames", type=int, default=defaults.FRAMES, metavar="N", help="new ones of each clip (default: %(default)s)"
    )
    command.add_argument(
        "--fps", type=float, metavar="F", help=f"frames per second (default: those of --extend, or {defaults.FPS:g})"
    )
    command.add_argument("--extend", type=common.path, metavar="CLIP", help="go on from this clip or picture")
    command.add_argument("--window", type=int, metavar="N", help="frames of one pass (default: as in training)")
    command.add_argument("--ratio", metavar="W:H", help="default: that of --extend, or 1:1")
    common.add_generation(command)
    common.add_clip_format(command, "--format")
    command.add_argument(
        "--live",
        type=common.path,
        metavar="FRAMES",
        help="also write each new frame to FRAMES/000/0000.png ... at once; those stay if the command is interrupted",
    )
    command.add_argument("-o", "--output", type=common.place, required=True, metavar="DIR")
    outputs.add_no_clobber(command)


def run(options: argparse.Namespace) -> None:
    import contextlib

    from emu3_jax import distributed
    from emu3_jax.files import files_into
    from emu3_jax.media.clips import Clip, check_writable, save_clip
    from emu3_jax.media.inputs import as_media
    from emu3_jax.media.live import live_frames

    distributed.start()
    extend = options.extend and as_media(options.extend)
    fps = options.fps
    if fps is None:
        fps = extend.fps if isinstance(extend, Clip) else defaults.FPS
    files = [options.output / f"{row:03d}.{options.format}" for row in range(len(options.prompts))]
    check_writable(files[0], fps)
    # All processes of a mesh compute; the first one shows and writes.
    first = distributed.first()
    if first:
        written = outputs.Outputs(files, no_clobber=options.no_clobber)
    model = common.load_model(options)
    with (
        files_into(options.output) if first else contextlib.nullcontext() as directory,
        live_frames(options.live) if first and options.live else contextlib.nullcontext() as on_frames,
    ):
        clips = model.generate_clips(
            options.prompts,
            frames=options.frames,
            fps=fps,
            extend=extend,
            window=options.window,
            ratio=options.ratio,
            on_frames=on_frames,
            **common.generation(options),
            progress=common.progress(options),
        )
        if not first:
            return
        for file, clip in zip(files, clips, strict=True):
            save_clip(clip.frames, directory / file.name, clip.fps)
        written.look()
    for file in files:
        print(file)
    written.report()
