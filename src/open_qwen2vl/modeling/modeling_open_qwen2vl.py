"""Open-Qwen2VL (arXiv 2504.00595): SigLIP features, average pooling to a token budget, MLP, Qwen2.5.

Names and outputs are LLaVA's (`vision_tower`, `multi_modal_projector`, `language_model`); what differs is here:
the vision blocks after `vision_feature_layer` do not exist, the projector pools to a budget chosen per call, packed
batches isolate documents, and the loss never builds the logits of unlabelled positions.
This file travels with checkpoints: it imports installed libraries and its siblings only.
"""

import os
from dataclasses import dataclass

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GenerationMixin,
    SiglipVisionModel,
)
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import slice_logits_to_keep
from transformers.models.llava.modeling_llava import (
    LlavaCausalLMOutputWithPast,
    LlavaModel,
    LlavaModelOutputWithPast,
    LlavaPreTrainedModel,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple

from .attention import PACKED_VARLEN
from .configuration_open_qwen2vl import OpenQwen2VLConfig, pooled_grid_side
from .loss import selected_position_loss

# Qwen2.5's own vocabulary has it (id 151655); the original left it unused.
IMAGE_TOKEN = "<|image_pad|>"


@dataclass
class OpenQwen2VLCausalLMOutputWithPast(LlavaCausalLMOutputWithPast):
    """LLaVA's output, with the losses of each row where they are asked for.

    Args:
        row_losses (`torch.FloatTensor` of shape `(batch,)`, *optional*): sum of the losses of each row's labels,
            detached.
    """

    row_losses: torch.FloatTensor | None = None


class OpenQwen2VLMultiModalProjector(nn.Module):
    """Average-pools a square patch grid to a square token budget, then Linear, GELU, Linear (paper, section 2.1)."""

    def __init__(self, config: OpenQwen2VLConfig):
        super().__init__()
        hidden_size = config.text_config.hidden_size
        self.linear_1 = nn.Linear(config.vision_config.hidden_size, hidden_size)
        self.act = ACT2FN[config.projector_hidden_act]
        self.linear_2 = nn.Linear(hidden_size, hidden_size)

    @staticmethod
    def pool(image_features: torch.Tensor, image_seq_length: int) -> torch.Tensor:
        """`(images, grid * grid, width)` to `(images, image_seq_length, width)` by adaptive average pooling."""
        images, patches, width = image_features.shape
        if patches == image_seq_length:
            return image_features
        grid, side = int(patches**0.5), int(image_seq_length**0.5)
        features = image_features.transpose(1, 2).reshape(images, width, grid, grid)
        return nn.functional.adaptive_avg_pool2d(features, (side, side)).flatten(2).transpose(1, 2)

    def forward(self, image_features: torch.Tensor, image_seq_length: int) -> torch.Tensor:
        """Project patch features to image tokens.

        Args:
            image_features (`torch.Tensor` of shape `(images, grid * grid, vision_hidden)`): patch features.
            image_seq_length (`int`): tokens per image, a square number.

        Returns:
            `torch.Tensor` of shape `(images, image_seq_length, text_hidden)`.
        """
        pooled = self.pool(image_features, image_seq_length)
        return self.linear_2(self.act(self.linear_1(pooled)))


class OpenQwen2VLPreTrainedModel(LlavaPreTrainedModel):
    """Weights' initialisation, loading and saving, shared by both classes below."""

    config: OpenQwen2VLConfig
    config_class = OpenQwen2VLConfig

    def save_pretrained(self, *args, **kwargs) -> None:
        """As in transformers, but `auto_map` names both classes of this file, not only the one that is saved."""
        if self.is_remote_code():
            module = __name__.rpartition(".")[2]
            self.config.auto_map = {
                **(getattr(self.config, "auto_map", None) or {}),
                "AutoModel": f"{module}.OpenQwen2VLModel",
                "AutoModelForImageTextToText": f"{module}.OpenQwen2VLForConditionalGeneration",
                "AutoModelForMultimodalLM": f"{module}.OpenQwen2VLForConditionalGeneration",
            }
        super().save_pretrained(*args, **kwargs)


class OpenQwen2VLModel(OpenQwen2VLPreTrainedModel, LlavaModel):
    """Vision tower, projector and language model, without the language-modelling head."""

    def __init__(self, config: OpenQwen2VLConfig):
        OpenQwen2VLPreTrainedModel.__init__(self, config)
        self.vision_tower = truncate_vision_tower(SiglipVisionModel._from_config(config.vision_config), config)
        self.multi_modal_projector = OpenQwen2VLMultiModalProjector(config)
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        image_seq_length: int | list[int] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        """Encode images to language-model embeddings.

        Args:
            pixel_values (`torch.Tensor` of shape `(images, 3, height, width)`): uint8 pixels, which are normalised
                here with mean = std = 0.5, or floats, which are taken as they are.
            image_seq_length (`int` or `list[int]`, *optional*): tokens per image; the config's where not given. A list
                has an entry for each image, all the same.
            **kwargs: passed to the vision tower.

        Returns:
            `BaseModelOutputWithPooling`: `last_hidden_state` has the patch features of shape
            `(images, grid * grid, vision_hidden)`; `pooler_output` is a list with the features of each image, of
            shape `(image_seq_length, text_hidden)`.

        Raises:
            ValueError: if the images are not of the tower's size, or the budget does not fit its grid.
        """
        outputs, features = self._encode_images(pixel_values, image_seq_length, **kwargs)
        return BaseModelOutputWithPooling(
            last_hidden_state=outputs.last_hidden_state,
            pooler_output=list(features),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _encode_images(
        self, pixel_values: torch.Tensor, image_seq_length: int | list[int] | None, **kwargs
    ) -> tuple[BaseModelOutputWithPooling, torch.Tensor]:
        """Output of the tower, and features `(images, image_seq_length, text_hidden)` in one tensor.

        A list of them would make a compiler start anew for every number of images.
        """
        if isinstance(image_seq_length, torch.Tensor):
            image_seq_length = image_seq_length.tolist()  # TRL's GRPO makes tensors of all that a processor returns
        if image_seq_length is None:
            image_seq_length = self.config.image_seq_length
        elif isinstance(image_seq_length, list | tuple):
            budgets = set(image_seq_length)
            if len(budgets) != 1:
                raise ValueError(f"images of one call must have the same image_seq_length, not {sorted(budgets)}")
            image_seq_length = budgets.pop()
        pooled_grid_side(image_seq_length, self.config.patches_per_side)
        size = self.config.vision_config.image_size
        if tuple(pixel_values.shape[-2:]) != (size, size):
            raise ValueError(
                f"pixel_values are {tuple(pixel_values.shape)}; the vision tower takes {size}x{size} images"
            )
        if not pixel_values.is_floating_point():
            pixel_values = pixel_values.float().div_(255).sub_(0.5).div_(0.5)
        trained = any(parameter.requires_grad for parameter in self.vision_tower.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and trained):
            outputs = self.vision_tower(pixel_values, return_dict=True, **kwargs)
        return outputs, self.multi_modal_projector(outputs.last_hidden_state, image_seq_length)

    def _zero_image_term(self, inputs_embeds: torch.Tensor) -> torch.Tensor:
        """0 computed from a blank image: a text-only batch has the same collectives and gradients as others."""
        size = self.config.vision_config.image_size
        blank = torch.zeros((1, 3, size, size), dtype=torch.uint8, device=inputs_embeds.device)
        return self._encode_images(blank, None)[1].sum().to(inputs_embeds.dtype) * 0

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        image_seq_length: int | list[int] | None = None,
        use_cache: bool | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> LlavaModelOutputWithPast:
        """See [`OpenQwen2VLForConditionalGeneration.forward`] for the arguments."""
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if pixel_values is not None and mm_encoder_outputs is not None:
            raise ValueError("You cannot specify both pixel_values and mm_encoder_outputs at the same time")
        # A cache would switch the isolation of packed documents off in silence, so it is never built unasked.
        use_cache = use_cache if use_cache is not None else past_key_values is not None
        packed = kwargs.get("cu_seq_lens_q") is not None
        if packed:
            _check_packed_arguments(position_ids, attention_mask, past_key_values, use_cache)
            attention_mask = self._packed_attention_mask()

        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        image_outputs = (mm_encoder_outputs or {}).get("image")
        image_features = None
        if image_outputs is not None:
            image_features = torch.stack(list(image_outputs.pooler_output))
        elif pixel_values is not None:
            _, image_features = self._encode_images(pixel_values, image_seq_length)
        if image_features is not None:
            image_features = image_features.to(inputs_embeds.device, inputs_embeds.dtype)
            if packed and input_ids is not None and (input_ids.is_cuda or torch.compiler.is_compiling()):
                mask = self._placeholder_mask_without_waiting(input_ids, image_features)
            else:
                mask = self.get_placeholder_mask(input_ids, inputs_embeds, image_features)
            inputs_embeds = inputs_embeds.masked_scatter(mask, image_features)
        elif past_key_values is None and (self.training or packed):
            inputs_embeds = inputs_embeds + self._zero_image_term(inputs_embeds)

        outputs = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        return LlavaModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=image_features,
        )

    def _placeholder_mask_without_waiting(
        self, input_ids: torch.LongTensor, image_features: torch.Tensor
    ) -> torch.BoolTensor:
        """As `get_placeholder_mask`, but the device itself checks the count: the host runs ahead of it."""
        mask = input_ids == self.config.image_token_id
        torch._assert_async(
            mask.sum() == image_features.shape[0] * image_features.shape[1],
            "image features and image placeholder tokens differ in number",
        )
        return mask.unsqueeze(-1)

    def _packed_attention_mask(self) -> dict[str, None] | None:
        """No mask at all for `packed_varlen`; for the others None lets transformers isolate documents by position."""
        config = self.language_model.config
        if config._attn_implementation != PACKED_VARLEN:
            return None
        return dict.fromkeys(config.layer_types)


class OpenQwen2VLForConditionalGeneration(OpenQwen2VLPreTrainedModel, GenerationMixin):
    """Open-Qwen2VL with its language-modelling head: training, generation, `pipeline("image-text-to-text")`."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: OpenQwen2VLConfig):
        super().__init__(config)
        self.model = OpenQwen2VLModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        """The language-modelling head."""
        return self.lm_head

    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        image_seq_length: int | list[int] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        """See [`OpenQwen2VLModel.get_image_features`]."""
        return self.model.get_image_features(pixel_values, image_seq_length, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        image_seq_length: int | list[int] | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        skip_logits: bool | None = None,
        return_row_losses: bool = False,
        label_positions: torch.LongTensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> OpenQwen2VLCausalLMOutputWithPast:
        r"""Run the model, with the loss where labels are given.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch, sequence)`): token ids; each image is
                `image_seq_length` times `config.image_token_id`.
            pixel_values (`torch.Tensor` of shape `(images, 3, height, width)`): all images of the batch in reading
                order, uint8 (normalised here) or float (taken as they are).
            attention_mask (`torch.Tensor` of shape `(batch, sequence)`, *optional*): 1 for real tokens of a padded
                batch. An error in a packed batch.
            position_ids (`torch.LongTensor` of shape `(batch, sequence)`, *optional*): needed in a packed batch,
                where they restart at 0 for each document.
            past_key_values (`Cache`, *optional*): as in any transformers model. An error in a packed batch.
            inputs_embeds (`torch.Tensor` of shape `(batch, sequence, hidden)`, *optional*): instead of `input_ids`.
            labels (`torch.LongTensor` of shape `(batch, sequence)`, *optional*): token ids, -100 where nothing is to
                be predicted; shifted inside. The loss is computed at the labelled positions only.
            image_seq_length (`int` or `list[int]`, *optional*): tokens per image of this call; the config's where not
                given. It is never inferred from counts.
            use_cache (`bool`, *optional*): False where not given and no `past_key_values` are passed.
            logits_to_keep (`int` or `torch.Tensor`, *optional*, defaults to 0): last positions, or the positions,
                whose logits are returned; 0 for all.
            skip_logits (`bool`, *optional*): return no logits; by default True in training with labels.
            return_row_losses (`bool`, *optional*, defaults to `False`): with labels, return the sum of the losses of
                each row as well.
            label_positions (`torch.LongTensor` of shape `(labelled,)`, *optional*): positions of the flattened batch
                that predict a label, as the collator gives them; found on the device, which then is waited for, where
                not given.
            mm_encoder_outputs (`dict`, *optional*): `{"image": output of get_image_features}` instead of
                `pixel_values`.
            kwargs: `cu_seq_lens_q`, `cu_seq_lens_k` (int32, over the flattened batch), `max_length_q`, `max_length_k`
                mark a packed batch; `num_items_in_batch` divides the summed loss.

        Returns:
            `OpenQwen2VLCausalLMOutputWithPast`: `loss` (fp32 scalar), `logits` of shape
            `(batch, kept, vocabulary)`, `row_losses` (fp32, `(batch,)`) where asked for.

        Raises:
            ValueError: if placeholders and image features differ in number, or a packed batch comes with an
                attention mask, a cache, or no positions.
        """
        num_items_in_batch = kwargs.pop("num_items_in_batch", None)
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            image_seq_length=image_seq_length,
            use_cache=use_cache,
            mm_encoder_outputs=mm_encoder_outputs,
            **kwargs,
        )
        loss = row_losses = None
        if labels is not None:
            loss, row_losses = selected_position_loss(
                outputs.last_hidden_state,
                self.lm_head,
                labels,
                num_items_in_batch,
                return_row_losses=True,
                label_positions=label_positions,
            )
        if skip_logits is None:
            skip_logits = self.training and labels is not None
        logits = None
        if not skip_logits:
            logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        return OpenQwen2VLCausalLMOutputWithPast(
            loss=loss,
            row_losses=row_losses if return_row_losses else None,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
        )

    def prepare_inputs_for_generation(self, input_ids: torch.LongTensor, **kwargs) -> dict:
        """As in transformers; placeholders for which there are no images end here instead of in nonsense.

        Raises:
            ValueError: with the number of placeholders.
        """
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
        without_images = inputs.get("pixel_values") is None and not inputs.get("mm_encoder_outputs")
        if kwargs.get("is_first_iteration") and without_images and inputs.get("input_ids") is not None:
            placeholders = (inputs["input_ids"] == self.config.image_token_id).sum().item()
            if placeholders:
                raise ValueError(f"the prompts have {placeholders} image placeholder tokens, but 0 images were given")
        return inputs

    @classmethod
    def from_vision_text_pretrained(
        cls, vision: str, text: str, image_seq_length: int = 144, **kwargs
    ) -> "OpenQwen2VLForConditionalGeneration":
        """Build a new model from two pre-trained backbones; only the projector is randomly initialised.

        Args:
            vision (`str`): hub id or folder of a SigLIP model (`google/siglip-so400m-patch14-384`).
            text (`str`): hub id or folder of a Qwen2 model (`Qwen/Qwen2.5-1.5B-Instruct`).
            image_seq_length (`int`, *optional*, defaults to 144): tokens per image where a call names none.
            kwargs: passed to both `from_pretrained` calls (`dtype`, `attn_implementation`, `revision`, ...).

        Returns:
            [`OpenQwen2VLForConditionalGeneration`], in evaluation mode as after `from_pretrained`.

        Raises:
            ValueError: if `vision` is no SigLIP model, or the tokenizer of `text` has no `<|image_pad|>`.
        """
        vision_config = AutoConfig.from_pretrained(vision)
        vision_config = getattr(vision_config, "vision_config", vision_config)
        if vision_config.model_type != "siglip_vision_model":
            raise ValueError(f"{vision}: the vision tower must be a SigLIP model, not {vision_config.model_type!r}")
        image_token_id = AutoTokenizer.from_pretrained(text).get_vocab().get(IMAGE_TOKEN)
        if image_token_id is None:
            raise ValueError(f"{text}: the tokenizer has no {IMAGE_TOKEN} token, which stands for an image feature")
        language_model = AutoModelForCausalLM.from_pretrained(text, **kwargs)
        vision_tower = SiglipVisionModel.from_pretrained(vision, config=vision_config, **kwargs)
        for backbone in (vision_tower, language_model):
            if os.path.isdir(backbone.config._name_or_path):
                # It would be saved and published; a hub id may stand there, a path of this machine should not.
                backbone.config._name_or_path = ""
        config = OpenQwen2VLConfig(
            vision_config=vision_tower.config,
            text_config=language_model.config,
            image_token_id=image_token_id,
            image_seq_length=image_seq_length,
        )
        with torch.device("meta"):
            # Without the name of the attention the new top level would reset that of the two backbones.
            model = cls._from_config(config, attn_implementation=kwargs.get("attn_implementation"))
        return model._adopt(vision_tower, language_model).eval()

    def _adopt(
        self, vision_tower: SiglipVisionModel, language_model: nn.Module
    ) -> "OpenQwen2VLForConditionalGeneration":
        """Take the modules of two loaded backbones in place of the empty ones, and initialise the projector."""
        self.model.vision_tower = truncate_vision_tower(vision_tower, self.config)
        self.model.language_model = language_model.model
        self.lm_head = language_model.lm_head
        projector = OpenQwen2VLMultiModalProjector(self.config)
        projector.apply(self._init_weights)
        self.model.multi_modal_projector = projector.to(language_model.device, language_model.dtype)
        given = language_model.generation_config
        # Greedy by default, unlike Qwen2.5's own sampling settings; the token ids are what must not be lost.
        # Nothing teaches the model not to write a placeholder: as a label it never occurs.
        self.generation_config = GenerationConfig(
            bos_token_id=given.bos_token_id,
            eos_token_id=given.eos_token_id,
            pad_token_id=given.pad_token_id,
            suppress_tokens=[self.config.image_token_id],
        )
        return self


def truncate_vision_tower(vision_tower: SiglipVisionModel, config: OpenQwen2VLConfig) -> SiglipVisionModel:
    """Drop what the features of `config.vision_feature_layer` do not need: later blocks, final norm, pooling head."""
    del vision_tower.encoder.layers[config.num_vision_blocks :]
    vision_tower.post_layernorm = nn.Identity()
    vision_tower.use_head = False
    if hasattr(vision_tower, "head"):
        del vision_tower.head
    return vision_tower


def _check_packed_arguments(position_ids, attention_mask, past_key_values, use_cache: bool) -> None:
    if position_ids is None:
        raise ValueError("a packed batch (cu_seq_lens_q) needs position_ids that restart at 0 for each document")
    if attention_mask is not None:
        raise ValueError("a packed batch (cu_seq_lens_q) takes no attention_mask: it would join the documents")
    if past_key_values is not None or use_cache:
        raise ValueError("a packed batch (cu_seq_lens_q) takes no cache: it would join the documents")


# `save_pretrained` writes this as auto_map, for readers with trust_remote_code=True and without this package.
OpenQwen2VLModel.register_for_auto_class("AutoModel")
OpenQwen2VLForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")

__all__ = ["OpenQwen2VLForConditionalGeneration", "OpenQwen2VLModel", "OpenQwen2VLPreTrainedModel"]
