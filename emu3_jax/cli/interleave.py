"""Write texts and pictures in turn: DIR/000.md with its pictures DIR/000_0.png and so on, one document per TEXT.

It needs a model that was trained to write them, such as Emu3.5. The small embedded model tells stories of coloured
shapes, and edits pictures of one shape. The model decides where a picture begins and when the document ends.

examples:
  emu3-jax interleave "Tell a story in three pictures about a large purple triangle" -o out
  emu3-jax interleave "How to cook dumplings" --task howto --model emu35 -o out
  emu3-jax interleave "Make it green" --task x2i --image photo.png --model emu35-image -o out
"""

import argparse
import re
import typing

from emu3_jax.cli import common, outputs
from emu3_jax.generation import defaults
from emu3_jax.printable import printable

TASKS = ("t2i", "x2i", "story", "howto", "explore")  # `text.tasks.TASKS`, which would load the tokenizer


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("texts", nargs="+", type=common.text, metavar="TEXT", help="what to write about")
    command.add_argument(
        "-o", "--output", type=common.place, required=True, metavar="DIR", help="directory to write to"
    )
    command.add_argument(
        "--image",
        nargs="+",
        default=[],
        type=common.path_text,
        metavar="FILE",
        help="pictures to show with every TEXT, and clips if the model is of Emu3",
    )
    common.add_showing(command)
    command.add_argument(
        "--task",
        choices=TASKS,
        help="what a model of Emu3.5 shall write (it needs one): a picture, a picture from pictures, a story, a guide, "
        "or a walk through a scene",
    )
    command.add_argument(
        "--size",
        type=_size,
        default="auto",
        metavar="H*W",
        help="rows and columns of visual tokens of all pictures, or auto: the size of the last --image, else the "
        "model's choice (default: %(default)s)",
    )
    command.add_argument(
        "--max-size",
        type=_sides,
        metavar="H*W",
        help="largest rows and columns of visual tokens that the model may choose (default: what fits into "
        "--max-new-tokens)",
    )
    command.add_argument(
        "--guidance", type=float, metavar="G", help="guidance scale of pictures (default: the task's, or 3)"
    )
    command.add_argument(
        "--image-guidance", type=float, metavar="S", help="scale of guidance towards the given pictures (default: none)"
    )
    command.add_argument(
        "--max-new-tokens",
        type=common.whole(1, 1 << 24),
        metavar="N",
        help="longest document, in tokens (default: the task's number, or 1024)",
    )
    command.add_argument("--greedy", action="store_true", help="always take the likeliest token")
    command.add_argument(
        "--seed",
        type=int,
        default=defaults.SEED,
        metavar="N",
        help="seed of the first document; each next one adds 1 (default: %(default)s)",
    )
    command.add_argument(
        "--batch-size",
        type=int,
        default=defaults.BATCH_SIZE,
        metavar="N",
        help="documents computed at once (default: %(default)s)",
    )
    command.add_argument(
        "--parallel",
        type=common.parallel,
        default=defaults.PARALLEL,
        metavar="W",
        help="tokens that a pass of the decoder checks at once within pictures (2 to 128), or off; auto chooses on "
        "NVIDIA GPUs from Ampere on, is 8 for one document of a small model on CPUs, and off elsewhere; in float32 the "
        "result stays the same, up to rounding (default: %(default)s)",
    )
    command.add_argument(
        "--together",
        action="store_true",
        help="take the TEXTs as the turns of one conversation, on one page; --image is for the first turn",
    )
    command.add_argument(
        "--plans", action="store_true", help="also write what the model plans before an answer or a picture"
    )
    command.add_argument(
        "--live",
        type=common.path,
        metavar="FRAMES",
        help="also write each picture while it grows as FRAMES/000/0000.png and so on, with its finished rows; with "
        "--json, print a line each time: growing, rows, of",
    )
    command.add_argument("--html", action="store_true", help="also write each page as HTML")
    command.add_argument(
        "--save-tokens", action="store_true", help="also write DIR/tokens.npz: the ids of document i under the name i"
    )
    command.add_argument(
        "--json", action="store_true", help="print one JSON object per document: file, prompt, pieces, ended, tokens"
    )
    command.add_argument(
        "--allow-special",
        action="store_true",
        help="let control tokens in texts act as such (default: refuse such texts)",
    )
    outputs.add_no_clobber(command)
    common.add_model(command)
    common.add_adapter(command)


def _size(text: str) -> "tuple[int, int] | None":
    """The type of `--size`."""
    return None if text == "auto" else _sides(text, " or auto")


