"""A new model from two backbones: their dtypes, and room in the embedding for the tokens that the processor adds."""

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, SiglipVisionModel

from open_qwen2vl import OpenQwen2VLForConditionalGeneration, OpenQwen2VLProcessor


@pytest.fixture
def build(backbones, processor):
    """`build(**options)`: a model of these backbones and its output for an image and a text, with the loss."""

    def of(vision=backbones["vision"], text=backbones["text"], **options):
        model = OpenQwen2VLForConditionalGeneration.from_vision_text_pretrained(vision, text, 4, **options)
        pixels = torch.zeros((1, 3, 32, 32), dtype=torch.uint8)
        ids = torch.tensor([[*[processor.image_token_id] * 4, 30, 31]])
        return model, model(input_ids=ids, pixel_values=pixels, labels=ids)

    return of


@pytest.mark.parametrize(("options", "dtype"), [({}, torch.bfloat16), ({"dtype": "auto"}, torch.bfloat16),
                                                ({"dtype": torch.float32}, torch.float32)])  # fmt: skip
def test_backbones_of_different_dtypes_become_one(backbones, build, tmp_path, options, dtype):
    AutoModelForCausalLM.from_pretrained(backbones["text"]).to(torch.bfloat16).save_pretrained(tmp_path / "text")
    OpenQwen2VLProcessor.from_vision_text_pretrained(**backbones).tokenizer.save_pretrained(tmp_path / "text")
    assert SiglipVisionModel.from_pretrained(backbones["vision"]).dtype == torch.float32
    model, output = build(text=str(tmp_path / "text"), **options)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert output.loss.isfinite()


@pytest.mark.parametrize("missing", [["<s>"], []], ids=["neither", "<|endofchunk|> only"])
def test_a_full_vocabulary_gets_rows_for_the_added_tokens(backbones, build, tmp_path, missing):
    """The embedding has exactly as many rows as the vocabulary; the processor adds one token or two to it."""
    state = PreTrainedTokenizerFast.from_pretrained(backbones["text"]).backend_tokenizer.to_str()
    for token in missing:
        state = state.replace(f'"{token}"', '"<other>"')
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(state), eos_token="<|im_end|>")
    tokenizer.save_pretrained(tmp_path)
    text = AutoModelForCausalLM.from_pretrained(backbones["text"])
    text.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    text.save_pretrained(tmp_path)
    model, _ = build(text=str(tmp_path))
    processor = OpenQwen2VLProcessor.from_vision_text_pretrained(backbones["vision"], str(tmp_path))
    ids = processor.tokenizer.convert_tokens_to_ids(["<s>", "<|endofchunk|>"])
    assert max(ids) == len(tokenizer) + len(missing)
    assert model.config.text_config.vocab_size == max(ids) + 1 == model.lm_head.out_features
    assert model.lm_head.weight is model.get_input_embeddings().weight
    labels = torch.tensor([ids])
    assert model(input_ids=labels, labels=labels).loss.isfinite()
    model.save_pretrained(tmp_path / "whole")
    loaded = OpenQwen2VLForConditionalGeneration.from_pretrained(tmp_path / "whole")
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


def test_a_vocabulary_with_room_keeps_its_embedding(backbones, build):
    rows = AutoModelForCausalLM.from_pretrained(backbones["text"]).config.vocab_size
    assert build()[0].config.text_config.vocab_size == rows


def test_the_placeholder_cannot_win(backbones):
    """In any state, not only in those of this model: vLLM reads the head and no `suppress_tokens`."""
    model = OpenQwen2VLForConditionalGeneration.from_vision_text_pretrained(**backbones, image_seq_length=4)
    before = AutoModelForCausalLM.from_pretrained(backbones["text"]).lm_head.weight
    image = model.config.image_token_id
    others = torch.arange(len(before)) != image
    assert torch.equal(model.lm_head.weight[others], before[others])
    torch.manual_seed(0)
    logits = torch.randn(2000, before.shape[1]) @ model.lm_head.weight.T
    assert (logits[:, image] < logits[:, others].amax(1)).all()
    assert (logits.softmax(1)[:, image] <= 1 / others.sum()).all()
    # Before that it could.
    assert ((torch.randn(2000, before.shape[1]) @ before.T).argmax(1) == image).any()
