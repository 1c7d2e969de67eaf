"""What llama.cpp calls the parts of an Open-Qwen2VL: names of tensors, keys of both files, the vocabulary.

Sources: llama.cpp's conversion/base.py and qwen.py (language model, vocabulary), tools/mtmd/clip.cpp (vision).
"""

import json
import tempfile
from collections.abc import Callable

import gguf
import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from ..modeling.configuration_open_qwen2vl import OpenQwen2VLConfig
from ..processing.processing_open_qwen2vl import OpenQwen2VLProcessor

_LANGUAGE = ("model.language_model.", "lm_head.")
_SUFFIXES = (".weight", ".bias")
_PROJECTOR = {"linear_1": "mm.0", "linear_2": "mm.2"}


def check_model(config: OpenQwen2VLConfig, processor: OpenQwen2VLProcessor, image_seq_length: int | None) -> None:
    """Refuse, each in one line, what llama.cpp would run as something else."""
    text, vision = config.text_config, config.vision_config
    rope = text.rope_parameters.get("rope_type", "default")
    windows = any(kind != "full_attention" for kind in getattr(text, "layer_types", None) or ())
    wanted = {
        "text_config.model_type": (text.model_type, ("qwen2",)),
        "text_config.hidden_act": (getattr(text, "hidden_act", None), ("silu",)),
        "text_config.rope_parameters.rope_type": (rope, ("default",)),
        "text_config.layer_types": ("sliding_attention" if windows else "full_attention", ("full_attention",)),
        "vision_config.model_type": (vision.model_type, ("siglip_vision_model",)),
        "vision_config.hidden_act": (getattr(vision, "hidden_act", None), ("gelu_pytorch_tanh", "gelu")),
        "projector_hidden_act": (config.projector_hidden_act, ("gelu",)),
    }
    for name, (value, known) in wanted.items():
        if value not in known:
            raise ValueError(f"{name}={value!r} cannot be exported: only {' or '.join(known)}")
    grid = config.patches_per_side**2
    if (budget := image_seq_length or config.image_seq_length) != grid:
        raise ValueError(
            f"image_seq_length={budget}: llama.cpp cannot pool, an image takes all {grid} tokens there. The weights "
            f"are the same: see what the model answers so (`open-qwen2vl chat MODEL --image-seq-length {grid}`), or "
            f"fine-tune it so, and export with `--image-seq-length {grid}`"
        )
    _check_tokenizer(processor.tokenizer, text.vocab_size)


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """llama.cpp splits by a rule that the file names: another one would give other ids in silence."""
    if PRETOKENIZE_REGEX not in _split_patterns(tokenizer):
        raise ValueError("the tokenizer does not split text as Qwen2's does: llama.cpp would read other ids")
    if (most := max(tokenizer.get_vocab().values())) >= vocab_size:
        raise ValueError(f"the tokenizer has id {most}, and the embedding {vocab_size} rows")


