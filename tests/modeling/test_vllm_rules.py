"""The rules of vLLM's Transformers modeling backend, each as a test; vLLM itself is not run.

Rules: huggingface.co/docs/transformers/transformers_as_backend and docs.vllm.ai, "Supported models, Writing custom
models"; the calls imitate those of vllm/model_executor/models/transformers/{base,multimodal}.py.
"""

import copy
import inspect
import re

import pytest
import torch
from PIL import Image
from torch import nn
from transformers import AttentionInterface, AutoModel, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.processing_utils import MultiModalData

PAD = "<|image_pad|>"
SIZES = [(40, 30), (30, 90), (500, 7)]  # (height, width)


@pytest.fixture(scope="module")
def images():
    """Noise of the sizes above."""
    return [Image.effect_noise((width, height), 90).convert("RGB") for height, width in SIZES]


@pytest.fixture
def call(processor, images):
    """`call(text, number, **options)`: the processor as vLLM calls it, special tokens being in the prompt."""

    def build(text, number=3, **options):
        options = {"return_tensors": "pt", "truncation": False, "add_special_tokens": False, **options}
        return processor(text=text, images=images[:number], **options)

    return build


# The config


def test_config_names_its_type_its_code_and_its_text_config(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path)
    config = type(tiny_model.config).from_pretrained(tmp_path)
    assert config.model_type == "open_qwen2vl"
    # vLLM builds the model without its head, from the code that the checkpoint names.
    assert config.auto_map["AutoModel"].endswith(".OpenQwen2VLModel")
    assert config.get_text_config() is config.text_config is not config
    assert config.text_config.model_type == "qwen2" and config.tie_word_embeddings is True


# The attention


def test_text_attention_goes_through_the_interface_with_the_arguments_of_the_top_call(tiny_model):
    calls = []

    def recording_attention(module, query, key, value, attention_mask, attention_instances=None, **kwargs):
        calls.append((module.layer_idx, attention_mask, attention_instances))
        return sdpa_attention_forward(module, query, key, value, None, is_causal=True, scaling=kwargs["scaling"])

    AttentionInterface.register("recording", recording_attention)
    config = copy.deepcopy(tiny_model.config)
    config.text_config._attn_implementation = "recording"
    base = AutoModel.from_config(config).eval()
    base.load_state_dict(tiny_model.model.state_dict())
    assert base._supports_attention_backend and base.vision_tower.config._attn_implementation == "sdpa"

    ids, positions, instances = torch.arange(10, 19)[None], torch.arange(9)[None], {0: "first", 1: "second"}
    with torch.no_grad():
        outputs = base(
            input_ids=ids, position_ids=positions, use_cache=False, attention_instances=instances, return_dict=False
        )
        expected = tiny_model.model(input_ids=ids).last_hidden_state
    assert isinstance(outputs, tuple) and torch.equal(outputs[0], expected)
    assert [(layer, mask) for layer, mask, _ in calls] == [(0, None), (1, None)]
    assert all(given is instances for _, _, given in calls)


def test_the_decoder_is_causal_and_the_encoder_is_not(tiny_model):
    def flags(module):
        return [child.is_causal for child in module.modules() if hasattr(child, "is_causal")]

    assert flags(tiny_model.model.get_decoder()) == [True] * 2
    assert flags(tiny_model.model.get_encoder("image")) == [False] * 2
    assert tiny_model.model.get_decoder() is tiny_model.model.language_model
    assert tiny_model.model.get_encoder("image") is tiny_model.model.vision_tower


# Tensor and pipeline parallel plans


def test_tensor_parallel_plan_names_every_projection_of_the_decoder(tiny_model):
    base, plan = tiny_model.model, tiny_model.model.tp_plan
    styles = {}
    for name, module in base.named_modules():
        if isinstance(module, nn.Linear):
            (styles[name],) = [style for pattern, style in plan.items() if re.match(pattern, name)] or [None]
    decoder = {name: style for name, style in styles.items() if name.startswith("language_model.")}
    assert len(decoder) == 2 * 7 and set(decoder.values()) == {"colwise", "rowwise"}
    assert {name.split(".")[-1] for name, style in decoder.items() if style == "rowwise"} == {"o_proj", "down_proj"}
    # What the plan does not name is held whole on each rank: the vision tower and the projector.
    assert {style for name, style in styles.items() if name not in decoder} == {None}
    assert tiny_model.config.text_config.base_model_tp_plan


