"""A document in a pack sees only itself: logits, loss and all gradients are those of the stock model on it alone."""

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AttentionInterface, AutoModelForImageTextToText, Trainer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from open_qwen2vl import prepare_for_packing
from open_qwen2vl.families.qwen_vl.processing import QwenVLDocuments
from tests.families.qwen_vl.packs import make_document, mixed_documents, pack
from tests.qwen_vl import FAMILIES, make_model, make_processor

ATTENTION = ["eager", "sdpa", "packed_varlen"]
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}


class Case:
    """A family's stock model, its documents, and what the stock model says of each document alone."""

    def __init__(self, family: str, tokenizer):
        self.family = family
        self.processor = make_processor(family, tokenizer)
        self.tokenizer = tokenizer
        self.layout = QwenVLDocuments(self.processor)
        self.documents = mixed_documents(self.layout)
        self.labels = sum(int((d["labels"] != -100).sum()) for d in self.documents)
        model = self.stock()
        self.logits = []
        loss = 0
        for document in self.documents:
            output = model(
                **self.stock_inputs(document), labels=document["labels"][None], num_items_in_batch=self.labels
            )
            self.logits.append(output.logits[0].detach())
            loss = loss + output.loss
        loss.backward()
        self.loss = loss.detach()
        self.gradients = {name: p.grad for name, p in model.named_parameters()}

    def stock(self, attention: str = "sdpa", **text):
        return make_model(self.family, self.tokenizer, attention, **text)

    def stock_inputs(self, document: dict) -> dict:
        """What the stock processor makes of it: floats of two frames, no positions of ours."""
        ids = document["input_ids"][None]
        inputs = {"input_ids": ids, "use_cache": False}
        for kind, frames, part in (("", 2, "image"), ("_videos", 1, "video")):
            grid = f"{part}_grid_thw"
            if not len(document[grid]):
                continue
            processor = getattr(self.processor, f"{part}_processor")
            mean, std = (torch.tensor(v)[:, None] * 255 for v in (processor.image_mean, processor.image_std))
            pixels = (document[f"pixel_values{kind}"].unflatten(1, (3, -1)).float() - mean) / std
            inputs[f"pixel_values{kind}"] = pixels[:, :, None].expand(-1, -1, frames, -1).flatten(1)
            inputs[grid] = document[grid]
            if kind and "second_per_grid_ts" in document:
                inputs["second_per_grid_ts"] = document["second_per_grid_ts"]
        if len(inputs) > 2:
            image, video = self.processor.image_token_id, self.processor.video_token_id
            inputs["mm_token_type_ids"] = ((ids == image) + 2 * (ids == video)).int()
        return inputs

    def rows(self) -> list[list[dict]]:
        return [self.documents[:5], self.documents[5:]]

    def check_logits(self, logits: torch.Tensor) -> None:
        """Equal to 1e-5 of a document's largest: the stock convolution itself is that far from its fp64 values."""
        expected = iter(self.logits)
        for row, own in zip(self.rows(), logits, strict=True):
            start = 0
            for document in row:
                length = len(document["input_ids"])
                alone = next(expected)
                torch.testing.assert_close(
                    own[start : start + length], alone, atol=1e-5 * alone.abs().max().item(), rtol=0
                )
                start += length


@pytest.fixture(scope="module", params=FAMILIES)
def case(request, qwen_vl_tokenizer) -> Case:
    return Case(request.param, qwen_vl_tokenizer)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("attention", ATTENTION)
def test_packed_equals_alone(case, attention, checkpointing):
    model = prepare_for_packing(case.stock(), case.processor).train()
    model.set_attn_implementation(attention)
    if checkpointing:
        model.activation_checkpointing_enable()
    # use_cache is not given on purpose: the config's True would join the documents.
    output = model(**pack(case.rows()), skip_logits=False, return_row_losses=True)
    output.loss.backward()
    torch.testing.assert_close(output.loss, case.loss, **TOLERANCE)
    torch.testing.assert_close(output.row_losses.sum() / case.labels, case.loss, **TOLERANCE)
    case.check_logits(output.logits)
    weights = torch.tensor([0.5, 3.0])
    weighted = model(**pack(case.rows()), loss_weights=weights).loss
    torch.testing.assert_close(weighted, weights @ output.row_losses / case.labels, **TOLERANCE)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            parameter.grad, case.gradients[name], **TOLERANCE, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("attention", ATTENTION)
