"""What a training shows: one progress bar while it runs, and one block of figures at its end."""

import sys
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ProgressCallback

from ..task_evaluation import logged_scores


class ThroughputProgressCallback(ProgressCallback):
    """transformers' progress bar with the latest log behind it, in place of a printed dict per log."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        """Open the bar where training resumes."""
        self.current_step = state.global_step
        if state.is_world_process_zero:
            # In a log file each refresh is a line of its own.
            interval = 0.2 if sys.stderr.isatty() else 15
            self.training_bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                desc="train",
                unit="step",
                dynamic_ncols=True,
                mininterval=interval,
                maxinterval=max(10, interval),
            )

    def on_prediction_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        """Show an evaluation's own bar where somebody watches; in a log file its loss is enough."""
        if sys.stderr.isatty():
            super().on_prediction_step(args, state, control, **kwargs)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs,
    ):
        """Show the log's figures behind the bar, and an evaluation's loss or scores on a line above it."""
        if self.training_bar is None:
            return
        if "eval_loss" in logs:
            self.training_bar.write(f"step {state.global_step}: eval loss {logs['eval_loss']:.4f}", file=sys.stderr)
        elif scores := logged_scores(logs):
            figures = ", ".join(f"{name.removeprefix('eval_')} {score:.2f}" for name, score in scores.items())
            self.training_bar.write(f"step {state.global_step}: {figures}", file=sys.stderr)
        elif "loss" in logs:
            self.training_bar.set_postfix_str(progress_figures(logs), refresh=False)


def progress_figures(logs: dict[str, float]) -> str:
    """One short line of a training log that [`PackedTrainer`] completed; what is not known is left out."""
    figures = [
        f"loss {logs['loss']:.4f}",
        f"{logs['tokens_per_second']:,.0f} tok/s",
        f"{logs['images_per_second']:,.1f} img/s",
        f"{logs['tflops_per_second']:.3g} TFLOP/s",
    ]
    if "mfu" in logs:
        figures.append(f"MFU {logs['mfu']:.1%}")
    if logs["data_wait"] >= 0.05:
        figures.append(f"waits {logs['data_wait']:.0%}")
    if logs["dropped_documents"]:
        figures.append(f"{logs['dropped_documents']} dropped")
    return ", ".join(figures)


def summary_lines(summary: dict[str, Any]) -> str:
    """The block that ends a training: aligned lines of [`PackedTrainer.summary`]."""
    rows = {
        "steps": f"{summary['steps']:,} ({summary['epochs']:.2f} epochs)",
        "documents": f"{summary['documents']:,}",
        "images": f"{summary['images']:,}",
        "tokens": f"{summary['tokens']:,}",
        "seconds": f"{summary['train_seconds']:,.1f}",
        "speed": f"{summary['tokens_per_second']:,.0f} tokens/s, {summary['images_per_second']:,.1f} images/s, "
        f"{summary['tflops_per_second']:.3g} TFLOP/s" + (f", MFU {summary['mfu']:.1%}" if "mfu" in summary else ""),
        "waiting": f"{summary['data_wait']:.1%} of the time for data; fill {summary['fill']:.1%}",
        "final loss": f"{summary['final_loss']:.4f}",
        "dropped": ", ".join(f"{n:,} {reason}" for reason, n in summary["dropped_documents"].items()) or "none",
    }
    if len(summary["sources"]) > 1:
        shares = summary["sources"].items()
        rows["sources"] = ", ".join(f"{name} {source['share']:.1%} of the tokens" for name, source in shares)
    return "\n".join(f"  {name:<11} {figure}" for name, figure in rows.items())
