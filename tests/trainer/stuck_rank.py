"""A training of two ranks, run by `test_stall_watch.py`: stuck_rank.py FOLDER. The second stops in its third step."""

import sys
import time
from pathlib import Path

from train_and_resume import make_trainer
from transformers import TrainerCallback


class Stops(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 2 and args.process_index == 1:
            time.sleep(600)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    trainer = make_trainer(folder, folder / "run", "packs", max_steps=4, ddp_timeout=20)
    trainer.add_callback(Stops())
    trainer.train()
