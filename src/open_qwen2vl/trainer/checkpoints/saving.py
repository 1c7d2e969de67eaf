"""How a trainer on packs saves and resumes: whole checkpoints, the same run or none, SIGTERM, consolidated models."""

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from ...files import publish_folder
from . import run_record as records
from .folders import STAGING_NAME, CheckpointError, newest_complete_checkpoint, prune
from .interruption import StopRequest, only_run_in


class ExactCheckpoints:
    """The part of [`PackedTraining`] that deals with checkpoints; in front of a `Trainer`.

    Attributes:
        stop_request ([`StopRequest`]): set by SIGTERM while training.
        interrupted (`bool`): whether the training left early because of it, after a checkpoint.
    """

    def __init__(self, *args, **kwargs):
        self.stop_request = StopRequest()
        self.interrupted = False
        self._staging = False
        super().__init__(*args, **kwargs)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs) -> Any:
        """Train as `Trainer.train` does, alone in `output_dir`, to the end or until SIGTERM.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*): a checkpoint's folder, or True for the newest
                complete one in `output_dir`, if there is any.
            kwargs: as for `Trainer.train`.

        Returns:
            `transformers.trainer_utils.TrainOutput`: `interrupted` tells whether it is of the whole training.

        Raises:
            ValueError: if the checkpoint was trained with other options or data, or another process trains in
                `output_dir`.
            CheckpointError: if a checkpoint cannot be written.
            LossStopped: if the loss is not finite or rose too far.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = newest_complete_checkpoint(self.args.output_dir)
        if resume_from_checkpoint:
            records.check_same_run(resume_from_checkpoint, self.run_record())
        self.interrupted = False
        with only_run_in(self.args.output_dir, self.args.should_save), self.stop_request.listening():
            return super().train(resume_from_checkpoint=resume_from_checkpoint or None, **kwargs)

    def run_record(self) -> dict[str, Any]:
        """What a checkpoint of this run is marked with.

        Returns:
            `dict`: optimisation arguments, the data's fingerprint, and whether the checkpoint is sharded.
        """
        return {**records.run_record(self.args, self.data_fingerprint), "fsdp": self.is_fsdp_enabled}

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, STAGING_NAME) if self._staging else folder

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        staged = folder / STAGING_NAME / name
        with self.throughput.paused():
            if self.args.should_save:
                shutil.rmtree(staged.parent, ignore_errors=True)
            self.accelerator.wait_for_everyone()
            try:
                self._write_checkpoint(model, trial, staged, folder / name)
            except (OSError, RuntimeError, SafetensorError) as error:
                shutil.rmtree(staged.parent, ignore_errors=True)
                newest = newest_complete_checkpoint(folder)
                raise CheckpointError(
                    f"cannot save {folder / name}: {' '.join(str(error).split())}; "
                    + (f"the same command will continue from {newest}" if newest else "there is no checkpoint yet")
                ) from error
        if self.args.push_to_hub:
            self.create_model_card()
            super()._push_from_checkpoint(str(folder / name))

    def _write_checkpoint(self, model: nn.Module, trial: Any, staged: Path, final: Path) -> None:
        self._staging = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._staging = False
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            if self.state.best_model_checkpoint == str(staged):
                self.state.best_model_checkpoint = str(final)
                self.state.save_to_json(str(staged / "trainer_state.json"))
            records.write_run_record(staged, self.run_record())
            publish_folder(staged, final)
            staged.parent.rmdir()
            prune(final.parent, self.args.save_total_limit, self.state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # Trainer would upload in the background from a folder that is about to be renamed.
        if not self._staging:
            super()._push_from_checkpoint(checkpoint_folder)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        # A tied head is not in the file and not missing either.
        tied = getattr(self.model, "all_tied_weights_keys", {})
        load_result.missing_keys[:] = [name for name in load_result.missing_keys if name not in tied]
        super()._issue_warnings_after_load(load_result)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model as a folder that `from_pretrained` reads, under FSDP too; every rank must call it.

        Args:
            output_dir (`str`, *optional*): the folder; `args.output_dir` by default.
        """
        if _internal_call or not self.is_fsdp_enabled:
            return super().save_model(output_dir, _internal_call)
        # Sharded state is for checkpoints, and those stay as they were configured.
        plugin = self.accelerator.state.fsdp_plugin
        configured = plugin.state_dict_type
        plugin.set_state_dict_type("FULL_STATE_DICT")
        super().save_model(output_dir)
        plugin.set_state_dict_type(configured)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        if state_dict is not None:
            # Consolidated shards hold a tied head twice.
            tied = getattr(self.model, "all_tied_weights_keys", {})
            state_dict = {name: tensor for name, tensor in state_dict.items() if name not in tied}
        # FSDP2 gives the model a class made on the spot; the saved code and auto_map must be those of its own.
        current = type(self.model)
        self.model.__class__ = self._model_class
        super()._save(output_dir, state_dict)
        self.model.__class__ = current
