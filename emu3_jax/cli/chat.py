"""Answer questions about pictures and clips.

Give one question for all files, or one question per file. With --together, or without --prompt, all files are shown in
one conversation. Without --prompt, questions are read from standard input, one a line.

The small embedded model was trained on few questions: "Describe the image.", "What is this?", "What category is this?",
"What style is this?", "What colour is it?", and questions about shapes and clips. Its answers are often wrong.

examples:
  emu3-jax chat out/000.png --prompt "Describe the image."
  emu3-jax chat before.png after.png --prompt "What changed?" --together
"""

import argparse

from emu3_jax.cli import common
from emu3_jax.generation import defaults


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("files", nargs="+", type=common.path_text, metavar="FILE", help="pictures or clips")
    command.add_argument("--prompt", nargs="+", metavar="TEXT", help="question, one for all files or one per file")
    command.add_argument(
        "--together",
        action="store_true",
        help="show all files in one conversation; each --prompt TEXT is its next question",
    )
    common.add_model(command)
    common.add_adapter(command)
    common.add_showing(command)
    command.add_argument(
        "--max-new-tokens",
        type=int,
        default=defaults.MAX_NEW_TOKENS,
        metavar="N",
        help="longest answer, in tokens (default: %(default)s)",
    )
    common.add_sampling(command, "answer", temperature=0.0)
    command.add_argument(
        "--json", action="store_true", help="print one JSON object per answer: file (or files), prompt, answer"
    )


def run(options: argparse.Namespace) -> None:
    from emu3_jax.cli.output import json_line
    from emu3_jax.errors import Emu3Error
    from emu3_jax.printable import printable

    def show(answer: str, line: str, **about) -> None:
        # A model may write characters that control a terminal.
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
        "parallel": options.parallel,
        "progress": common.progress(options),
    }
    if options.together or not options.prompt:
        conversation, media = model.converse(**settings), options.files
        for question in options.prompt or common.lines("> "):
            answer = conversation.ask(question, media)
            show(answer, answer, files=options.files, prompt=question)
            media = []  # shown with the first question
        if not conversation.turns:
            raise Emu3Error("there is no question: give --prompt TEXT, or questions on standard input, one per line")
        return
    prompts = options.prompt * len(options.files) if len(options.prompt) == 1 else options.prompt
    batching = {"batch_size": options.batch_size, "deterministic": options.deterministic}
    answers = model.chat(options.files, prompts, **batching, **settings)
    for file, prompt, answer in zip(options.files, prompts, answers, strict=True):
        show(answer, f"{file}: {answer}" if len(answers) > 1 else answer, file=file, prompt=prompt)
