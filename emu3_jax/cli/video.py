"""Generate a clip for each prompt, or continue a clip: DIR/000.webp and so on.

No published weights generate clips. Use the embedded model, or one that you trained on clips. The embedded model knows
"animated emoji of THING" and moving shapes, in clips of eight frames.

examples:
  emu3-jax video "a small blue circle moves right on a white background" -o clips
  emu3-jax video "a small blue circle moves right on a white background" --extend clips/000.webp -o longer
"""

import argparse

from emu3_jax.cli import common, outputs
from emu3_jax.generation import defaults


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("prompts", nargs="+", type=common.text, metavar="PROMPT", help="what to show, in one argument")
    common.add_model(command)
    common.add_adapter(command)
    common.add_fast_pixels(command)
    command.add_argument(
        "--frames",
        type=int,
        default=defaults.FRAMES,
        metavar="N",
        help="new frames of each clip (default: %(default)s)",
    )
    command.add_argument(
        "--fps",
        type=float,
        metavar="X",
        help=f"frames per second of the clips (default: as in --extend, or {defaults.FPS:g})",
    )
    command.add_argument(
        "--extend", type=common.path, metavar="CLIP", help="clip or picture that the new frames continue"
    )
    command.add_argument(
        "--window",
        type=int,
        metavar="N",
        help="frames generated in one pass, longer clips take several (default: the training length)",
    )
    command.add_argument("--ratio", metavar="W:H", help="width:height of the clips (default: as in --extend, or 1:1)")
    common.add_generation(command, "clip")
    common.add_clip_format(command, "--format")
    command.add_argument(
        "--live",
        type=common.path,
        metavar="FRAMES",
        help="also write each new frame as FRAMES/000/0000.png and so on at once; they stay after an interruption",
    )
    command.add_argument(
        "-o", "--output", type=common.place, required=True, metavar="DIR", help="directory to write to"
    )
    outputs.add_no_clobber(command)


def run(options: argparse.Namespace) -> None:
    import contextlib

    from emu3_jax import distributed
    from emu3_jax.files import files_into
    from emu3_jax.media.clips import Clip, check_writable, save_clip
    from emu3_jax.media.inputs import as_media
    from emu3_jax.media.live import live_frames

    settings = common.generation(options)
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
        files_into(options.output, replace=not options.no_clobber) if first else contextlib.nullcontext() as directory,
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
            **settings,
            progress=common.progress(options),
        )
        if not first:
            return
        for file, clip in zip(files, clips, strict=True):
            save_clip(clip.frames, directory / file.name, clip.fps)
        written.look()
    written.report()
    for file in files:
        print(file)
