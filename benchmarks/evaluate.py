"""Samples/s of the evaluation plugin at batch 8 and 1, and of lmms-eval's own transformers model.

    python benchmarks/evaluate.py [--samples 96] [--repeats 3] [--new-tokens 16]

A random model of the quickstart's size answers questions of easy-VQA's test split, greedily, up to 16 new tokens, in
fp32 on the CPU. lmms-eval 0.7.3's `huggingface` model runs no checkpoint by itself with transformers 5.23: it loads
vision-language models by `AutoModel`, which has no `generate`, and passes the processor an argument that is gone. So
it gets the model that the plugin has, and the processor without that argument; its loop is unchanged. All get the same
prompts: the plugin's newline after an image is switched off. They take turns in one process; on a machine that others
use, samples per CPU second is the steadier figure. Prints a Markdown table and writes it to
benchmarks/results/evaluate.md.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from report import describe_machine, write_result

ROOT = Path(__file__).parents[1]
# This folder comes last: lmms-eval needs Hugging Face's `evaluate`, not this file.
sys.path[:] = [str(ROOT), str(ROOT / "recipes" / "quickstart"), *sys.path[1:], sys.path[0]]

import build_backbones  # noqa: E402
from lmms_eval.models.chat.huggingface import Huggingface  # noqa: E402

from open_qwen2vl import OpenQwen2VLForConditionalGeneration, OpenQwen2VLProcessor  # noqa: E402
from open_qwen2vl.evaluation.harness import load_tasks, make_task_manager  # noqa: E402
from open_qwen2vl.evaluation.lmms_model import TransformersModel  # noqa: E402
from tests.evaluation.easyvqa import GENERATION, rows, write_tasks  # noqa: E402

BUILT_IN = "lmms-eval `huggingface`"


class ImagesOnly:
    """A processor that lets the empty `videos` and `audios` pass."""

    def __init__(self, processor):
        self.processor = processor

    def __call__(self, videos, audios, **kwargs):
        return self.processor(**kwargs)

    def __getattr__(self, name: str):
        return getattr(self.processor, name)


class BuiltIn(Huggingface):
    """lmms-eval's model with a loaded one in the place of what it cannot load."""

    def __init__(self, model, processor, batch_size: int):
        super(Huggingface, self).__init__()
        self._model, self.processor, self._tokenizer = model, ImagesOnly(processor), processor.tokenizer
        self._config, self._device, self.device_map = model.config, torch.device("cpu"), "cpu"
        self.batch_size_per_gpu, self.use_cache, self.system_prompt = batch_size, True, None


def make_model(folder: Path) -> tuple[OpenQwen2VLForConditionalGeneration, OpenQwen2VLProcessor]:
    torch.manual_seed(0)
    tokenizer = build_backbones.train_tokenizer([row["question"] for row in rows(500)])
    build_backbones.save_vision(folder / "vision", build_backbones.VISION)
    # Wide initial weights: with narrow ones every answer repeats one token.
    build_backbones.save_text(folder / "text", {**build_backbones.TEXT, "initializer_range": 0.2}, tokenizer)
    backbones = str(folder / "vision"), str(folder / "text")
    processor = OpenQwen2VLProcessor.from_vision_text_pretrained(*backbones, image_seq_length=36)
    return OpenQwen2VLForConditionalGeneration.from_vision_text_pretrained(*backbones, 36).eval(), processor


def make_requests(folder: Path, samples: int, new_tokens: int) -> tuple[Any, list]:
    kwargs = {**GENERATION["generation_kwargs"], "max_new_tokens": new_tokens, "until": None}
    tasks = write_tasks(folder / "tasks", samples, generation_kwargs=kwargs)
    (tasks / "easyvqa_mc.yaml").unlink()
    (task,) = load_tasks(make_task_manager(["easyvqa_gen"], [tasks]), "easyvqa_gen")
    task.build_all_requests()
    return task, task.instances


def measure(model: Any, requests: list) -> tuple[list[str], float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    answers = [result.text for result in model.generate_until(requests)]
    return answers, time.perf_counter() - wall, time.process_time() - cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("samples", 96), ("repeats", 3), ("new-tokens", 16), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        model, processor = make_model(Path(folder))
        task, requests = make_requests(Path(folder), args.samples, args.new_tokens)
        models = {}
        for batch_size in (1, 8):
            models["plugin", batch_size] = TransformersModel(model, processor, batch_size=batch_size)
            models[BUILT_IN, batch_size] = BuiltIn(model, processor, batch_size)
        runs: dict[tuple[str, int], list] = {key: [] for key in models}
        for _ in range(args.repeats):
            for key, one in models.items():
                one.task_dict["easyvqa_gen"] = task.dataset
                runs[key].append(measure(one, requests))
    reference = runs["plugin", 1][0][0]
    size = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    table = [
        f"{args.samples} questions of easy-VQA, {args.new_tokens} new tokens each, {args.threads} thread(s), medians "
        f"of {args.repeats} runs in turn; {size:.1f}M parameters, fp32. The last column counts answers that are those "
        "of the plugin at batch 1.",
        "",
        "| model | batch | samples/s | samples per CPU second | same answers |",
        "|---|---:|---:|---:|---:|",
    ]
    for (name, batch_size), results in runs.items():
        wall, cpu = (args.samples / median(result[i] for result in results) for i in (1, 2))
        same = sum(a == b for a, b in zip(results[0][0], reference, strict=True))
        table.append(f"| {name} | {batch_size} | {wall:.1f} | {cpu:.1f} | {same} of {args.samples} |")
    write_result("evaluate", table, describe_machine(f"python benchmarks/{Path(__file__).name}"))


if __name__ == "__main__":
    main()
