"""MLM-Filter scoring: one prefill for all metrics, and yet what the model says of each whole prompt by itself."""

import functools
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPImageProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
)
from transformers.models.qwen2_vl import Qwen2VLVideoProcessor

from open_qwen2vl.cli import main
from open_qwen2vl.data.scoring.chat_prompts import read_prompts
from open_qwen2vl.data.scoring.mlm_filter import MlmFilterScorer
from open_qwen2vl.data.scoring.pairs import Pair
from tests.data.scoring.test_score_tokens import NUMBERS, byte_level

METRICS = ["image_text_matching", "object_detail_fulfillment", "caption_text_quality", "semantic_understanding"]
TEXT = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
}
LLAVA_TEMPLATE = (
    "{% for m in messages %}USER: {% for c in m.content %}{{ '<image>\n' if c.type == 'image' else c.text }}"
    "{% endfor %} {% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
QWEN_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.content %}{{ '<|vision_start|><|image_pad|>"
    "<|vision_end|>' if c.type == 'image' else c.text }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PROMPTS = {"one": "Caption: {caption}\nDoes it match?", "two": "Caption: {caption}\nIs it {good}?\n0 to 100"}


def with_special_tokens(tokenizer, **tokens) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens({"extra_special_tokens": tokens.pop("extra"), **tokens})
    return tokenizer


def save_llava(folder, model_class=LlavaForConditionalGeneration, config_class=LlavaConfig) -> str:
    """LLaVA 1.5 in small: CLIP, Llama, "ASSISTANT:" and no <s> in the template; numbers are tokens."""
    tokenizer = with_special_tokens(
        byte_level(NUMBERS), bos_token="<s>", eos_token="</s>", pad_token="<pad>", extra=["<image>"]
    )
    image_id = tokenizer.convert_tokens_to_ids("<image>")
    config = config_class(
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 16,
            "patch_size": 8,
            "projection_dim": 32,
        },
        text_config={"model_type": "llama", "vocab_size": len(tokenizer), **TEXT},
        image_token_index=image_id,
    )
    torch.manual_seed(0)
    model_class(config).save_pretrained(folder)
    size = {"height": 16, "width": 16}
    LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=size),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAVA_TEMPLATE,
    ).save_pretrained(folder)
    return str(folder)


def save_qwen2_vl(folder) -> str:
    """Qwen2-VL in small: M-RoPE, and as many tokens for an image as its size asks for; a token for each digit."""
    vision = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer = with_special_tokens(
        byte_level(["a cat"]), eos_token="<|im_end|>", pad_token="<|endoftext|>", extra=["<|im_start|>", *vision]
    )
    ids = dict(
        zip(
            ["vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id"],
            tokenizer.convert_tokens_to_ids(vision),
            strict=True,
        )
    )
    rope = {"type": "mrope", "mrope_section": [2, 2, 2], "rope_theta": 10000.0}
    config = Qwen2VLConfig(
        text_config={"vocab_size": len(tokenizer), "rope_scaling": rope, **TEXT},
        vision_config={
            "depth": 1,
            "embed_dim": 32,
            "num_heads": 2,
            "hidden_size": 48,
            "patch_size": 4,
            "mlp_ratio": 2,
        },
        **ids,
    )
    torch.manual_seed(0)
    Qwen2VLForConditionalGeneration(config).save_pretrained(folder)
    sizes = {"patch_size": 4, "merge_size": 2, "size": {"shortest_edge": 16 * 16, "longest_edge": 40 * 40}}
    Qwen2VLProcessor(
        Qwen2VLImageProcessor(**sizes), tokenizer, Qwen2VLVideoProcessor(**sizes), chat_template=QWEN_TEMPLATE
    ).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def models(backbones, processor, tmp_path_factory) -> dict[str, str]:
    """Folders of tiny models of three families."""
    from open_qwen2vl import OpenQwen2VLForConditionalGeneration

    own = tmp_path_factory.mktemp("own")
    torch.manual_seed(0)
    OpenQwen2VLForConditionalGeneration.from_vision_text_pretrained(**backbones, image_seq_length=4).save_pretrained(
        own
    )
    processor.save_pretrained(own)
    return {
        "open_qwen2vl": str(own),
        "llava": save_llava(tmp_path_factory.mktemp("llava")),
        "qwen2_vl": save_qwen2_vl(tmp_path_factory.mktemp("qwen2_vl")),
    }


@pytest.fixture(scope="session")
def prompts_file(tmp_path_factory) -> str:
    """Two short prompts with braces that are none of a caption's."""
    file = tmp_path_factory.mktemp("prompts") / "prompts.yaml"
    file.write_text(yaml.safe_dump({"metrics": PROMPTS}))
    return str(file)