def test_a_changed_document_changes_no_other(case, attention):
    model = prepare_for_packing(case.stock(), case.processor)
    model.set_attn_implementation(attention)
    batch = pack(case.rows())
    ends = np.cumsum([len(document["input_ids"]) for document in case.rows()[1]])
    # The first document of the first row; the last but one of the second, the first with a clip.
    for name, own in (("pixel_values", (0, 0, len(case.documents[0]["input_ids"]))),
                      ("pixel_values_videos", (1, ends[-3], ends[-2]))):  # fmt: skip
        changed = dict(batch, **{name: batch[name].clone()})
        changed[name][0] = 255 - changed[name][0]
        with torch.no_grad():
            before, after = (model(**one, skip_logits=False).logits for one in (batch, changed))
        row, start, stop = own
        assert not torch.equal(before[row, start:stop], after[row, start:stop])
        before[row, start:stop] = after[row, start:stop] = 0
        assert torch.equal(before, after)


def test_pixels_of_the_stock_processor_are_taken_as_they_are(case):
    model = prepare_for_packing(case.stock(), case.processor)
    batch = pack(case.rows())
    inputs = [case.stock_inputs(document) for document in case.documents]
    names = ("pixel_values", "pixel_values_videos")
    stock = batch | {name: torch.cat([one[name] for one in inputs if name in one]) for name in names}
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).loss, model(**stock).loss, **TOLERANCE)


def test_labels_and_counts_of_a_whole_step(case):
    model = prepare_for_packing(case.stock(), case.processor)
    batch = pack(case.rows())
    shifted = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100).flatten()
    positions = torch.nonzero(shifted != -100).squeeze(1)
    with torch.no_grad():
        output = model(**batch, label_positions=positions, num_items_in_batch=torch.tensor(4 * case.labels))
        no_labels = model(**{name: value for name, value in batch.items() if name != "labels"})
    assert output.logits is None and output.row_losses is None
    torch.testing.assert_close(4 * output.loss, case.loss, **TOLERANCE)
    assert no_labels.loss is None
    case.check_logits(no_labels.logits)


def test_packed_equals_alone_under_lora(case):
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj", "qkv"], init_lora_weights=False)
    gradients, losses = [], []
    for packed in (False, True):
        model = case.stock()
        torch.manual_seed(1)
        model = get_peft_model(model, config)
        if packed:
            assert prepare_for_packing(model, case.processor) is model
            loss = model(**pack(case.rows())).loss
        else:
            loss = sum(
                model(**case.stock_inputs(d), labels=d["labels"][None], num_items_in_batch=case.labels).loss
                for d in case.documents
            )
        loss.backward()
        losses.append(loss.detach())
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    torch.testing.assert_close(*losses, **TOLERANCE)
    assert len(gradients[0]) > 8
    torch.testing.assert_close(*gradients, **TOLERANCE)


@pytest.mark.parametrize("attention", ATTENTION)
def test_a_batch_without_images_gives_every_parameter_a_gradient_and_the_tower_zeros(case, attention):
    model = prepare_for_packing(case.stock(), case.processor).train()
    model.set_attn_implementation(attention)
    texts = [make_document(case.layout, [text]) for text in ("one text", "and another one")]
    model(**pack([texts[:1], texts[1:]])).loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    assert not [name for name, gradient in gradients.items() if gradient is None]
    assert not any(gradient.any() for name, gradient in gradients.items() if "visual" in name)
    assert all(gradient.any() for name, gradient in gradients.items() if "mlp" in name and "visual" not in name)


def test_a_text_pack_after_a_generation_does_not_take_its_positions(case):
    """transformers keeps the rope_deltas of the last generation, for another number of rows."""
    model = prepare_for_packing(case.stock(), case.processor)
    batch = pack([[make_document(case.layout, ["one text"])]])
    with torch.no_grad():
        before = model(**batch, skip_logits=False).logits
        inputs = case.stock_inputs(case.documents[0])
        model.generate(
            **{name: torch.cat([inputs[name]] * 2) for name in inputs if name != "use_cache"}, max_new_tokens=1
        )
        assert model.model.rope_deltas is not None
        assert torch.equal(model(**batch, skip_logits=False).logits, before)


REFUSED = {
    "attention_mask": (lambda b: {"attention_mask": torch.ones_like(b["input_ids"])}, "attention_mask"),
    "cache": (lambda b: {"use_cache": True}, "cache"),
    "no positions": (lambda b: {"position_ids": None}, "position_ids"),
    "three rows": (lambda b: {"position_ids": b["position_ids"][1:]}, "position_ids"),
    "two dimensions": (lambda b: {"position_ids": b["position_ids"][0]}, "position_ids"),
    "embeddings": (lambda b: {"input_ids": None, "inputs_embeds": torch.zeros(2, 3, 48)}, "inputs_embeds"),
    "encoded": (lambda b: {"mm_encoder_outputs": {}}, "mm_encoder_outputs"),
}


