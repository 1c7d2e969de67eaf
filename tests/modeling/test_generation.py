"""Generation: batches with 0 to 4 images a prompt, every way of decoding, caches, compilation, streaming, errors."""

from threading import Thread

import pytest
import torch
from PIL import Image
from transformers import ContinuousBatchingConfig, GenerationConfig, TextIteratorStreamer

IMAGES = [0, 3, 1, 4, 2]  # images of each prompt of the batch
GREEDY = {"max_new_tokens": 8, "min_new_tokens": 8}


@pytest.fixture(scope="session")
def prompts():
    """Text and images of five prompts of different lengths."""
    pictures = [Image.effect_noise((40 + i, 30), 90).convert("RGB") for i in range(sum(IMAGES))]
    rows = []
    for number, count in enumerate(IMAGES):
        own, pictures = pictures[:count], pictures[count:]
        rows.append(("<s>" + "<|image_pad|> dogs" * count + "\na cat" + " on a mat" * number, own))
    return rows


@pytest.fixture
def encode(processor, prompts):
    """`encode(numbers, **options)`: the batch of these prompts, left-padded."""

    def build(numbers=None, **options):
        chosen = prompts if numbers is None else [prompts[number] for number in numbers]
        text, images = zip(*chosen, strict=True)
        return processor(
            images=list(images) if any(images) else None,
            text=list(text),
            padding=True,
            padding_side="left",
            return_tensors="pt",
            **options,
        )

    return build


def generate(model, inputs, **options):
    """Only what was generated."""
    return model.generate(**{**inputs, **GREEDY, **options})[:, inputs["input_ids"].shape[1] :]


def one_by_one(model, encode, **options):
    return torch.cat([generate(model, encode([number]), **options) for number in range(len(IMAGES))])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2},
        {"cache_implementation": "static"},
        {"use_cache": False},
        {"repetition_penalty": 1.3},
    ],
    ids=["greedy", "beams", "both beams", "static cache", "no cache", "penalty"],
)
def test_a_batch_equals_its_prompts_one_by_one(tiny_model, encode, options):
    together = generate(tiny_model, encode(), **options)
    assert torch.equal(together, one_by_one(tiny_model, encode, **options))
    # A model that answered every prompt alike would pass.
    assert len({tuple(row) for row in together.tolist()}) > 2


def test_a_batch_of_chats_equals_the_chats_one_by_one(tiny_model, processor, prompts):
    chats = []
    for number, (_, images) in enumerate(prompts):
        content = [{"type": "image", "image": image} for image in images]
        chats.append([{"role": "user", "content": [*content, {"type": "text", "text": "a cat" + " mat" * number}]}])

    def answer(conversations):
        inputs = processor.apply_chat_template(
            conversations,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, "padding_side": "left"},
        )
        return generate(tiny_model, inputs)

    assert torch.equal(answer(chats), torch.cat([answer([chat]) for chat in chats]))


def test_pictures_reach_their_own_prompt_only(tiny_model, encode):
    inputs = encode()
    logits = tiny_model(**inputs).logits[:, -1]
    owners = torch.repeat_interleave(torch.arange(len(IMAGES)), torch.tensor(IMAGES))
    for row in range(len(IMAGES)):
        mine = (owners == row)[:, None, None, None]
        others = {**inputs, "pixel_values": torch.where(mine, -inputs["pixel_values"], inputs["pixel_values"])}
        moved = (tiny_model(**others).logits[:, -1] - logits).abs().amax(-1) > 1e-3
        assert moved.nonzero().flatten().tolist() == ([row] if IMAGES[row] else [])


@pytest.mark.parametrize("option", [{"cache_implementation": "static"}, {"use_cache": False}], ids=["static", "none"])
def test_every_cache_gives_the_same(tiny_model, encode, option):
    assert torch.equal(generate(tiny_model, encode(), **option), generate(tiny_model, encode()))


def test_sampling_is_repeatable_and_expands_each_prompt_with_its_images(tiny_model, encode):
    inputs = encode()

    def sample(seed, **options):
        torch.manual_seed(seed)
        return generate(tiny_model, inputs, do_sample=True, num_return_sequences=3, **options)

    sampled = sample(0, temperature=1.5)
    assert sampled.shape == (3 * len(IMAGES), 8)
    assert torch.equal(sampled, sample(0, temperature=1.5))
    assert not torch.equal(sampled, sample(1, temperature=1.5))
    # With one candidate left, sampling is greedy; copies that mixed up the images would answer otherwise.
    assert torch.equal(sample(0, top_k=1), generate(tiny_model, inputs).repeat_interleave(3, dim=0))


@pytest.mark.parametrize("budget", [1, 9, 16])
def test_the_budget_of_a_call_reaches_generation(tiny_model, encode, budget):
    inputs = encode(image_seq_length=budget)
    placeholders = (inputs["input_ids"] == tiny_model.config.image_token_id).sum(dim=1)
    assert placeholders.tolist() == [count * budget for count in IMAGES]
    alone = [generate(tiny_model, encode([number], image_seq_length=budget)) for number in range(len(IMAGES))]
    assert torch.equal(generate(tiny_model, inputs), torch.cat(alone))


def test_the_prefill_compiles_without_a_graph_break(tiny_model, encode):
    inputs = encode()
    compiled = torch.compile(tiny_model.forward, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(**inputs, logits_to_keep=1).logits, tiny_model(**inputs, logits_to_keep=1).logits)


def test_a_compiled_model_generates_the_same(tiny_model, encode):
    inputs = encode()
    expected = generate(tiny_model, inputs)
    tiny_model.forward = torch.compile(tiny_model.forward, backend="eager")
    assert torch.equal(generate(tiny_model, inputs, cache_implementation="static"), expected)


