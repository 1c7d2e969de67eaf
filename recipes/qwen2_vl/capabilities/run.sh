#!/bin/sh
# A small Qwen2-VL from nothing that names emoji in pictures and clips, says where they are and where they go. Each step
# does nothing if its result is there. Arguments go to the training, and FILES limits what it is trained on: `FILES=40 sh
# recipes/qwen2_vl/capabilities/run.sh --max_steps 4` shows the whole chain in a minute.
set -eu
cores=$(nproc)
export OMP_WAIT_POLICY=passive OMP_NUM_THREADS="$cores"
run=runs/qwen2_vl/capabilities

python recipes/qwen2_vl/capabilities/build_clips.py \
    ${FILES:+--canvases "$FILES" --clips "$FILES" --held-out "$FILES"}
python recipes/qwen2_vl/build_model.py --data $run/data --output $run/init --patch-size 8 --rope-theta 4 \
    --vision embed_dim=64 depth=3 --text hidden_size=96 intermediate_size=256 num_hidden_layers=3
open-qwen2vl pack $run/data/train.json --images $run/data/files --output $run/packs --processor $run/init \
    --max-length 768
OMP_NUM_THREADS=$((cores > 1 ? cores / 2 : 1)) \
    accelerate launch --quiet --config_file recipes/accelerate/two_cpu_processes.yaml \
    recipes/sft.py recipes/qwen2_vl/capabilities/sft.yaml "$@"
python recipes/qwen2_vl/capabilities/evaluate.py
