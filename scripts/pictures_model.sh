#!/usr/bin/env bash
# Trains the embedded model, of 64x64 pixels, under out/: data, token data, decoder, evaluation. You may stop the script
# and start it again: steps whose result exists are skipped, and training resumes from its newest checkpoint. PRETRAIN,
# SFT and EVALUATE may hold further options, for example:
#     PRETRAIN="--set steps=100" bash scripts/pictures_model.sh
# The vision tokenizer is the one in scripts/picture_data/tokenizer. If VISION is set, even to nothing, the script trains
# it anew, with these options. If REFINE or GRPO is set, the script also fine-tunes the decoder further, or tunes it by
# GRPO, with these options. The package's weights are those before both, see docs/embedded_model.md.
# shellcheck disable=SC2086 # PRETRAIN and the others hold several words
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
emu3_jax() { "$python" -m emu3_jax.cli.main "$@"; }

[ -d out/pictures64 ] || "$python" scripts/build_pictures.py out/pictures64
tokenizer=scripts/picture_data/tokenizer
if [ -n "${VISION+set}" ]; then
    tokenizer=out/vision_pictures/model
    [ -d $tokenizer ] || emu3_jax train configs/vision_pictures.py $VISION
fi
[ -d out/pictures_start ] || "$python" scripts/emoji_bundle.py $tokenizer -o out/pictures_start
prepare() {
    [ -f "out/pictures_tokens/$1/index.json" ] ||
        emu3_jax prepare "out/pictures64/$1.jsonl" --model out/pictures_start --keep-size -o "out/pictures_tokens/$1"
}
for set in {prompts,questions}_train prompts_heldout questions_heldout_style two_shapes/train \
    arrangements/{train,questions_train,heldout} stories/{stories,edits}_{train,heldout} \
    emoji/{t2i_upright,clip_train,clip_questions,text_train,clip_heldout}; do
    prepare "$set"
done
[ -d out/pictures_pretrain/model ] || emu3_jax train configs/pictures_pretrain.py ${PRETRAIN:-}
[ -d out/pictures_sft/model ] || emu3_jax train configs/pictures_sft.py ${SFT:-}
model=out/pictures_sft/model
if [ -n "${REFINE+set}" ]; then
    [ -d out/pictures64/views ] || "$python" scripts/picture_views.py out/pictures64
    for set in views_{questions,clips}; do
        prepare "$set"
    done
    model=out/pictures_refine/model
    [ -d $model ] || emu3_jax train configs/pictures_refine.py $REFINE
fi
if [ -n "${GRPO+set}" ]; then
    [ -d out/pictures_grpo/model ] || emu3_jax train configs/grpo_pictures.py --set model.bundle=$model $GRPO
    model=out/pictures_grpo/model
fi
emu3_jax evaluate configs/eval_pictures.py --set model=$model ${EVALUATE:-}
