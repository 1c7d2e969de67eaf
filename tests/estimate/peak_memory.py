"""Two optimizer steps of a small model; prints the bytes by which they raised this process's peak.

Usage: peak_memory.py CONFIG.json DOCUMENTS LENGTH LABELS CHECKPOINT_EVERY
"""

import sys
from pathlib import Path

import psutil
import torch

from open_qwen2vl import OpenQwen2VLConfig, OpenQwen2VLForConditionalGeneration


def train(config: OpenQwen2VLConfig, documents: int, length: int, labels: int, checkpoint_every: int) -> None:
    """Packs of text documents, the vision tower frozen, two micro-batches a step."""
    model = OpenQwen2VLForConditionalGeneration._from_config(config, attn_implementation="packed_varlen").train()
    model.model.vision_tower.requires_grad_(False)
    if checkpoint_every:
        model.activation_checkpointing_enable(every_n_layers=checkpoint_every)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    boundaries = torch.arange(documents + 1, dtype=torch.int32) * length
    batch = {
        "input_ids": torch.randint(0, 100, (1, documents * length)),
        "position_ids": torch.arange(length).repeat(documents)[None],
        "cu_seq_lens_q": boundaries,
        "cu_seq_lens_k": boundaries,
        "max_length_q": length,
        "max_length_k": length,
    }
    targets = batch["input_ids"].clone()
    targets[:, labels + 1 :] = -100
    for _ in range(2):
        for _ in range(2):
            model(**batch, labels=targets, num_items_in_batch=2 * labels).loss.backward()
        optimizer.step()


def main(config: str, *sizes: int) -> None:
    config = OpenQwen2VLConfig.from_json_file(config)
    train(config, 1, 8, 4, 0)  # what the libraries take for themselves
    process = psutil.Process()
    before = process.memory_info().rss
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    train(config, *sizes)
    status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    print(int(status["VmHWM"].split()[0]) * 1024 - before)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
