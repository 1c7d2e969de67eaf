"""What a user's process does with the Hub: `python client.py STEP ARGUMENTS` runs one function of this file.

`with_package` in the arguments of a step decides whether `open_qwen2vl` is imported; without it the steps run where it
cannot be imported at all.
"""

import importlib.util
import json
import runpy
import sys
from pathlib import Path

import torch
from huggingface_hub import ModelCard
from PIL import Image
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor, pipeline

PROMPT = "<s><|image_pad|>\na cat <|image_pad|> dogs"
CHAT = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is shown?"}]}]


def pictures() -> list[Image.Image]:
    """Two images that every process makes alike."""
    gradient = Image.linear_gradient("L")
    return [gradient.convert("RGB"), gradient.rotate(90).resize((50, 30)).convert("RGB")]


@torch.no_grad()
def figures(model, processor) -> dict:
    """What is compared between processes: the logits of a prompt with two images, and a greedy answer."""
    inputs = processor(images=pictures(), text=PROMPT, return_tensors="pt")
    answer = model.generate(**inputs, max_new_tokens=6, min_new_tokens=6)
    return {"logits": model(**inputs).logits.flatten().tolist(), "answer": answer[0].tolist()}


def ask(pipe) -> str:
    """A chat turn with an image through a pipeline."""
    message = [{**CHAT[0], "content": [{"type": "image", "image": pictures()[0]}, CHAT[0]["content"][1]]}]
    return pipe(text=message, max_new_tokens=4, return_full_text=False, do_sample=False)[0]["generated_text"]


def push(folder: str, repo: str) -> dict:
    """Push a folder's model, in shards, its processor and its card; then the model once more."""
    import open_qwen2vl  # noqa: F401

    model = AutoModelForImageTextToText.from_pretrained(folder)
    model.push_to_hub(repo, max_shard_size="100KB")
    AutoProcessor.from_pretrained(folder).push_to_hub(repo)
    ModelCard.load(Path(folder) / "README.md").push_to_hub(repo)
    model.push_to_hub(repo, max_shard_size="100KB")
    return {}


def train(folder: str, packs: str, repo: str) -> dict:
    """A training that pushes its checkpoints, and `Trainer.push_to_hub`: the card after each of the two."""
    from open_qwen2vl import PackedTrainer, PackedTrainingArguments
    from open_qwen2vl.data import PackMixture, parse_sources

    model, processor = (auto.from_pretrained(folder) for auto in (AutoModelForImageTextToText, AutoProcessor))
    args = PackedTrainingArguments(
        "run", max_steps=2, save_steps=2, use_cpu=True, dataloader_num_workers=0, push_to_hub=True, hub_model_id=repo
    )
    data = PackMixture(parse_sources(packs), processor)
    trainer = PackedTrainer(model=model, args=args, train_dataset=data, processing_class=processor)
    Path("run").mkdir(exist_ok=True)
    Path("run/notes.txt").write_text("whatever else lies there")
    trainer.train()
    trainer._finish_current_push()
    during = ModelCard.load(repo).content
    Path("run/.pushed/README.md").unlink()
    trainer.push_to_hub(license="mit")
    return {"during": during, "after": ModelCard.load(repo).content}


def train_stock(folder: str, packs: str, repo: str) -> dict:
    """The recipe on a stock model with `push_to_hub`; what it pushed answers without anything of ours."""
    sys.argv = ["pretrain.py", "--model_name_or_path", folder, "--train_packs", packs, "--output_dir", "qwen"]
    sys.argv += ["--max_steps", "2", "--use_cpu", "--dataloader_num_workers", "0"]
    sys.argv += ["--push_to_hub", "--hub_model_id", repo]
    runpy.run_path(str(Path(__file__).parents[2] / "recipes/pretrain.py"), run_name="__main__")
    pushed = AutoModelForImageTextToText.from_pretrained(repo)
    trained = AutoModelForImageTextToText.from_pretrained("qwen/model")
    same = all(torch.equal(*pair) for pair in zip(pushed.parameters(), trained.parameters(), strict=True))
    return {"same": same, "card": ModelCard.load(repo).content, "pipe": ask(pipeline("image-text-to-text", repo))}


def train_both(folder: str, packs: str, repo: str, stock: str, stock_packs: str, stock_repo: str) -> dict:
    """Both trainings, in one process."""
    return {"ours": train(folder, packs, repo), "stock": train_stock(stock, stock_packs, stock_repo)}


def load(repo: str, out: str) -> dict:
    """Load with the package: Auto classes, a pipeline, another type; then push an adapter of it."""
    import open_qwen2vl  # noqa: F401
    from open_qwen2vl.trainer.lora import add_lora, lora_config

    model = AutoModelForImageTextToText.from_pretrained(repo, device_map="auto")
    processor = AutoProcessor.from_pretrained(repo)
    result = {"plain": figures(model, processor), "pipe": ask(pipeline("image-text-to-text", model=repo))}
    half = AutoModelForImageTextToText.from_pretrained(repo, dtype=torch.bfloat16)
    result["types"] = sorted({str(p.dtype) for p in half.parameters()})

    adapted = add_lora(model, lora_config(r=4, alpha=8)).eval()
    torch.manual_seed(0)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.02 * torch.randn_like(parameter)
    adapted.push_to_hub(out)
    result["adapted"] = figures(adapted, processor)
    return result


def load_adapter(adapter: str, repo: str) -> dict:
    """Load the pushed adapter in the two ways: transformers finds the base itself, PEFT is given it."""
    import open_qwen2vl  # noqa: F401
    from open_qwen2vl.trainer.lora import load_lora

    processor = AutoProcessor.from_pretrained(repo)
    by_name = AutoModelForImageTextToText.from_pretrained(adapter).eval()
    by_peft = load_lora(AutoModelForImageTextToText.from_pretrained(repo), adapter)
    merged = by_peft.merge_and_unload()
    return {"by_name": figures(by_name, processor), "merged": figures(merged, processor)}


def load_without_package(repo: str, out: str) -> dict:
    """Load by the code in the repository, save from there, and load what was saved."""
    assert importlib.util.find_spec("open_qwen2vl") is None
    result = {}
    for name, place in (("hub", repo), ("saved", out)):
        config = AutoConfig.from_pretrained(place, trust_remote_code=True)
        model = AutoModelForImageTextToText.from_pretrained(place, trust_remote_code=True)
        processor = AutoProcessor.from_pretrained(place, trust_remote_code=True)
        base = AutoModel.from_pretrained(place, trust_remote_code=True)
        result[name] = {
            **figures(model, processor),
            "budget": config.image_seq_length,
            "classes": [type(thing).__name__ for thing in (config, model, processor, base)],
            "modules": sorted({type(thing).__module__.split(".")[0] for thing in (config, model, processor, base)}),
        }
        model.save_pretrained(out)
        processor.save_pretrained(out)
    result["pipe"] = ask(pipeline("image-text-to-text", model=repo, trust_remote_code=True))
    return result


if __name__ == "__main__":
    torch.set_num_threads(1)
    step, target, *arguments = sys.argv[1:]
    Path(target).write_text(json.dumps(globals()[step](*arguments)))