def test_pipeline_plan_names_modules_in_order_with_one_list_of_layers(tiny_model):
    base = tiny_model.model
    assert base.supports_pp_plan
    modules = [base.get_submodule(name) for name in base._pp_plan]
    assert [type(module) for module in modules[:2]] == [nn.Embedding, nn.ModuleList] and len(modules) == 3
    assert modules[0] is base.get_input_embeddings() and modules[1] is base.language_model.layers


# The images


def test_image_features_are_one_tensor_per_image(tiny_model, call):
    inputs = call(PAD * 3)
    features = tiny_model.model.get_image_features(inputs["pixel_values"])
    # vLLM takes the first entry of a tuple, and `pooler_output` of a ModelOutput.
    assert not isinstance(features, tuple) and isinstance(features.pooler_output, list)
    assert [tuple(one.shape) for one in features.pooler_output] == [(4, 48)] * 3


def test_an_image_in_company_has_the_features_it_has_alone(tiny_model, call):
    """vLLM caches features by image."""
    with torch.no_grad():
        inputs = call(PAD * 3)
        together = tiny_model.model.get_image_features(inputs["pixel_values"]).pooler_output
        first = tiny_model.model.get_image_features(call(PAD, 1)["pixel_values"]).pooler_output
    torch.testing.assert_close(together[0], first[0], atol=1e-6, rtol=1e-5)


def test_embeddings_with_features_scattered_in_equal_the_whole_forward(tiny_model, call):
    """VLLM calls the encoder, scatters its output over the placeholders and gives the decoder embeddings only."""
    inputs = call(f"<s>a cat {PAD} and dogs {PAD}{PAD} on a mat")
    base, ids = tiny_model.model, inputs["input_ids"]
    with torch.no_grad():
        embeddings = base.get_input_embeddings()(ids)
        embeddings[ids == tiny_model.config.image_token_id] = torch.cat(
            base.get_image_features(inputs["pixel_values"]).pooler_output
        )
        positions = torch.arange(ids.shape[1])[None]
        (hidden, *_) = base(inputs_embeds=embeddings, position_ids=positions, use_cache=False, return_dict=False)
        assert torch.equal(tiny_model.lm_head(hidden), tiny_model(**inputs).logits)


# The processor


def test_processor_names_its_image_token(processor, tiny_model):
    assert processor.image_token == PAD and processor.image_token_ids == [processor.image_token_id]
    assert processor.image_token_id == tiny_model.config.image_token_id
    # A sub-processor that does not exist would have vLLM offer videos or sound.
    assert not hasattr(processor, "video_processor") and not hasattr(processor, "feature_extractor")


@pytest.mark.parametrize("options", [{}, {"image_seq_length": 9}], ids=["default", "budget"])
def test_numbers_of_tokens_and_patches_are_those_of_the_real_output(processor, call, options):
    numbers = processor._get_num_multimodal_tokens(image_sizes=SIZES, **options)
    inputs = call(PAD * 3, **options)
    assert isinstance(numbers, MultiModalData)
    assert sum(numbers["num_image_tokens"]) == (inputs["input_ids"] == processor.image_token_id).sum()
    assert len(numbers["num_image_tokens"]) == 3 and sum(numbers["num_image_patches"]) == len(inputs["pixel_values"])
    # The image of the most tokens is looked for with this one.
    assert processor._get_num_multimodal_tokens(image_sizes=([10_000, 10_000],), **options)["num_image_tokens"] == [
        options.get("image_seq_length", 4)
    ]


def test_token_types_mark_the_placeholders(processor, call):
    inputs = call(f"<s>a cat {PAD} and dogs {PAD}{PAD}", return_mm_token_type_ids=True)
    expected = (inputs["input_ids"] == processor.image_token_id).int()
    assert torch.as_tensor(inputs["mm_token_type_ids"]).tolist() == expected.tolist() and expected.sum() == 12
    assert "mm_token_type_ids" not in call(PAD * 3)