def test_streaming_gives_the_text_piece_by_piece(tiny_model, encode, processor):
    # A streamer hands out whole words, so the model may write only tokens that begin one.
    words = [i for token, i in processor.tokenizer.get_vocab().items() if token.startswith("Ġ") and len(token) > 1]
    options = {**encode([1]), **GREEDY, "prefix_allowed_tokens_fn": lambda row, ids: words}
    whole = processor.decode(generate(tiny_model, options)[0], skip_special_tokens=True)
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, timeout=60, skip_special_tokens=True)
    thread = Thread(target=tiny_model.generate, kwargs={**options, "streamer": streamer})
    thread.start()
    pieces = list(streamer)
    thread.join()
    assert "".join(pieces) == whole and len([piece for piece in pieces if piece]) > 4


def test_an_answer_ends_at_the_end_of_turn(tiny_model, encode, tokenizer):
    """The head is set so that `<|im_end|>` wins at every position."""
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    tiny_model.lm_head.weight = torch.nn.Parameter(torch.zeros_like(tiny_model.lm_head.weight))
    tiny_model.lm_head.bias = torch.nn.Parameter(torch.eye(len(tiny_model.lm_head.weight))[end])
    assert tiny_model.generation_config.eos_token_id == end
    out = tiny_model.generate(**encode(), max_new_tokens=8)
    assert out.shape[1] == encode()["input_ids"].shape[1] + 1
    assert (out[:, -1] == end).all()


def test_a_finished_row_is_padded_while_others_go_on(tiny_model, encode, tokenizer):
    free = generate(tiny_model, encode())
    # A token that one row writes early and another does not stands for the end of turn.
    end = next(int(t) for t in free[:, 1] if not (free == t).any(dim=1).all())
    out = tiny_model.generate(**encode(), max_new_tokens=8, eos_token_id=end)[:, encode()["input_ids"].shape[1] :]
    for row, unstopped in zip(out.tolist(), free.tolist(), strict=True):
        length = unstopped.index(end) + 1 if end in unstopped else len(unstopped)
        rest = out.shape[1] - min(length, out.shape[1])
        assert row == unstopped[:length] + [tokenizer.pad_token_id] * rest


def test_placeholders_are_never_generated(tiny_model, encode):
    """Without a cache a generated placeholder would count as one more image token."""
    image = tiny_model.config.image_token_id
    tiny_model.lm_head.weight = torch.nn.Parameter(torch.zeros_like(tiny_model.lm_head.weight))
    tiny_model.lm_head.bias = torch.nn.Parameter(torch.eye(len(tiny_model.lm_head.weight))[image])
    assert not (generate(tiny_model, encode(), use_cache=False) == image).any()


@pytest.mark.parametrize(
    ("text", "images", "message"),
    [
        ("<|image_pad|> and <|image_pad|>", 1, "total 2 .* tokens and 1 images"),
        ("no picture", 2, "total 0 .* tokens and 2 images"),
        ("<|image_pad|>", 0, "Found 1 .* no images"),
    ],
)
def test_prompt_and_images_that_disagree(processor, text, images, message):
    pictures = [Image.new("RGB", (8, 8)) for _ in range(images)]
    with pytest.raises(ValueError, match=message):
        processor(text=text, images=pictures or None)


def test_placeholders_and_images_that_disagree_in_generate(tiny_model, encode):
    inputs = encode()
    with pytest.raises(ValueError, match="tokens: 40, features: 12"):
        tiny_model.generate(**{**inputs, "pixel_values": inputs["pixel_values"][:3]})
    del inputs["pixel_values"]
    with pytest.raises(ValueError, match="40 image placeholder tokens, but 0 images"):
        tiny_model.generate(**inputs)


def test_generation_from_embeddings(tiny_model, encode):
    """With pixels whose places are the placeholders' embeddings, with features in place, with and without ids."""
    inputs = encode([1, 3])
    expected = generate(tiny_model, inputs)
    embeds = tiny_model.get_input_embeddings()(inputs["input_ids"])
    features = torch.stack(tiny_model.get_image_features(inputs["pixel_values"]).pooler_output)
    placeholders = (inputs["input_ids"] == tiny_model.config.image_token_id)[..., None]
    shared = {"attention_mask": inputs["attention_mask"], **GREEDY}
    ways = [
        {"inputs_embeds": embeds, "pixel_values": inputs["pixel_values"]},
        {"inputs_embeds": embeds.masked_scatter(placeholders, features)},
    ]
    for options in ways:
        assert torch.equal(tiny_model.generate(**options, **shared), expected)
        with_ids = tiny_model.generate(inputs["input_ids"], **options, **shared)
        assert torch.equal(with_ids[:, inputs["input_ids"].shape[1] :], expected)


@pytest.mark.parametrize("chunk", [3, 8, 1000])
def test_a_prefill_in_chunks_gives_the_same(tiny_model, encode, chunk):
    inputs = encode([0, 1, 3])
    assert torch.equal(generate(tiny_model, inputs, prefill_chunk_size=chunk), generate(tiny_model, inputs))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_paged_attention_is_no_training_pack(tiny_model, processor, attention):
    tiny_model.set_attn_implementation(attention)
    prompts = [processor(text=text)["input_ids"][0] for text in ("<s>a cat on a mat", "<s>two dogs run in the park a")]
    config = GenerationConfig(max_new_tokens=8, eos_token_id=-1, do_sample=False, use_cuda_graph=False)
    paging = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=64)  # the default takes most of the memory
    answers = tiny_model.generate_batch(prompts, generation_config=config, continuous_batching_config=paging)
    for prompt, answer in zip(prompts, answers.values(), strict=True):
        assert generate(tiny_model, {"input_ids": torch.tensor([prompt])})[0].tolist() == answer.generated_tokens
