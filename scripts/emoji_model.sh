#!/usr/bin/env bash
# Trains the former embedded model, of 32x32 pixels, from scratch, under out/: data, vision tokenizer, token data,
# decoder, evaluation. scripts/pictures_model.sh trains the one that the package has. You may stop the script and start
# it again: steps whose result exists are skipped, and training resumes from its newest checkpoint. Training the vision
# tokenizer takes some minutes on one H100. VISION, PRETRAIN, SFT and EVALUATE may hold further options, for example:
#     VISION="--set steps=100" bash scripts/emoji_model.sh
# shellcheck disable=SC2086 # VISION and the others hold several words
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
emu3_jax() { "$python" -m emu3_jax.cli.main "$@"; }

[ -d out/emoji ] || "$python" scripts/build_emoji.py out/emoji
[ -d out/vision_emoji/model ] || emu3_jax train configs/vision_emoji.py ${VISION:-}
[ -d out/emoji_start ] || "$python" scripts/emoji_bundle.py out/vision_emoji/model -o out/emoji_start
for set in {t2i,i2t,clip,text}_train t2i_upright i2t_closeups clip_questions {t2i,clip}_heldout i2t_heldout_style \
    clip_questions_heldout; do
    [ -f out/emoji_tokens/$set/index.json ] ||
        emu3_jax prepare out/emoji/$set.jsonl --model out/emoji_start --keep-size -o out/emoji_tokens/$set
done
[ -d out/emoji_pretrain/model ] || emu3_jax train configs/emoji_pretrain.py ${PRETRAIN:-}
[ -d out/emoji_sft/model ] || emu3_jax train configs/emoji_sft.py ${SFT:-}
emu3_jax evaluate configs/eval_emoji.py --set model=out/emoji_sft/model ${EVALUATE:-}
