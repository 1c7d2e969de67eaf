#!/bin/sh
# A small Qwen2-VL from nothing, on emoji of mixed sizes, and the same model on squares of as many tokens. Each step does
# nothing if its result is there. Arguments go to both trainings, and EMOJI limits the pictures:
# `EMOJI=40 sh recipes/qwen2_vl/run.sh --max_steps 4` shows the whole chain in two minutes.
set -eu
cores=$(nproc)
export OMP_WAIT_POLICY=passive OMP_NUM_THREADS="$cores"

python recipes/qwen2_vl/build_pictures.py ${EMOJI:+--limit "$EMOJI"}
python recipes/qwen2_vl/build_model.py

run() {
    name=$1
    size=$2
    shift 2
    open-qwen2vl pack runs/qwen2_vl/data/train-*.tar --output "runs/qwen2_vl/$name/packs" \
        --processor runs/qwen2_vl/init --max-length 128 $size
    OMP_NUM_THREADS=$((cores > 1 ? cores / 2 : 1)) \
        accelerate launch --quiet --config_file recipes/accelerate/two_cpu_processes.yaml \
        recipes/pretrain.py recipes/qwen2_vl/pretrain.yaml \
        --train_packs "runs/qwen2_vl/$name/packs" --output_dir "runs/qwen2_vl/$name" "$@"
}
run dynamic "" "$@"
run fixed "--fixed-resolution 96" "$@"
python recipes/qwen2_vl/compare.py runs/qwen2_vl/dynamic runs/qwen2_vl/fixed