@pytest.fixture(scope="session")
def scorer_of(models, prompts_file):
    """`scorer_of(family, decode)`: its scorer for both prompts."""
    return functools.cache(
        lambda family, decode="expectation": MlmFilterScorer(
            models[family], prompts=prompts_file, decode=decode, device="cpu"
        )
    )


@pytest.fixture(scope="session")
def pairs() -> list[Pair]:
    """Three pairs with images and captions of different sizes."""
    random = np.random.default_rng(0)
    images = [
        Image.fromarray(random.integers(0, 256, size, dtype=np.uint8))
        for size in ((20, 20, 3), (40, 24, 3), (16, 32, 3))
    ]
    captions = ["a cat", "two dogs {caption} run in the park <|im_end|></s> <image><|image_pad|>", "été"]
    return [
        Pair(str(i), f"{i:032x}", image, caption)
        for i, (image, caption) in enumerate(zip(images, captions, strict=True))
    ]


def whole_prompt(processor, image, text):
    """The library's own way from a question to inputs, of one pair."""
    return processor.apply_chat_template(
        [[{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": text}]}]],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )


def with_answers(inputs, answers) -> dict:
    """A prompt's inputs once for each row of `answers` (rows, length), which is appended."""
    rows = {}
    for name, value in inputs.items():
        if name == "image_seq_length":
            rows[name] = value * len(answers)
            continue
        rows[name] = value.repeat(len(answers), *[1] * (value.ndim - 1))
        new = {"input_ids": answers, "attention_mask": torch.ones_like(answers)}.get(name, torch.zeros_like(answers))
        if name in ("input_ids", "attention_mask", "mm_token_type_ids"):
            rows[name] = torch.cat([rows[name], new], 1)
    return rows


def mean_of_all_strings(model, processor, image, text) -> float:
    """Each of 2 x 101 strings scored with a forward pass of the whole prompt and the string, without a cache."""
    tokenizer = processor.tokenizer
    inputs = whole_prompt(processor, image, text)
    start = inputs["input_ids"].shape[1]
    tail = tokenizer.decode(inputs["input_ids"][0, -1])
    before = tokenizer(tail, add_special_tokens=False)["input_ids"]
    spelled = [tuple(tokenizer(f"{tail}{lead}{n}", add_special_tokens=False)["input_ids"][len(before) :])
               for lead in ("", " ") for n in range(101)]  # fmt: skip
    digits = [id for token, id in tokenizer.get_vocab().items() if token[0] in "0123456789"]
    total = torch.zeros(202, dtype=torch.double)
    for length in {len(ids) for ids in spelled}:
        chosen = [i for i, ids in enumerate(spelled) if len(ids) == length]
        answers = torch.tensor([spelled[i] for i in chosen])
        rows = with_answers(inputs, answers)
        with torch.no_grad():
            steps = model(**rows).logits[:, start - 1 :].double().log_softmax(-1)
        own = steps[:, :-1].gather(2, answers[..., None])[..., 0].sum(1)
        for row, i in enumerate(chosen):
            if any(other[:length] == spelled[i] and len(other) > length for other in spelled):
                own[row] += (1 - steps[row, -1, digits].exp().sum()).log()
        total[chosen] = own
    return (total.softmax(0) * torch.arange(101).repeat(2)).sum().item()


@pytest.mark.parametrize("family", ["open_qwen2vl", "llava", "qwen2_vl"])
def test_the_expectation_is_that_of_all_strings_scored_alone(scorer_of, models, pairs, family):
    scorer = scorer_of(family)
    assert scorer.parts == ("one", "two") and scorer.shares_prefix
    model = AutoModelForImageTextToText.from_pretrained(models[family], dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(models[family])
    scores = scorer.score(scorer.collate(pairs))
    assert scores.dtype == np.float64 and scores.shape == (3, 2)
    # Not the pair between them, whose caption becomes control tokens in the library's way.
    for row, column, prompt in ((0, 1, PROMPTS["two"]), (2, 0, PROMPTS["one"])):
        text = prompt.replace("{caption}", pairs[row].caption)
        expected = mean_of_all_strings(model, processor, pairs[row].image, text)
        assert scores[row, column] == pytest.approx(expected, abs=1e-3, rel=1e-5)
    assert np.ptp(scores) > 1


@pytest.mark.parametrize("family", ["open_qwen2vl", "llava", "qwen2_vl"])
def test_a_shared_prefix_changes_nothing(scorer_of, models, prompts_file, pairs, family):
    scorer = scorer_of(family)
    batch = scorer.collate(pairs)
    with torch.inference_mode():
        shared, whole = (torch.stack(list(scorer._probabilities(batch, own))) for own in (True, False))
    torch.testing.assert_close(shared, whole, atol=1e-5, rtol=0)
    # Nor does the company of other pairs, or of another metric.
    alone = np.concatenate([scorer.score(scorer.collate([pair])) for pair in pairs])
    np.testing.assert_allclose(scorer.score(batch), alone, atol=1e-3)
    single = MlmFilterScorer(models[family], ["two"], prompts_file, device="cpu")
    np.testing.assert_allclose(single.score(single.collate(pairs)), alone[:, 1:], atol=1e-3)


@pytest.mark.parametrize("family", ["open_qwen2vl", "llava", "qwen2_vl"])
def test_greedy_writes_what_generate_writes(scorer_of, models, pairs, family):
    scorer = scorer_of(family, "greedy")
    assert scorer.shares_prefix
    model = AutoModelForImageTextToText.from_pretrained(models[family], dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(models[family])
    with torch.inference_mode():
        answers = list(scorer._answers(scorer.collate(pairs)))
    for row in (0, 2):
        for column, prompt in enumerate(PROMPTS.values()):
            inputs = whole_prompt(processor, pairs[row].image, prompt.replace("{caption}", pairs[row].caption))
            new = scorer._format.score_tokens.longest
            output = model.generate(**inputs, max_new_tokens=new, do_sample=False)[:, inputs["input_ids"].shape[1] :]
            assert answers[column][row] == processor.decode(output[0], skip_special_tokens=True)


@pytest.mark.parametrize("family", ["open_qwen2vl", "llava", "qwen2_vl"])
def test_a_caption_never_becomes_a_control_token(scorer_of, pairs, family):
    scorer = scorer_of(family)
    plain, special, _ = scorer.collate(pairs).tails[0]
    tokenizer = scorer._tokenizer
    control = set(tokenizer.all_special_ids)
    assert [id for id in special if id in control] == [id for id in plain if id in control]
    assert pairs[1].caption in tokenizer.decode(special)


def test_a_model_that_learnt_numbers_is_read_both_ways(models, prompts_file, tmp_path):
    """100 too, which takes three tokens: the original's two could not write it."""
    scorer = MlmFilterScorer(models["open_qwen2vl"], ["one"], prompts_file, device="cpu")
    image = Image.new("RGB", (32, 32), (200, 30, 30))
    numbers = {"a": 7, "b": 85, "c": 100, "d": 10, "e": 0, "f": 1}
    pairs = [Pair(caption, "", image, caption) for caption in numbers]
    model, tokenizer = scorer._model, scorer._tokenizer
    batch = scorer.collate(pairs)
    answers = [tokenizer(f"{number}<|im_end|>", add_special_tokens=False)["input_ids"] for number in numbers.values()]
    prompt = batch.head["input_ids"][0].tolist() + batch.tails[0][0]
    rows = [batch.head["input_ids"][i].tolist() + batch.tails[0][i] + answer for i, answer in enumerate(answers)]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    labels = torch.tensor([[-100] * len(prompt) + row[len(prompt) :] + [-100] * (longest - len(row)) for row in rows])
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    model.train()
    for _ in range(60):
        model(
            input_ids=ids, pixel_values=batch.head["pixel_values"], image_seq_length=4, labels=labels
        ).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(tmp_path)
    AutoProcessor.from_pretrained(models["open_qwen2vl"]).save_pretrained(tmp_path)
    for decode, tolerance in (("greedy", 0), ("expectation", 3)):
        trained = MlmFilterScorer(str(tmp_path), ["one"], prompts_file, decode=decode, device="cpu")
        scores = trained.score(trained.collate(pairs))[:, 0]
        np.testing.assert_allclose(scores, list(numbers.values()), atol=tolerance)


class ForgetfulConfig(LlavaConfig):
    """A model that cannot be continued by more than a few tokens."""

    model_type = "forgetful_llava"


class ForgetfulLlava(LlavaForConditionalGeneration):
    """Reads each longer text as if it stood at the beginning."""

    config_class = ForgetfulConfig

    def forward(self, input_ids=None, position_ids=None, past_key_values=None, **kwargs):
        """Positions restart."""
        if past_key_values is not None and past_key_values.get_seq_length() and input_ids.shape[1] > 4:
            position_ids = torch.arange(input_ids.shape[1])[None]
        return super().forward(
            input_ids=input_ids, position_ids=position_ids, past_key_values=past_key_values, **kwargs
        )


def test_a_model_that_cannot_be_continued_reads_whole_prompts(scorer_of, prompts_file, pairs, tmp_path, caplog):
    AutoConfig.register("forgetful_llava", ForgetfulConfig, exist_ok=True)
    AutoModelForImageTextToText.register(ForgetfulConfig, ForgetfulLlava, exist_ok=True)
    folder = save_llava(tmp_path, ForgetfulLlava, ForgetfulConfig)
    scorer = MlmFilterScorer(folder, prompts=prompts_file, device="cpu")
    assert not scorer.shares_prefix and "reads each metric's prompt anew" in caplog.text
    sound = scorer_of("llava")
    np.testing.assert_allclose(scorer.score(scorer.collate(pairs)), sound.score(sound.collate(pairs)), atol=1e-3)


def test_the_command_scores_a_tar(models, write_tar, sample, encode, tmp_path):
    narrow = encode(Image.new("RGB", (250, 1)))
    bad = [*sample("c", image=b"no image"), *sample("d", image=narrow), *sample("e", "cat " * 5000)]
    tar = write_tar([*sample("a", "a cat"), *sample("b", "two dogs"), *bad])
    reasons = {"a": None, "b": None, "c": "corrupt_image", "d": "image_too_large", "e": "too_long"}
    options = ["--model", models["llava"], "--output", str(tmp_path / "scores"), "--device", "cpu"]
    assert main(["score", str(tar), "--scorer", "mlm-filter", *options, "--batch-size", "2"]) == 0
    table = pq.read_table(tmp_path / "scores" / "mlm-filter" / "00000.parquet").to_pylist()
    assert {row["scorer"] for row in table} == {f"mlm-filter.{metric}" for metric in METRICS}
    assert {row["key"]: row["reason"] for row in table} == reasons
    assert all(0 <= row["value"] <= 100 for row in table if row["reason"] is None)
    # Untrained, it writes anything but a number.
    greedy = ["--decode", "greedy", "--metric", "semantic_understanding", "--name", "written"]
    assert main(["score", str(tar), "--scorer", "mlm-filter", *options, *greedy]) == 0
    table = pq.read_table(tmp_path / "scores" / "written" / "00000.parquet").to_pylist()
    assert [row["reason"] for row in table] == ["unparsable_score"] * 2 + [reasons[key] for key in "cde"]


def test_our_prompts_begin_alike():
    prompts = read_prompts(None, ["all"])
    assert list(prompts) == METRICS
    assert all(
        text.startswith("Caption: {caption}\n") and " 0 " in text and " 100 " in text for text in prompts.values()
    )
    assert list(read_prompts(None, ["semantic_understanding"])) == ["semantic_understanding"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("metrics: [", "not a YAML file"),
        ("- a", "needs the key metrics"),
        ("metrics: {}", "needs the key metrics"),
        ("metrics: {good: 5}", r"metrics.good: must be a text with \{caption\}"),
        ("metrics: {good: is it good}", r"metrics.good: must be a text with \{caption\}"),
        ("metrics: {'a b': '{caption}'}", "metrics.a b: a metric's name"),
        ("metrics: {all: '{caption}'}", "metrics.all: a metric's name"),
        ("metrics: {bad: '{caption}'}", "--metric good: .* has bad"),
    ],
)
def test_prompts_that_cannot_be_used_are_named(tmp_path, content, message):
    file = tmp_path / "prompts.yaml"
    file.write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        read_prompts(str(file), ["good"])
    assert str(file) in str(error.value)


NO_IMAGE = "{% for m in messages %}{% for c in m.content %}{{ c.text }}{% endfor %}{% endfor %}"
IMAGE_LAST = "{% for m in messages %}{{ m.content[-1].text }}<image>{% endfor %}"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("", "it has no chat template"),
        (NO_IMAGE, "its chat template does not put the image before the text"),
        (IMAGE_LAST, "its chat template does not put the image before the text"),
    ],
)
def test_chat_templates_that_cannot_ask_are_named(models, tmp_path, template, message):
    shutil.copytree(models["llava"], tmp_path, dirs_exist_ok=True)
    (tmp_path / "chat_template.jinja").write_text(template)
    with pytest.raises(ValueError, match=f"--model {tmp_path}: {message}"):
        MlmFilterScorer(str(tmp_path), device="cpu")


def test_other_mistakes_are_named(models, tmp_path):
    with pytest.raises(ValueError, match=f"--model {tmp_path}: not an image-text-to-text model"):
        MlmFilterScorer(str(tmp_path), device="cpu")
    for name in (
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ):
        shutil.copy(f"{models['llava']}/{name}", tmp_path)
    with pytest.raises(ValueError, match=f"--model {tmp_path}: .*processor"):
        MlmFilterScorer(str(tmp_path), device="cpu")
    with pytest.raises(ValueError, match="--decode sampled: must be one of expectation, greedy"):
        MlmFilterScorer(models["llava"], decode="sampled", device="cpu")
