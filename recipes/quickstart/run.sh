#!/bin/sh
# The quickstart from drawings to two reports; `make quickstart` calls it. Each step does nothing if its result is there.
# Arguments go to both trainings. EMOJI limits the drawings, each with all its tones, and PICTURES those of the second
# half on each side: `EMOJI=100 PICTURES=40 sh recipes/quickstart/run.sh --max_steps 4` shows the whole chain in a minute.
# `SEED` is that of the random weights and of both trainings, and `VALIDATION=1` asks about pictures on which options may
# be chosen.
set -eu
cores=$(nproc)
# Threads that wait without spinning: on cores that are shared with anything else, spinning costs a factor of ten.
export OMP_WAIT_POLICY=passive OMP_NUM_THREADS="$cores"

python recipes/quickstart/build_data.py ${VALIDATION:+--validation} ${EMOJI:+--limit "$EMOJI"}
python recipes/quickstart/build_backbones.py --seed "${SEED:-0}"
open-qwen2vl pack runs/quickstart/data/train-*.tar --output runs/quickstart/packs \
    --tokenizer runs/quickstart/backbones/text --image-seq-length 9 --max-length 128
train() {
    OMP_NUM_THREADS=$((cores > 1 ? cores / 2 : 1)) \
        accelerate launch --quiet --config_file recipes/accelerate/two_cpu_processes.yaml "$@"
}
train recipes/pretrain.py recipes/quickstart.yaml --seed "${SEED:-0}" "$@"
python recipes/quickstart/report.py

python recipes/quickstart/build_sft_data.py ${VALIDATION:+--validation} ${PICTURES:+--limit "$PICTURES"}
for questions in shapes others; do
    open-qwen2vl pack "runs/quickstart/sft/data/train-$questions.json" --images runs/quickstart/sft/data/images \
        --output "runs/quickstart/sft/packs/$questions" --tokenizer runs/quickstart/model --image-seq-length 36 \
        --max-length 768 --share-images
done
train recipes/sft.py recipes/sft_quickstart.yaml --seed "${SEED:-0}" "$@"
python recipes/quickstart/report_sft.py
