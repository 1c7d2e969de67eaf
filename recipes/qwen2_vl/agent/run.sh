#!/bin/sh
# A small Qwen2-VL learns to search a board of emoji by calls of functions. Each step does nothing if its result is there.
# Arguments go to both trainings; BOARDS and HELD_OUT limit what is learned and asked:
# `BOARDS=40 HELD_OUT=4 sh recipes/qwen2_vl/agent/run.sh --max_steps 4` shows the whole chain in two minutes.
set -eu
OMP_NUM_THREADS=$(nproc)
export OMP_WAIT_POLICY=passive OMP_NUM_THREADS
folder=runs/qwen2_vl/agent

python recipes/qwen2_vl/agent/build_transcripts.py ${BOARDS:+--boards "$BOARDS"}
open-qwen2vl pack $folder/data/transcripts.jsonl --images $folder/data --output $folder/packs --processor $folder/init \
    --max-length 2048
open-qwen2vl pack $folder/captions.tar --output $folder/captions/packs --processor $folder/init --max-length 1024
python recipes/pretrain.py recipes/qwen2_vl/agent/captions.yaml "$@"
python recipes/sft.py recipes/qwen2_vl/agent/agent.yaml "$@"
python recipes/qwen2_vl/agent/evaluate.py ${HELD_OUT:+--boards "$HELD_OUT"}
