"""Step 2: a small CLIP, trained on the scorer's own pairs with open_clip's model, tokenizer and loss.

    scorer/train-*.tar  ─►  two towers of a few layers, ClipLoss  ─►  open_clip_config.json and safetensors

The folder is one that open_clip loads as `local-dir:FOLDER`, as it loads a published model by `hf-hub:NAME`.
"""

import argparse
import json
import math
import tarfile
from pathlib import Path

import open_clip
import torch
from open_clip.loss import ClipLoss
from PIL import Image
from safetensors.torch import save_file
from torchvision.transforms import v2
from tqdm.auto import tqdm

from open_qwen2vl.files import new_folder
from open_qwen2vl.processing.images import decode_image

MODEL = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": 96, "patch_size": 16, "width": 128, "head_width": 32, "layers": 4},
    "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 128, "heads": 4, "layers": 2},
}
PREPROCESS = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"}
SHUFFLE_SEED = 0


def read_pairs(tars: list[Path]) -> tuple[list[Image.Image], list[str]]:
    """Pictures and captions of tars.

    Args:
        tars (`list[Path]`): with `key.png` and `key.txt`.

    Returns:
        `tuple[list[PIL.Image.Image], list[str]]`: in the same order.
    """
    images, captions = [], []
    for path in tars:
        with tarfile.open(path) as tar:
            for member in tar:
                data = tar.extractfile(member).read()
                if member.name.endswith(".png"):
                    images.append(decode_image(data))
                elif member.name.endswith(".txt"):
                    captions.append(data.decode())
    return images, captions


def train(images: list[Image.Image], captions: list[str], epochs: int, batch_size: int, lr: float) -> torch.nn.Module:
    """Contrastive training with AdamW, warm-up and cosine.

    Args:
        images (`list[PIL.Image.Image]`): of one size.
        captions (`list[str]`): one for each.
        epochs (`int`): passes over all pairs.
        batch_size (`int`): pairs that are told apart in a step.
        lr (`float`): highest learning rate.

    Returns:
        `torch.nn.Module`: open_clip's `CLIP`.
    """
    torch.manual_seed(SHUFFLE_SEED)
    model = open_clip.CLIP(**MODEL)
    tokens = open_clip.SimpleTokenizer(context_length=MODEL["text_cfg"]["context_length"])(captions)
    pixels = torch.stack([v2.functional.pil_to_tensor(image) for image in images])
    moved = v2.Compose(
        [
            v2.RandomAffine(8, translate=(0.06, 0.06), scale=(0.9, 1.1), fill=255),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(PREPROCESS["mean"], PREPROCESS["std"]),
        ]
    )
    steps = epochs * (len(images) // batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.2, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 50, 0.5 * (1 + math.cos(math.pi * step / steps)))
    )
    loss_of = ClipLoss()
    bar = tqdm(range(steps), desc="scorer", unit="step", mininterval=1)
    order: list[int] = []
    for _ in bar:
        if len(order) < batch_size:
            order = torch.randperm(len(images)).tolist()
        batch, order = order[:batch_size], order[batch_size:]
        views = torch.stack([moved(pixels[number]) for number in batch])
        loss = loss_of(*model(views, tokens[batch]))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return model.eval()


def save(model: torch.nn.Module, folder: Path) -> None:
    """Write what `local-dir:` needs; the folder appears whole.

    Args:
        model (`torch.nn.Module`): from [`train`].
        folder (`Path`): of the model.
    """
    with new_folder(folder) as temporary:
        save_file(
            {name: t.contiguous() for name, t in model.state_dict().items()}, temporary / "open_clip_model.safetensors"
        )
        config = {"model_cfg": MODEL, "preprocess_cfg": {"size": MODEL["vision_cfg"]["image_size"], **PREPROCESS}}
        (temporary / "open_clip_config.json").write_text(json.dumps(config, indent=1) + "\n")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--pairs", type=Path, default=Path("runs/data/pairs/scorer"), help="folder of train-*.tar")
    parser.add_argument("--output", type=Path, default=Path("runs/data/scorer"))
    parser.add_argument("--epochs", type=int, default=24)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-3, help="highest learning rate")
    args = parser.parse_args()
    if (args.output / "open_clip_config.json").exists():
        print(f"scorer in {args.output}")
        return
    images, captions = read_pairs(sorted(args.pairs.glob("train-*.tar")))
    if len(images) < args.batch_size:
        parser.error(f"{args.pairs} has {len(images)} pairs, fewer than a batch of {args.batch_size}")
    model = train(images, captions, args.epochs, args.batch_size, args.lr)
    save(model, args.output)
    print(f"scorer of {sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters in {args.output}")


if __name__ == "__main__":
    main()