def _split_patterns(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    rule = json.loads(tokenizer.backend_tokenizer.to_str())["pre_tokenizer"] or {}
    return [part.get("pattern", {}).get("Regex") for part in rule.get("pretokenizers", [rule])]


def text_tensors(state: dict[str, torch.Tensor], config: OpenQwen2VLConfig) -> dict[str, torch.Tensor]:
    """The language model's tensors by llama.cpp's names; a tied head is not there, which it takes for tied."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, config.text_config.num_hidden_layers)
    skipped = {"lm_head.weight"} if config.tie_word_embeddings else set()
    own = {name: tensor for name, tensor in state.items() if name.startswith(_LANGUAGE) and name not in skipped}
    return _renamed(own, lambda name: names.get_name(name.replace("model.language_model.", "model."), _SUFFIXES))


def vision_tensors(state: dict[str, torch.Tensor], config: OpenQwen2VLConfig) -> dict[str, torch.Tensor]:
    """Tensors of tower and projector by the names of LLaVA's form."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, config.num_vision_blocks)

    def rename(name: str) -> str | None:
        part, _, rest = name.removeprefix("model.").partition(".")
        if part == "multi_modal_projector":
            module, _, kind = rest.partition(".")
            return f"{_PROJECTOR[module]}.{kind}"
        return names.get_name(f"vision_tower.vision_model.{rest}", _SUFFIXES)

    return _renamed({name: tensor for name, tensor in state.items() if not name.startswith(_LANGUAGE)}, rename)


def _renamed(tensors: dict[str, torch.Tensor], rename: Callable[[str], str | None]) -> dict[str, torch.Tensor]:
    renamed = {name: rename(name) for name in tensors}
    if unknown := [name for name, other in renamed.items() if other is None]:
        raise ValueError(f"llama.cpp has no name for {', '.join(unknown[:8])}")
    return {renamed[name]: tensor for name, tensor in tensors.items()}


def add_text_keys(writer: gguf.GGUFWriter, text: PreTrainedConfig) -> None:
    """Sizes of the language model."""
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_block_count(text.num_hidden_layers)
    writer.add_context_length(text.max_position_embeddings)
    writer.add_embedding_length(text.hidden_size)
    writer.add_feed_forward_length(text.intermediate_size)
    writer.add_head_count(text.num_attention_heads)
    writer.add_head_count_kv(text.num_key_value_heads)
    writer.add_rope_freq_base(text.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(text.rms_norm_eps)
    if (head_dim := getattr(text, "head_dim", None)) is not None:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)


def add_tokenizer(writer: gguf.GGUFWriter, processor: OpenQwen2VLProcessor, config: OpenQwen2VLConfig) -> None:
    """Vocabulary, merges, special ids and chat templates."""
    tokens, types = vocabulary(processor.tokenizer, config.text_config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    with tempfile.TemporaryDirectory() as folder:
        processor.save_pretrained(folder)
        special = gguf.SpecialVocab(folder, load_merges=True, special_token_types=("bos", "eos", "pad"))
    special.add_to_gguf(writer, quiet=True)
    # `<s>` is the beginning here, not the config's; the template writes it, and a second one must not be added.
    writer.add_add_bos_token(False)
    # A model may write the placeholder, which no label ever spoke against.
    writer.add_array("tokenizer.ggml.suppress_tokens", [config.image_token_id])


def vocabulary(tokenizer: PreTrainedTokenizerBase, size: int) -> tuple[list[str], list[int]]:
    """Texts and types of all `size` rows of the embedding; those without a token are unused."""
    texts = {number: text for text, number in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    types = []
    for number in range(size):
        known, text = number in texts, texts.setdefault(number, f"[PAD{number}]")
        if number in added:
            is_control = added[number].special or (text.startswith("<|") and text.endswith("|>"))
            types.append(gguf.TokenType.CONTROL if is_control else gguf.TokenType.USER_DEFINED)
        else:
            types.append(gguf.TokenType.NORMAL if known else gguf.TokenType.UNUSED)
    return [texts[number] for number in range(size)], types


def add_vision_keys(
    writer: gguf.GGUFWriter, config: OpenQwen2VLConfig, image_processor: SiglipImageProcessorPil
) -> None:
    """Sizes of the tower, and which block's output is projected."""
    vision = config.vision_config
    writer.add_type(gguf.GGUFType.MMPROJ)
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type("mlp")
    # The tanh GELU; without this key it would be CLIP's quick one.
    writer.add_vision_use_gelu(True)
    writer.add_vision_image_size(vision.image_size)
    writer.add_vision_patch_size(vision.patch_size)
    writer.add_vision_embedding_length(vision.hidden_size)
    writer.add_vision_feed_forward_length(vision.intermediate_size)
    writer.add_vision_projection_dim(config.text_config.hidden_size)
    writer.add_vision_head_count(vision.num_attention_heads)
    writer.add_vision_attention_layernorm_eps(vision.layer_norm_eps)
    writer.add_vision_image_mean(list(image_processor.image_mean))
    writer.add_vision_image_std(list(image_processor.image_std))
    writer.add_vision_block_count(config.num_vision_blocks)
    # LLaVA's form runs one block too few without it, in silence.
    writer.add_array("clip.vision.feature_layer", [config.num_vision_blocks])
