#!/usr/bin/env bash
# Trains the embedded model, of 64x64 pixels, under out/: data, token data, decoder, evaluation. You may stop the script
# and start it again: steps whose result exists are skipped, and training resumes from its newest checkpoint. PRETRAIN,
# SFT, REFINE, FURTHER and EVALUATE may hold further options, for example:
#     PRETRAIN="--set steps=100" bash scripts/pictures_model.sh
# The vision tokenizer is the one in scripts/picture_data/tokenizer. If VISION is set, even to nothing, the script
# trains it anew, with these options. If GRPO is set, the script also tunes the decoder by GRPO, with these options. The
# package's weights are those before it, see docs/embedded_model.md.
# shellcheck disable=SC2086 # PRETRAIN and the others hold several words
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
emu3_jax() { "$python" -m emu3_jax.cli.main "$@"; }

[ -d out/pictures64 ] || "$python" scripts/build_pictures.py out/pictures64
[ -d out/pictures64/views ] || "$python" scripts/picture_views.py out/pictures64
[ -d out/pictures64/further ] ||
    "$python" scripts/picture_views.py out/pictures64 --name further --seed 2 --keep-colours
tokenizer=scripts/picture_data/tokenizer
if [ -n "${VISION+set}" ]; then
    tokenizer=out/vision_pictures/model
    [ -d $tokenizer ] || emu3_jax train configs/vision_pictures.py $VISION
fi
[ -d out/pictures_start ] || "$python" scripts/emoji_bundle.py $tokenizer -o out/pictures_start
for set in {prompts,questions}_train prompts_heldout questions_heldout_style two_shapes/train \
    arrangements/{train,questions_train,heldout} stories/{stories,edits}_{train,heldout} \
    emoji/{t2i_upright,clip_train,clip_questions,text_train,clip_heldout} {views,further}_{questions,clips}; do
    [ -f out/pictures_tokens/$set/index.json ] ||
        emu3_jax prepare out/pictures64/$set.jsonl --model out/pictures_start --keep-size -o out/pictures_tokens/$set
done
[ -d out/pictures_pretrain/model ] || emu3_jax train configs/pictures_pretrain.py ${PRETRAIN:-}
[ -d out/pictures_sft/model ] || emu3_jax train configs/pictures_sft.py ${SFT:-}
[ -d out/pictures_refine/model ] || emu3_jax train configs/pictures_refine.py ${REFINE:-}
[ -d out/pictures_further/model ] || emu3_jax train configs/pictures_further.py ${FURTHER:-}
model=out/pictures_further/model
if [ -n "${GRPO+set}" ]; then
    [ -d out/pictures_grpo/model ] || emu3_jax train configs/grpo_pictures.py $GRPO
    model=out/pictures_grpo/model
fi
emu3_jax evaluate configs/eval_pictures.py --set model=$model ${EVALUATE:-}
