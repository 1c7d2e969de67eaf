"""Last step: what the language model says of pictures that it never saw, and what it forgot of its own language.

    align, full, full_without_text + data/*-held-out.*  ->  metrics.json, report.html

A caption counts only if it is right to the letter; beside it stands the same with every picture a mid-grey, and the
loss of the true caption with and without its picture. Forgetting is the perplexity of text that is in no training:
of the kind that `full` reads a quarter of the time, and of another kind.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from report_real_lm_pages import ARMS, write_html
from tqdm.auto import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

from open_qwen2vl.evaluation.intervals import bootstrap, wilson
from open_qwen2vl.files import write_json
from open_qwen2vl.processing.images import decode_image
from open_qwen2vl.trainer import newest_complete_checkpoint

sys.path.insert(0, str(Path(__file__).parents[1] / "quickstart"))
from report import (  # noqa: E402
    MID_GREY,
    Example,
    batches,
    caption_examples,
    caption_images,
    describe_machine,
    describe_versions,
    read_examples,
)

PICTURES = {"emoji": "drawings", "photos": "tiles of photographs"}
TEXTS = {"text": "Python's reference", "other": "scikit-learn's data sets"}
WINDOW = 256  # tokens that are read without what stands before them; as long as a pack of the training


@torch.inference_mode()
def caption_losses(
    model: PreTrainedModel, processor: ProcessorMixin, examples: list[Example], batch_size: int, blanked: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """How well the true captions are predicted, end token included.

    Args:
        model (`PreTrainedModel`): an Open-Qwen2VL.
        processor (`ProcessorMixin`): its processor.
        examples (`list[Example]`): pictures with their captions.
        batch_size (`int`): pictures at a time.
        blanked (`bool`, *optional*, defaults to `False`): show a uniform mid-grey instead of the picture.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: nats and tokens of each caption, both of shape `(examples,)`.
    """
    tokenizer = processor.tokenizer
    prompt = f"{tokenizer.bos_token}{processor.image_token}\n"
    nats, tokens = [], []
    for batch in batches(examples, batch_size):
        images = [decode_image(example.png) for example in batch]
        images = [Image.new("RGB", image.size, MID_GREY) for image in images] if blanked else images
        texts = [f"{prompt}{example.caption}{tokenizer.eos_token}" for example in batch]
        inputs = processor(images=images, text=texts, padding=True, return_tensors="pt").to(model.device)
        ids = inputs["input_ids"]
        count = torch.tensor([len(tokenizer(text).input_ids) - len(tokenizer(prompt).input_ids) for text in texts])
        # Padding stands on the left: the caption is what a row ends with.
        longest = int(count.max())
        logits = model(**inputs).logits[:, -longest - 1 : -1].float().log_softmax(-1)
        found = -logits.gather(2, ids[:, -longest:, None]).squeeze(2).cpu()
        mask = torch.arange(longest) >= longest - count[:, None]
        nats += (found * mask).sum(1).tolist()
        tokens += count.tolist()
    return np.array(nats), np.array(tokens)


def measure_captions(
    model: PreTrainedModel, processor: ProcessorMixin, examples: list[Example], batch_size: int
) -> tuple[dict, list[Example]]:
    """Figures of one kind of held-out pictures, and the captions themselves."""
    seen = caption_examples(model, processor, examples, batch_size)
    # All pictures have one size, and so one grey picture stands for all.
    grey = Image.new("RGB", decode_image(examples[0].png).size, MID_GREY)
    (answer,) = caption_images(model, processor, [grey], max_new_tokens=32)
    right = sum(example.right for example in seen)
    nats, tokens = caption_losses(model, processor, examples, batch_size)
    blanked, _ = caption_losses(model, processor, examples, batch_size, blanked=True)
    figures = {
        "pictures": len(seen),
        "right": right,
        "exact_match": right / len(seen),
        "exact_match_interval": wilson(right / len(seen), len(seen)),
        "blanked_answer": answer,
        "blanked_exact_match": sum(example.caption == answer for example in examples) / len(examples),
        "loss": float(nats.sum() / tokens.sum()),
        "blanked_loss": float(blanked.sum() / tokens.sum()),
        # Nats that the picture is worth to a caption.
        "gain": float((blanked - nats).mean()),
        "gain_interval": bootstrap(blanked - nats),
    }
    return figures, seen


@torch.inference_mode()
def text_losses(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[str], windows: int
) -> np.ndarray:
    """Nats per token of the first `windows` windows of 256 tokens, of shape `(windows,)`; fewer if the texts end."""
    ids = tokenizer("\n\n".join(texts), return_tensors="pt", verbose=False).input_ids[0]
    ids = ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW)[:windows]
    losses = []
    for row in tqdm(ids, desc="reading", unit="window", leave=False):
        logits = model(input_ids=row[None].to(model.device)).logits[0, :-1].float()
        losses.append(torch.nn.functional.cross_entropy(logits, row[1:].to(model.device)).item())
    return np.array(losses)


def measure_texts(before: np.ndarray, after: np.ndarray) -> dict:
    """Perplexity after a training, and by what it grew, over the same windows."""
    low, high = bootstrap(after - before)
    return {
        "perplexity": float(np.exp(after.mean())),
        "ratio": float(np.exp((after - before).mean())),
        "ratio_interval": [float(np.exp(low)), float(np.exp(high))],
    }


def measure_arm(run: Path, data: Path, before: dict[str, np.ndarray], batch_size: int) -> tuple[dict, dict]:
    """All figures of one training, and its captions by kind."""
    model = AutoModelForImageTextToText.from_pretrained(run / "model", trust_remote_code=False).eval()
    processor = AutoProcessor.from_pretrained(run / "model", trust_remote_code=False)
    captions, seen, texts = {}, {}, {}
    for kind in PICTURES:
        examples = read_examples(data / f"{kind}-held-out.tar")
        captions[kind], seen[kind] = measure_captions(model, processor, examples, batch_size)
    for kind, losses in before.items():
        text = json.loads((data / f"{kind}-held-out.json").read_text())
        texts[kind] = measure_texts(losses, text_losses(model, processor.tokenizer, text, len(losses)))
    training = json.loads((run / "train_results.json").read_text())
    kept = ("steps", "tokens", "train_seconds", "final_loss")
    return {"captions": captions, "texts": texts, "training": {name: training[name] for name in kept}}, seen


def build(run: Path, batch_size: int = 32, windows: int = 16) -> dict:
    """Measure the three trainings below `run`; write `metrics.json` and `report.html` there.

    Args:
        run (`Path`): folder of `backbones/`, `data/` and the trainings.
        batch_size (`int`, *optional*, defaults to 32): pictures at a time.
        windows (`int`, *optional*, defaults to 16): of 256 tokens of each kind of text, at most.

    Returns:
        `dict`: the metrics; shares are 0 to 1, losses in nats per token.

    Raises:
        ValueError: if a training has not finished.
    """
    for arm in ARMS:
        if not (run / arm / "train_results.json").exists():
            raise ValueError(f"{run / arm} holds no finished training: run run.sh")
    text_model = AutoModelForCausalLM.from_pretrained(run / "backbones/text", trust_remote_code=False).eval()
    tokenizer = AutoTokenizer.from_pretrained(run / "backbones/text", trust_remote_code=False)
    before = {
        kind: text_losses(text_model, tokenizer, json.loads((run / f"data/{kind}-held-out.json").read_text()), windows)
        for kind in TEXTS
    }
    del text_model
    arms, seen = {}, {}
    for arm in ARMS:
        arms[arm], seen[arm] = measure_arm(run / arm, run / "data", before, batch_size)
    metrics = {
        "before": {kind: float(np.exp(losses.mean())) for kind, losses in before.items()},
        "windows": {kind: len(losses) for kind, losses in before.items()},
        "arms": arms,
        "corpus": json.loads((run / "data/corpus.json").read_text()),
        "backbones": json.loads((run / "backbones/backbones.json").read_text()),
        "machine": describe_machine(),
        "versions": describe_versions(),
    }
    histories = {}
    for arm in ARMS:
        state = Path(newest_complete_checkpoint(run / arm), "trainer_state.json")
        histories[arm] = json.loads(state.read_text())["log_history"]
    write_html(run / "report.html", metrics, histories, seen["full"])
    write_json(run / "metrics.json", metrics)
    return metrics


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--run", type=Path, default=Path("runs/real_lm"), help="where run.sh writes")
    parser.add_argument("--batch-size", type=int, default=32, help="pictures at a time")
    parser.add_argument("--windows", type=int, default=16, help="windows of 256 tokens of each kind of text, at most")
    args = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    try:
        metrics = build(args.run, args.batch_size, args.windows)
    except ValueError as error:
        parser.error(str(error))
    arms = metrics["arms"]
    captions = "; ".join(
        f"{name} {found['exact_match']:.3f} ({found['right']} of {found['pictures']}), "
        f"grey {found['blanked_exact_match']:.3f}"
        for kind, name in PICTURES.items()
        for found in [arms["full"]["captions"][kind]]
    )
    ratios = [[arms[arm]["texts"][kind]["ratio"] for kind in TEXTS] for arm in ("full", "full_without_text")]
    print(
        f"held-out {captions}; perplexity of text of the kind trained on and of another times "
        f"{ratios[0][0]:.2f} and {ratios[0][1]:.2f} with text in the mixture, {ratios[1][0]:.2f} and "
        f"{ratios[1][1]:.2f} without: see {args.run / 'report.html'}"
    )


if __name__ == "__main__":
    main()