def test_replacements_encode_to_what_the_prompt_has(processor, call):
    """Newer vLLM finds images by the offsets, and rebuilds a prompt from the replacements."""
    inputs = call(f"a cat {PAD} and dogs {PAD}{PAD}", return_text_replacement_offsets=True)
    (offsets,) = inputs["text_replacement_offsets"]
    assert [entry["type"] for entry in offsets] == ["image"] * 3
    for entry in offsets:
        ids = processor.tokenizer.encode(entry["replacement"], add_special_tokens=False)
        assert ids == [processor.image_token_id] * 4


def cut_per_image(inputs: dict, number: int) -> list[dict]:
    """What vLLM makes of the processor's output: lists are indexed, everything else is sliced by patches."""
    fields = {key: value for key, value in inputs.items() if key not in ("input_ids", "attention_mask")}
    items = []
    for index in range(number):
        cut = {k: v[index] if isinstance(v, list) else v[index : index + 1] for k, v in fields.items()}
        items.append(cut)
    return items


def test_every_output_can_be_cut_per_image(call):
    assert len(cut_per_image(call(PAD * 3), 3)) == 3


def test_a_budget_that_cannot_be_is_refused_by_the_processor(processor, call, tmp_path):
    """Behind it vLLM's engine would end, and all requests with it."""
    for budget in (5, 0, 25):
        with pytest.raises(ValueError, match=f"image_seq_length={budget} must be a square number between 1 and 16"):
            call(PAD * 3, image_seq_length=budget)
        with pytest.raises(ValueError, match=f"image_seq_length={budget} must be"):
            processor._get_num_multimodal_tokens(image_sizes=SIZES, image_seq_length=budget)
    processor.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="between 1 and 16"):
        type(processor).from_pretrained(tmp_path, image_seq_length=25)


# Kernels


@pytest.mark.parametrize("options", [{}, {"image_seq_length": 16}], ids=["pooled", "full grid"])
def test_the_input_of_every_linear_is_contiguous(tiny_model, call, options):
    """What a kernel may ask for: oneDNN's in vLLM refuses a transposed view."""
    views = set()
    for name, module in tiny_model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(
                lambda _, inputs, name=name: None if inputs[0].is_contiguous() else views.add(name)
            )
    with torch.no_grad():
        tiny_model(**call(f"<s>a cat {PAD} and dogs {PAD}{PAD}", **options))
    assert views == set()


# Compilation


def test_text_path_compiles_as_one_graph(tiny_model):
    """Prefill and decode of a prompt without images, each a full graph."""
    compiled = torch.compile(tiny_model.forward, backend="eager", fullgraph=True)
    ids = torch.arange(10, 22)[None]
    with torch.no_grad():
        whole = tiny_model(input_ids=ids).logits
        cache = DynamicCache(config=tiny_model.config.text_config)
        prefill = compiled(input_ids=ids[:, :8], past_key_values=cache, use_cache=True).logits
        steps = [
            compiled(input_ids=ids[:, i : i + 1], past_key_values=cache, use_cache=True).logits for i in range(8, 12)
        ]
    torch.testing.assert_close(torch.cat([prefill, *steps], dim=1), whole, atol=1e-5, rtol=1e-5)


def test_text_path_has_no_branch_on_ids(tiny_model):
    """One graph, of a dynamic length, serves every prompt; a branch on values would compile again."""
    counter = torch._dynamo.testing.CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(tiny_model.model.forward, backend=counter, fullgraph=True, dynamic=True)
    image_token = tiny_model.config.image_token_id
    with torch.no_grad():
        for ids in (torch.arange(10, 19), torch.full((9,), image_token), torch.arange(30, 51)):
            compiled(input_ids=ids[None], position_ids=torch.arange(len(ids))[None], use_cache=False)
    assert counter.frame_count == 1


def test_forwards_take_what_vllm_passes(tiny_model):
    parameters = inspect.signature(type(tiny_model.model).forward).parameters
    assert {"input_ids", "inputs_embeds", "position_ids", "use_cache", "kwargs"} <= set(parameters)
    features = inspect.signature(type(tiny_model.model).get_image_features).parameters
    assert next(iter(features)) == "self" and list(features)[1] == "pixel_values" and "kwargs" in features