def _sides(text: str, other: str = "") -> tuple[int, int]:
    """The type of `--max-size`."""
    match = re.fullmatch(r"([1-9][0-9]{0,3})[*x]([1-9][0-9]{0,3})", text)
    if match is None:
        also = f",{other}" if other else ""
        raise argparse.ArgumentTypeError(f"{text!r} is no size: give H*W in visual tokens, such as 64*64{also}")
    return int(match[1]), int(match[2])


def run(options: argparse.Namespace) -> None:
    import contextlib

    import numpy as np

    from emu3_jax.cli.output import json_line
    from emu3_jax.cli.pages import Page, Terminal
    from emu3_jax.files import files_into
    from emu3_jax.generation.pieces import Document, Growing, Piece
    from emu3_jax.media.codes import save_codes
    from emu3_jax.media.live import live_frames

    count = 1 if options.together else len(options.texts)
    width = max(3, len(str(count - 1)))
    pages = [Page(f"{row:0{width}d}", options.output, spoken=options.together) for row in range(count)]
    names = [f"{row:0{width}d}.md" for row in range(count)]
    files = [options.output / name for name in names]
    if options.html:
        files += [file.with_suffix(".html") for file in files]
    tokens = options.output / "tokens.npz"
    written = outputs.Outputs([*files, tokens] if options.save_tokens else files, no_clobber=options.no_clobber)
    model = common.load_model(options)
    settings: dict[str, typing.Any] = {"text_temperature": 0.0, "temperature": 0.0} if options.greedy else {}
    told = (
        "task", "size", "max_size", "guidance", "image_guidance", "max_new_tokens", "seed", "parallel", "allow_special",
        "clips_as", "frames", "fps",
    )  # fmt: skip
    settings |= {name: getattr(options, name) for name in told} | {"progress": common.progress(options)}

    terminal = Terminal() if len(pages) == 1 and not options.json else None

    def show(row: int, piece: Piece) -> None:
        """Writes a picture, and shows the piece if there is one page only."""
        if piece.kind == "plan" and not options.plans:
            return
        if live is not None and piece.picture is not None:
            live(row, pages[row].pictures, np.asarray(piece.picture)[None])
        shown = pages[row].add(piece, directory)
        if shown and terminal is not None:
            terminal.end(shown)

    def grow(row: int, piece: Growing) -> None:
        """Writes the finished rows of a picture that is being written."""
        assert live is not None
        number = pages[row].pictures
        live(row, number, np.asarray(piece.picture)[None])
        if options.json:
            file = options.live / f"{row:03d}" / f"{number:04d}.png"
            print(json_line({"growing": str(file), "rows": len(piece.codes), "of": piece.size[0]}), flush=True)

    def talk() -> list[Document]:
        """All texts as turns of one conversation."""
        conversation = model.interleave_turns(**settings)
        for number, text in enumerate(options.texts):
            pages[0].ask(text)
            if not options.json:
                print(printable(f"> {text}"), flush=True)
            conversation.send(
                text, options.image if number == 0 else (), on_piece=lambda piece: show(0, piece),
                on_rows=options.live and (lambda piece: grow(0, piece)), on_text=terminal and terminal.grow,
            )  # fmt: skip
        return [document for _, document in conversation.turns]

    def write() -> list[Document]:
        """One document per text."""
        for page, text in zip(pages, options.texts, strict=True):
            page.ask(text)
        return model.interleave(
            options.texts, options.image, on_piece=show, on_rows=grow if options.live else None,
            on_text=terminal and (lambda _, text: terminal.grow(text)), batch_size=options.batch_size, **settings,
        )  # fmt: skip

    with (
        files_into(options.output, replace=not options.no_clobber) as directory,
        live_frames(options.live) if options.live else contextlib.nullcontext() as live,
    ):
        documents = talk() if options.together else write()
        for page, name in zip(pages, names, strict=True):
            (directory / name).write_text(page.markdown(), "utf-8")
            if options.html:
                (directory / name).with_suffix(".html").write_text(page.html(), "utf-8")
        if options.save_tokens:
            save_codes(directory / tokens.name, {str(row): document.ids for row, document in enumerate(documents)})
        written.look()
    written.report()
    answers = [(file, answer) for file, page in zip(files, pages, strict=False) for answer in page.answers]
    if not options.json:
        for file in files:
            print(file, flush=True)
        return
    for (file, answer), text, document in zip(answers, options.texts, documents, strict=True):
        about = {
            "file": str(file), "prompt": text, "pieces": answer, "ended": document.ended,
            "tokens": len(document.ids) - document.prompt_length,
        }  # fmt: skip
        print(json_line(about), flush=True)
