"""Answer a prompt about each picture or clip; with --together, or without --prompt, hold one conversation about all.

Without --prompt, questions are read from standard input, one a line.
"""

import argparse

from emu3_jax.cli import common
from emu3_jax.generation import defaults


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "files", nargs="+", type=common.path_text, metavar="FILE", help="pictures or clips, each asked about on its own"
    )
    command.add_argument("--prompt", nargs="+", metavar="TEXT", help="one for all files, or one each; see --together")
    command.add_argument(
        "--together",
        action="store_true",
        help="show all files in one conversation, of which the prompts are the turns, one after the other",
    )
    common.add_model(command)
    common.add_adapter(command)
    command.add_argument(
        "--clips-as",
        choices=("auto", "clip", "images"),
        default="auto",
        help="show a clip as one, or its frames as pictures (default: as the model was trained)",
    )
    command.add_argument(
        "--frames", type=int, metavar="N", help="of a clip (default: those of the training; as pictures, 8)"
    )
    command.add_argument("--fps", type=float, metavar="F", help="of a clip's frames that are shown (default: spread)")
    command.add_argument(
        "--max-new-tokens",
        type=int,
        default=defaults.MAX_NEW_TOKENS,
        metavar="N",
        help="longest answer (default: %(default)s)",
    )
    common.add_sampling(command, temperature=0.0)
    command.add_argument("--json", action="store_true", help="one JSON object a line: file or files, prompt, answer")


def run(options: argparse.Namespace) -> None:
    from emu3_jax.cli.output import json_line
    from emu3_jax.errors import Emu3Error
    from emu3_jax.printable import printable

    def show(answer: str, line: str, **about) -> None:
        # A model may write what moves a terminal's cursor.
        print(json_line({**about, "answer": answer}) if options.json else printable(line, keep="\n"), flush=True)

    model = common.load_model(options)
    settings = {
        "clips_as": options.clips_as,
        "frames": options.frames,
        "fps": options.fps,
        "max_new_tokens": options.max_new_tokens,
        "temperature": 0.0 if options.greedy else options.temperature,
        "top_k": options.top_k,
        "top_p": options.top_p,
        "seed": options.seed,
        "allow_special": options.allow_special,
        "progress": common.progress(options),
    }
    if options.together or not options.prompt:
        conversation, media = model.converse(**settings), options.files
        for question in options.prompt or common.lines("> "):
            answer = conversation.ask(question, media)
            show(answer, answer, files=options.files, prompt=question)
            media = []  # shown with the first question
        if not conversation.turns:
            raise Emu3Error("there is no question: give --prompt TEXT, or questions on standard input, one a line")
        return
    prompts = options.prompt * len(options.files) if len(options.prompt) == 1 else options.prompt
    batching = {"batch_size": options.batch_size, "deterministic": options.deterministic}
    answers = model.chat(options.files, prompts, **batching, **settings)
    for file, prompt, answer in zip(options.files, prompts, answers, strict=True):
        show(answer, f"{file}: {answer}" if len(answers) > 1 else answer, file=file, prompt=prompt)
