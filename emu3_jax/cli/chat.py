"""Answer a prompt about each picture."""

import argparse

from emu3_jax.cli import common


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("files", nargs="+", metavar="FILE", help="pictures or clips, each asked about on its own")
    command.add_argument("--prompt", nargs="+", required=True, metavar="TEXT", help="one for all files, or one each")
    common.add_model(command)
    command.add_argument("--max-new-tokens", type=int, default=1024, metavar="N", help="longest answer (default: 1024)")
    common.add_sampling(command, temperature=0.0)
    command.add_argument("--json", action="store_true", help="one JSON object a line: file, prompt, answer")


def run(options: argparse.Namespace) -> None:
    import json

    prompts = options.prompt * len(options.files) if len(options.prompt) == 1 else options.prompt
    answers = common.load_model(options).chat(
        options.files,
        prompts,
        max_new_tokens=options.max_new_tokens,
        temperature=0.0 if options.greedy else options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
        allow_special=options.allow_special,
        batch_size=options.batch_size,
        progress=common.progress(options),
    )
    for file, prompt, answer in zip(options.files, prompts, answers, strict=True):
        if options.json:
            print(json.dumps({"file": file, "prompt": prompt, "answer": answer}, ensure_ascii=False))
        else:
            print(f"{file}: {answer}" if len(answers) > 1 else answer)