@pytest.mark.parametrize("change", REFUSED)
def test_what_would_join_documents_is_an_error(case, change):
    model = prepare_for_packing(case.stock(), case.processor)
    batch = pack(case.rows())
    changes, message = REFUSED[change]
    with pytest.raises(ValueError, match=message):
        model(**batch | changes(batch))


def test_an_attention_that_knows_no_packs_is_refused(case, tiny_model):
    """One of the user's own, set afterwards: transformers gives it no mask, and the documents would be one."""
    AttentionInterface.register("of_a_user", sdpa_attention_forward)
    for model in (prepare_for_packing(case.stock(), case.processor), tiny_model):
        model.set_attn_implementation("of_a_user")
        batch = pack(case.rows())
        if model is tiny_model:
            media = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw", "second_per_grid_ts")
            batch = {name: value for name, value in batch.items() if name not in media}
            batch |= {"input_ids": batch["input_ids"].clamp(max=200), "position_ids": batch["position_ids"][0]}
        with pytest.raises(ValueError, match="does not go with the attention 'of_a_user'"):
            model(**batch)
    # By part: what the vision tower is set to counts for batches that are no packs.
    model = prepare_for_packing(case.stock(), case.processor)
    model.set_attn_implementation({"text_config": "sdpa", "vision_config": "eager"})
    with torch.no_grad():
        torch.testing.assert_close(model(**pack(case.rows())).loss, case.loss, **TOLERANCE)


def test_outside_of_packs_the_model_is_the_stock_one(case, tmp_path):
    stock, model = case.stock(), prepare_for_packing(case.stock(), case.processor)
    assert isinstance(model, type(stock)) and type(model).__name__ == type(stock).__name__
    inputs = case.stock_inputs(case.documents[2])
    labels = case.documents[2]["labels"][None]
    expected, output = (one(**inputs, labels=labels, num_items_in_batch=7) for one in (stock, model))
    assert torch.equal(output.logits, expected.logits) and torch.equal(output.loss, expected.loss)
    ids = inputs.pop("input_ids")
    inputs.pop("use_cache")
    generated = [one.generate(ids, **inputs, max_new_tokens=5, do_sample=False) for one in (stock, model)]
    assert torch.equal(*generated)
    for name, one in {"stock": stock, "packed": model}.items():
        one.save_pretrained(tmp_path / name)
    assert (tmp_path / "packed/config.json").read_text() == (tmp_path / "stock/config.json").read_text()
    assert (tmp_path / "packed/model.safetensors").read_bytes() == (tmp_path / "stock/model.safetensors").read_bytes()
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "packed")
    assert type(loaded) is type(stock)


def test_preparing_twice_changes_nothing_more(case):
    model = prepare_for_packing(case.stock(), case.processor)
    before = type(model), type(model.model.visual.blocks[0].attn)
    assert prepare_for_packing(model) is model
    assert (type(model), type(model.model.visual.blocks[0].attn)) == before
    with torch.no_grad():
        torch.testing.assert_close(model(**pack(case.rows())).loss, case.loss, **TOLERANCE)


def test_the_trainer_passes_the_number_of_labels(case, tmp_path):
    """transformers' 2.5 and 3 say they take no loss arguments: micro-batches would be averaged."""
    model = prepare_for_packing(case.stock(), case.processor)
    assert Trainer(model=model).model_accepts_loss_kwargs


def test_an_attention_that_was_asked_for_stays(case):
    assert prepare_for_packing(case.stock("eager")).model.language_model.config._attn_implementation == "eager"
    assert prepare_for_packing(case.stock()).model.language_model.config._attn_implementation == "packed_varlen"


def test_other_models_and_changed_ones_are_refused_by_name(case, tiny_model):
    with pytest.raises(ValueError, match="open_qwen2vl"):
        prepare_for_packing(tiny_model)
    model = case.stock()
    del model.model.visual.blocks[0].attn.qkv
    with pytest.raises(ValueError, match="attn.qkv"):
        prepare_for_packing(model)
    if case.family != "qwen3_vl":
        windows = case.stock(use_sliding_window=True, sliding_window=8, max_window_layers=1)
        with pytest.raises(ValueError, match="use_sliding_window"):
            prepare_for_packing(windows)


def test_times_of_another_config_are_refused(case):
    model = prepare_for_packing(case.stock(), case.processor)
    options = case.layout.forward_options()
    assert options == ({"tokens_per_second": 2.0} if case.family == "qwen2_5_vl" else {})
    with torch.no_grad():
        torch.testing.assert_close(model(**pack(case.rows()), **options).loss, case.loss, **TOLERANCE)
        images = {"tokens_per_second": 4.0, **pack([case.documents[:2]])}
        model(**images)
        if options:
            with pytest.raises(ValueError, match="--tokens-per-second 2"):
                model(**pack(case.rows()), tokens_per_second=4.0)
