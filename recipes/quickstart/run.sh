#!/bin/sh
# The quickstart from drawings to report; `make quickstart` calls it. Each step does nothing if its result is there.
# Arguments go to the training: `run.sh --max_steps 4` shows the whole chain in a minute.
set -eu
cores=$(nproc)
# Threads that wait without spinning: on cores that are shared with anything else, spinning costs a factor of ten.
export OMP_WAIT_POLICY=passive OMP_NUM_THREADS="$cores"

python recipes/quickstart/build_data.py
python recipes/quickstart/build_backbones.py
open-qwen2vl pack runs/quickstart/data/train-*.tar --output runs/quickstart/packs \
    --tokenizer runs/quickstart/backbones/text --image-seq-length 9 --max-length 128
OMP_NUM_THREADS=$((cores > 1 ? cores / 2 : 1)) \
    accelerate launch --quiet --config_file recipes/accelerate/two_cpu_processes.yaml \
    recipes/pretrain.py recipes/quickstart.yaml "$@"
python recipes/quickstart/report.py
