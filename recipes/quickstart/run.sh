#!/bin/sh
# The quickstart from drawings to report; `make quickstart` calls it. Each step does nothing if its result is there.
set -eu
: "${OMP_NUM_THREADS:=$(nproc)}" # without it `accelerate launch` gives a process on a CPU one thread
# Threads that wait without spinning: on cores that are shared with anything else, spinning costs a factor of ten.
: "${OMP_WAIT_POLICY:=passive}"
export OMP_NUM_THREADS OMP_WAIT_POLICY

python recipes/quickstart/build_data.py
python recipes/quickstart/build_backbones.py
open-qwen2vl pack runs/quickstart/data/train-*.tar --output runs/quickstart/packs \
    --tokenizer runs/quickstart/backbones/text --image-seq-length 9 --max-length 128
accelerate launch --quiet --config_file recipes/accelerate/single_process.yaml \
    recipes/pretrain.py recipes/quickstart.yaml
python recipes/quickstart/report.py
