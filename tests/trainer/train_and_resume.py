"""A short training and its resumption, run by `test_two_processes.py` in this process and by launchers.

Usage: train_and_resume.py FOLDER NAME BATCH_SIZE VISION TEXT, with FOLDER/packs.pt; writes FOLDER/NAME.json, the
checkpoints in FOLDER/NAME and FOLDER/NAME-model. The name `fsdp2` insists on real FSDP2, on CPUs too.
"""

import json
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType

from open_qwen2vl import OpenQwen2VLForConditionalGeneration, PackedTrainer, PackedTrainingArguments
from open_qwen2vl.trainer import newest_complete_checkpoint, save_final_model


def make_trainer(folder: Path, name: str, batch_size: int, vision: str, text: str) -> PackedTrainer:
    torch.manual_seed(0)
    packs = torch.load(folder / "packs.pt", weights_only=True)
    args = PackedTrainingArguments(
        str(folder / name),
        use_cpu=True,
        disable_tqdm=True,
        dataloader_num_workers=0,
        max_steps=3,
        optim="sgd",
        learning_rate=0.05,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=batch_size,
        gradient_accumulation_steps=2,
        train_sampling_strategy="sequential",
        logging_steps=2,
        save_strategy="steps",
        save_steps=1,
    )
    if name == "fsdp2":
        # accelerate turns FSDP on only for GPUs, and else trains with DDP in silence.
        assert args.world_size > 1
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    model = OpenQwen2VLForConditionalGeneration.from_vision_text_pretrained(vision, text, image_seq_length=4)
    trainer = PackedTrainer(model=model, args=args, train_dataset=packs, eval_dataset=packs)
    assert trainer.is_fsdp_enabled == (name == "fsdp2")
    return trainer


def result(trainer: PackedTrainer) -> dict:
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    return {"losses": losses, "evaluation": trainer.evaluate(), **trainer.summary()}


def main(folder: Path, name: str, *options) -> None:
    trainer = make_trainer(folder, name, *options)
    trainer.train()
    results = {"whole": result(trainer)}
    save_final_model(trainer, folder / f"{name}-model")

    resumed = make_trainer(folder, name, *options)
    resumed.accelerator.wait_for_everyone()
    if resumed.is_world_process_zero():
        (folder / name / "checkpoint-3" / "trainer_state.json").unlink()
    resumed.accelerator.wait_for_everyone()
    resumed.train(resume_from_checkpoint=newest_complete_checkpoint(folder / name))
    results["resumed"] = result(resumed)
    if resumed.is_world_process_zero():
        (folder / f"{name}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), *sys.argv[4:])
