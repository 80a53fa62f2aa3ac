"""Two small tasks of lmms-eval whose right answers are the embedded model's own, for scripts/check_harness.sh.

    python scripts/check_harness.py make DIR       # pictures, questions and tasks
    python scripts/check_harness.py compare DIR    # of the scores in DIR/results: each must be 1

The right answer to a question is what `Emu3.chat` says. A wrong picture, a wrong order of requests, a prompt of another
format, or a wrong sign of log-likelihoods would give scores below 1.
"""

import json
import pathlib
import sys

PROMPTS = (
    "noto emoji of red apple",
    "noto emoji of star",
    "noto emoji of dog face",
    "flat emoji of blue book",
    "noto emoji of tree",
)
QUESTION = "Describe the image."

SHARED = """
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
doc_to_visual: !function check_pictures.pictures
doc_to_text: "{{{{question}}}}"
"""
ANSWERS = """task: emu3_jax_answers
output_type: generate_until
doc_to_target: "{{answer}}"
generation_kwargs:
  max_new_tokens: 32
  until: ["\\n\\n"]
process_results: !function check_pictures.compare
metric_list:
  - metric: same
    aggregation: mean
    higher_is_better: true
"""
CHOICES = """task: emu3_jax_choices
output_type: multiple_choice
doc_to_target: "{{right}}"
doc_to_choice: "{{choices}}"
target_delimiter: ""
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""
FUNCTIONS = """from PIL import Image


def pictures(doc):
    return [Image.open(doc["picture"])]


def compare(doc, results):
    return {"same": float(results[0] == doc["answer"])}
"""


def make(root: pathlib.Path) -> None:
    import emu3_jax

    tasks = root / "tasks"
    tasks.mkdir(parents=True)
    model = emu3_jax.load()
    pictures = model.generate(list(PROMPTS), seed=3)
    answers = model.chat(pictures, QUESTION, max_new_tokens=32)
    choices = sorted({answer.strip() for answer in answers})
    if len(choices) < 3:
        raise SystemExit(f"the embedded model gives only {len(choices)} different answers: {choices}")
    lines = []
    for number, (picture, answer) in enumerate(zip(pictures, answers, strict=True)):
        file = root / f"{number}.png"
        picture.save(file)
        line = {"picture": str(file), "question": QUESTION, "answer": answer.strip(), "choices": choices}
        lines.append({**line, "right": choices.index(answer.strip())})
        print(f"{PROMPTS[number]}: {answer.strip()}")
    data = root / "questions.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tasks / "check_pictures.py").write_text(FUNCTIONS)
    for name, task in (("answers", ANSWERS), ("choices", CHOICES)):
        (tasks / f"{name}.yaml").write_text(task + SHARED.format(data=data))


def compare(root: pathlib.Path) -> None:
    files = sorted((root / "results").rglob("*results.json"))
    if len(files) != 1:
        raise SystemExit(f"{root / 'results'} has {len(files)} files of results: there must be one")
    results = json.loads(files[0].read_text())["results"]
    found = {
        "answers": results["emu3_jax_answers"]["same,none"],
        "choices": results["emu3_jax_choices"]["acc,none"],
    }
    print(f"share of answers as Emu3.chat gives them: {found['answers']}; of right choices: {found['choices']}")
    if found != {"answers": 1.0, "choices": 1.0}:
        raise SystemExit("both must be 1: the adapter or lmms-eval has changed")


if __name__ == "__main__":
    {"make": make, "compare": compare}[sys.argv[1]](pathlib.Path(sys.argv[2]))
