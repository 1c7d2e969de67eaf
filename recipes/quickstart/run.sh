#!/bin/sh
# The quickstart from drawings to report; `make quickstart` calls it. Each step does nothing if its result is there.
set -eu
: "${OMP_NUM_THREADS:=$(nproc)}" # without it `accelerate launch` gives a process on a CPU one thread
export OMP_NUM_THREADS

python recipes/quickstart/build_data.py
python recipes/quickstart/build_backbones.py
open-qwen2vl pack runs/quickstart/data/train-*.tar --output runs/quickstart/packs \
    --tokenizer runs/quickstart/backbones/text --image-seq-length 4 --max-length 96
accelerate launch --quiet --config_file recipes/accelerate/single_process.yaml \
    recipes/pretrain.py recipes/quickstart.yaml
python recipes/quickstart/report.py
