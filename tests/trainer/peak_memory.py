"""Two optimizer steps of a small model; prints the bytes by which they raised this process's peak.

Usage: peak_memory.py CONFIG.json POSITIONS LABELS CHECKPOINT_EVERY
"""

import resource
import sys
from pathlib import Path

import psutil
import torch

from open_qwen2vl import OpenQwen2VLConfig, OpenQwen2VLForConditionalGeneration


def main(config: str, positions: int, labels: int, checkpoint_every: int) -> None:
    before = psutil.Process().memory_info().rss
    config = OpenQwen2VLConfig.from_json_file(config)
    model = OpenQwen2VLForConditionalGeneration._from_config(config, attn_implementation="sdpa").train()
    model.model.vision_tower.requires_grad_(False)
    if checkpoint_every:
        model.activation_checkpointing_enable(every_n_layers=checkpoint_every)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    input_ids = torch.randint(0, 100, (1, positions))
    targets = input_ids.clone()
    targets[:, labels + 1 :] = -100
    for _ in range(2):
        for _ in range(2):
            model(input_ids=input_ids, labels=targets, num_items_in_batch=2 * labels).loss.backward()
        optimizer.step()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
