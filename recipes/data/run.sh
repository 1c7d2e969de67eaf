#!/bin/sh
# From a raw pool to a model trained on what was worth keeping; docs/data.md tells the story. Each step does nothing if
# its result is there, so the same command resumes after a kill.
# LIMIT=60 takes so many emoji only, EPOCHS those of the scorer, STEPS those of the pre-training.
set -eu
export OMP_WAIT_POLICY=passive
at=runs/data

python recipes/data/build_pool.py --output "$at/pairs" ${LIMIT:+--limit "$LIMIT"}
python recipes/data/train_scorer.py --pairs "$at/pairs/scorer" --output "$at/scorer" \
    ${EPOCHS:+--epochs "$EPOCHS"} ${BATCH_SIZE:+--batch-size "$BATCH_SIZE"}

# Three scores of the pool: how well picture and caption go together, plain figures, and hashes that tell duplicates.
open-qwen2vl score "$at/pairs/pool" --scorer clip --model "local-dir:$at/scorer" --output "$at/scores"
open-qwen2vl score "$at/pairs/pool" --scorer basic --output "$at/scores"
open-qwen2vl score "$at/pairs/pool" --scorer image-hash --output "$at/scores"
# OpenMoji's names are often one word, and its pictures have 96 pixels: of the basic filter only the shape is asked for.
open-qwen2vl filter "$at/scores" --keep "top(clip, 0.333) and basic.aspect_ratio <= 3" --deduplicate exact \
    --output "$at/subset.npy"
python recipes/data/measure.py --scores "$at/scores/clip" --truth "$at/pairs/truth.json" --subset "$at/subset.npy" \
    --output "$at/metrics.json"

open-qwen2vl reshard "$at/pairs/pool" --subset "$at/subset.npy" --output "$at/shards" --samples-per-shard 100
python recipes/quickstart/build_backbones.py --data "$at/pairs/scorer" --output "$at/backbones"
open-qwen2vl pack "$at/shards" --output "$at/packs" --tokenizer "$at/backbones/text" --image-seq-length 9 \
    --max-length 128
accelerate launch --quiet --config_file recipes/accelerate/two_cpu_processes.yaml recipes/pretrain.py \
    recipes/quickstart.yaml --vision_model "$at/backbones/vision" --text_model "$at/backbones/text" \
    --train_packs "$at/packs" --output_dir "$at/model" --max_steps "${STEPS:-40}"
