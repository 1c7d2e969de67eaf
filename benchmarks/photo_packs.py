"""Packs of real JPEGs for the benchmarks that decode: photographs of any size, captions, tars, and the plan of them.

The photograph that matplotlib installs (512 x 600) is tiled to the wanted size, mirrored at random, so that a large
image has the detail of a small one in every place; each gets its own crop and tint.
"""

import io
import json
import random
import tarfile
from pathlib import Path

from matplotlib import get_data_path
from PIL import Image, ImageEnhance, ImageOps
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from open_qwen2vl import OpenQwen2VLProcessor
from open_qwen2vl.data.packing.plan import plan_packs
from open_qwen2vl.processing.text_formats import prepare_tokenizer

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|image_pad|>", "<s>"]


def photograph(width: int, height: int, seed: int) -> bytes:
    """A JPEG of this size, quality 90."""
    draw = random.Random(seed)
    tile = Image.open(f"{get_data_path()}/sample_data/grace_hopper.jpg").convert("RGB")
    tile = ImageEnhance.Brightness(tile).enhance(draw.uniform(0.7, 1.3))
    whole = Image.new("RGB", (width, height))
    left, top = draw.randrange(tile.width), draw.randrange(tile.height)
    for x in range(-left, width, tile.width):
        for y in range(-top, height, tile.height):
            whole.paste(ImageOps.mirror(tile) if draw.random() < 0.5 else tile, (x, y))
    buffer = io.BytesIO()
    whole.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def make_processor(image_size: int, image_seq_length: int) -> OpenQwen2VLProcessor:
    """A processor whose tokenizer has a token per byte and Qwen2.5's special ones."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(SPECIAL_TOKENS)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    image_processor = SiglipImageProcessorPil(size={"height": image_size, "width": image_size})
    return OpenQwen2VLProcessor(image_processor, prepare_tokenizer(tokenizer), image_seq_length=image_seq_length)


def write_tar(path: Path, samples: int, width: int, height: int, distinct: int = 16) -> None:
    """Samples of `distinct` different photographs with captions of 5 to 60 bytes (29 on average), as img2dataset does.

    The captions make about 176 positions a pair at 144 tokens an image, as in the paper.
    """
    draw = random.Random(0)
    photographs = [photograph(width, height, seed) for seed in range(min(distinct, samples))]
    with tarfile.open(path, "w") as tar:
        for number in range(samples):
            caption = "".join(draw.choices("etaoin shrdlu", k=min(60, 5 + int(draw.expovariate(1 / 24)))))
            uid = json.dumps({"uid": f"{number:032x}"}).encode()
            members = {"jpg": photographs[number % len(photographs)], "txt": caption.encode(), "json": uid}
            for extension, content in members.items():
                info = tarfile.TarInfo(f"{number:06d}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def make_packs(
    folder: Path, processor: OpenQwen2VLProcessor, samples: int, width: int, height: int, max_length: int = 4096
) -> Path:
    """Write a tar and its plan below `folder`; returns the plan's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tar(folder / "00000.tar", samples, width, height)
    plan_packs(
        [folder / "00000.tar"],
        folder / "packs",
        processor.tokenizer,
        image_seq_length=processor.image_seq_length,
        max_length=max_length,
        num_workers=1,
    )
    return folder / "packs"
