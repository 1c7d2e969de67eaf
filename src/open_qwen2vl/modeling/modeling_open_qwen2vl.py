"""Open-Qwen2VL (arXiv 2504.00595): features of a vision tower, average pooling to a token budget, MLP, language model.

Names and outputs are LLaVA's (`vision_tower`, `multi_modal_projector`, `language_model`); what differs is here:
the vision blocks after `vision_feature_layer` do not exist, the projector pools to a budget chosen per call, packed
batches isolate documents, and the loss never builds the logits of unlabelled positions.
This file travels with checkpoints: it imports installed libraries and its siblings only.
"""

import torch
from torch import nn
from transformers import AutoModel, GenerationMixin
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava.modeling_llava import LlavaModel, LlavaModelOutputWithPast
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, can_return_tuple

from .attention import check_packed_arguments, is_packed, packed_attention_mask
from .backbones import load_backbones, put_together
from .configuration_open_qwen2vl import OpenQwen2VLConfig
from .loss import selected_position_loss
from .pretrained import OpenQwen2VLCausalLMOutputWithPast, OpenQwen2VLPreTrainedModel, slice_logits_to_keep
from .vision import (
    OpenQwen2VLMultiModalProjector,
    blank_image,
    encode_images,
    join_features,
    truncate_vision_tower,
)


class OpenQwen2VLModel(OpenQwen2VLPreTrainedModel, LlavaModel):
    """Vision tower, projector and language model, without the language-modelling head."""

    def __init__(self, config: OpenQwen2VLConfig):
        OpenQwen2VLPreTrainedModel.__init__(self, config)
        self.vision_tower = truncate_vision_tower(AutoModel.from_config(config.vision_config), config)
        self.multi_modal_projector = OpenQwen2VLMultiModalProjector(config)
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        image_seq_length: int | list[int] | None = None,
        image_shapes: torch.Tensor | list[list[int]] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        """Encode images to language-model embeddings.

        Args:
            pixel_values (`torch.Tensor` of shape `(images, 3, height, width)`): uint8 pixels, which are normalised
                here with `config.image_mean` and `image_std`, or floats, which are taken as they are.
            image_seq_length (`int` or `list[int]`, *optional*): tokens per image; the config's where not given. A list
                has an entry for each image.
            image_shapes (`torch.Tensor` or nested list of shape `(images, 4)`, *optional*): for a tower of native
                resolution, whose pixels are `(images, patches, P * P * 3)`: patches of each image, high and wide, and
                its tokens, high and wide, instead of a budget.
            **kwargs: passed to the vision tower.

        Returns:
            `BaseModelOutputWithPooling`: `last_hidden_state` has the tower's features of shape
            `(images, prefix + grid * grid, vision_hidden)`, the prefix being a class token and registers, if any;
            `pooler_output` is a list with the features of each image, of shape `(image_seq_length, text_hidden)`.

        Raises:
            ValueError: if the images are not of the tower's size, a budget does not fit its grid, or budgets that
                differ are not as many as the images.
        """
        outputs, features = encode_images(self, pixel_values, image_seq_length, image_shapes, **kwargs)
        return BaseModelOutputWithPooling(
            last_hidden_state=outputs.last_hidden_state,
            pooler_output=list(features),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _zero_image_term(self, inputs_embeds: torch.Tensor) -> torch.Tensor:
        """0 computed from a blank image: a text-only batch has the same collectives and gradients as others."""
        pixels, shapes = blank_image(self.config, inputs_embeds.device)
        features = encode_images(self, pixels, None, shapes)[1]
        return join_features(features).sum().to(inputs_embeds.dtype) * 0

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
        image_shapes: torch.Tensor | list[list[int]] | None = None,
        use_cache: bool | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        image_positions: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> LlavaModelOutputWithPast:
        """See [`OpenQwen2VLForConditionalGeneration.forward`] for the arguments."""
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if pixel_values is not None and mm_encoder_outputs is not None:
            raise ValueError("You cannot specify both pixel_values and mm_encoder_outputs at the same time")
        packed = is_packed(kwargs)
        if use_cache is None:
            # A cache would switch the isolation of packed documents off in silence.
            use_cache = past_key_values is not None or not (packed or self.training) and self._caches_by_default()
        if packed:
            check_packed_arguments(position_ids, attention_mask, past_key_values, use_cache)
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if packed:
            has_branches = kwargs.get("key_positions") is not None
            config = self.language_model.config
            attention_mask = packed_attention_mask(config, inputs_embeds, position_ids, has_branches)
        image_features = self._image_features(pixel_values, image_seq_length, image_shapes, mm_encoder_outputs)
        if image_features is not None:
            rows = join_features(image_features).to(inputs_embeds.device, inputs_embeds.dtype)
            inputs_embeds = self._place_images(inputs_embeds, input_ids, rows, image_positions)
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

    def _caches_by_default(self) -> bool:
        return getattr(self.config, "use_cache", True) and self.config.text_config.use_cache

    def _image_features(
        self,
        pixel_values: torch.Tensor | None,
        image_seq_length: int | list[int] | None,
        image_shapes: torch.Tensor | list[list[int]] | None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None,
    ) -> torch.Tensor | list[torch.Tensor] | None:
        """`(images, image_seq_length, hidden)`, or a list by image, computed or as given; None without images."""
        given = (mm_encoder_outputs or {}).get("image")
        if given is not None:
            return list(given.pooler_output)
        if pixel_values is None:
            return None
        return encode_images(self, pixel_values, image_seq_length, image_shapes)[1]

    def _place_images(
        self,
        inputs_embeds: torch.Tensor,
        input_ids: torch.LongTensor | None,
        rows: torch.Tensor,
        image_positions: torch.LongTensor | None,
    ) -> torch.Tensor:
        """Embeddings `(batch, sequence, hidden)` with the features `(placeholders, hidden)` in place of these."""
        if image_positions is not None:
            # On a device a mask would be waited for twice, in its check and in its backward.
            return inputs_embeds.flatten(0, 1).index_copy(0, image_positions, rows).view_as(inputs_embeds)
        mask = self.get_placeholder_mask(input_ids, inputs_embeds, rows[None])
        return inputs_embeds.masked_scatter(mask, rows)


class OpenQwen2VLForConditionalGeneration(OpenQwen2VLPreTrainedModel, GenerationMixin):
    """Open-Qwen2VL with its language-modelling head: training, generation, `pipeline("image-text-to-text")`.

    Arguments of `forward`, beside those of every transformers model:
        input_ids (`torch.LongTensor` of shape `(batch, sequence)`): each image is `image_seq_length` times
            `config.image_token_id`.
        pixel_values (`torch.Tensor` of shape `(images, 3, height, width)`): all images of the batch in reading order,
            uint8 (normalised here) or float (taken as they are).
        position_ids (`torch.LongTensor` of shape `(batch, sequence)`): needed in a packed batch, where they restart at
            0 for each document.
        labels (`torch.LongTensor` of shape `(batch, sequence)`): token ids, -100 where nothing is to be predicted;
            shifted inside. The loss (fp32) is computed at the labelled positions only.
        shift_labels (`torch.LongTensor` of shape `(batch, sequence)`): labels already shifted, instead of `labels`.
        image_seq_length (`int`, or one for each image): tokens per image of this call; the config's where not
            given. It is never inferred from counts.
        image_shapes (`torch.Tensor` or nested list of shape `(images, 4)`): of a tower of native resolution, as its
            processor gives them, instead.
        use_cache (`bool`): the config's where not given; never in training, with labels or in a packed batch.
        skip_logits (`bool`): return no logits; by default True in training with labels.
        return_row_losses (`bool`): with labels, return the sum of the losses of each row as well.
        label_positions (`torch.LongTensor` of shape `(labelled,)`): positions of the flattened batch that predict a
            label, as the collator gives them; looked for on the device, which then is waited for, where not given.
        image_positions (`torch.LongTensor` of shape `(images * image_seq_length,)`): positions of the placeholders in
            the flattened batch, as the collator gives them; looked for, likewise, where not given.
        mm_encoder_outputs (`dict`): `{"image": output of get_image_features}` instead of `pixel_values`.
        cu_seq_lens_q, cu_seq_lens_k (`torch.IntTensor`, over the flattened batch), max_length_q, max_length_k (`int`):
            mark a packed batch, which takes no `attention_mask` and no `past_key_values`.
        key_positions (`torch.LongTensor` of shape `(keys,)`): what each document or branch of it attends to, as the
            collator gives it where documents share pictures; `cu_seq_lens_k` are its boundaries.
        num_items_in_batch (`int` or `torch.Tensor`): divides the summed loss.
        loss_weights (`torch.FloatTensor` of shape `(batch,)`): what a label of each row counts in the sum (1).
    """

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
        image_shapes: torch.Tensor | list[list[int]] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        """See [`OpenQwen2VLModel.get_image_features`]."""
        return self.model.get_image_features(pixel_values, image_seq_length, image_shapes, **kwargs)

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
        image_shapes: torch.Tensor | list[list[int]] | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        skip_logits: bool | None = None,
        return_row_losses: bool = False,
        label_positions: torch.LongTensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        image_positions: torch.LongTensor | None = None,
        loss_weights: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> OpenQwen2VLCausalLMOutputWithPast:
        """Run the model, with the loss where labels are given; the class says what each argument is."""
        num_items_in_batch, shift_labels = kwargs.pop("num_items_in_batch", None), kwargs.pop("shift_labels", None)
        supervised = labels is not None or shift_labels is not None
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            image_seq_length=image_seq_length,
            image_shapes=image_shapes,
            use_cache=False if use_cache is None and past_key_values is None and supervised else use_cache,
            mm_encoder_outputs=mm_encoder_outputs,
            image_positions=image_positions,
            **kwargs,
        )
        hidden, loss, row_losses, logits = outputs.last_hidden_state, None, None, None
        if supervised:
            given = labels if shift_labels is None else shift_labels
            options = (num_items_in_batch, True, label_positions, shift_labels is not None, loss_weights)
            loss, row_losses = selected_position_loss(hidden, self.lm_head, given, *options)
        if not (self.training and supervised if skip_logits is None else skip_logits):
            logits = self.lm_head(slice_logits_to_keep(hidden, logits_to_keep))
        return OpenQwen2VLCausalLMOutputWithPast(
            loss=loss,
            row_losses=row_losses if return_row_losses else None,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
        )

    def generate(self, inputs: torch.Tensor | None = None, *args, **kwargs) -> torch.LongTensor | ModelOutput:
        """As in transformers; placeholders for which there are no images end here instead of in nonsense.

        Raises:
            ValueError: with the number of placeholders.
        """
        input_ids = kwargs.get("input_ids", inputs)
        sources = ("pixel_values", "mm_encoder_outputs", "inputs_embeds", "past_key_values")
        if input_ids is not None and all(kwargs.get(name) is None for name in sources):
            if placeholders := (input_ids == self.config.image_token_id).sum().item():
                raise ValueError(f"the prompts have {placeholders} image placeholder tokens, but 0 images were given")
        return super().generate(inputs, *args, **kwargs)

    @classmethod
    def from_vision_text_pretrained(
        cls, vision: str, text: str, image_seq_length: int = 144, **kwargs
    ) -> "OpenQwen2VLForConditionalGeneration":
        """Build a new model from two pre-trained backbones; only the projector is randomly initialised.

        Args:
            vision (`str`): hub id or folder of a vision tower with its image processor, or of a CLIP or SigLIP model
                (`google/siglip-so400m-patch14-384`).
            text (`str`): hub id or folder of a language model with its tokenizer (`Qwen/Qwen2.5-1.5B-Instruct`).
            image_seq_length (`int`, *optional*, defaults to 144): tokens per image where a call names none.
            kwargs: passed to both `from_pretrained` calls (`dtype`, `attn_implementation`, `revision`, ...). Without a
                dtype both parts get that of the language model's file.

        Returns:
            [`OpenQwen2VLForConditionalGeneration`], in evaluation mode as after `from_pretrained`; the embedding has
            grown where the vocabulary of `text` had no row left for the tokens that the processor adds to it.

        Raises:
            ValueError: for backbones that cannot take these places, each by its name, and for a dtype that is none.
            TypeError: for an option that `from_pretrained` does not know, or one of a backbone's config.
        """
        vision_tower, language_model, values = load_backbones(vision, text, **kwargs)
        backbones = {"vision_config": vision_tower.config, "text_config": language_model.config}
        config = OpenQwen2VLConfig(**backbones, **values, image_seq_length=image_seq_length)
        with torch.device("meta"):
            # Without the name of the attention the new top level would reset that of the two backbones.
            model = cls._from_config(config, attn_implementation=kwargs.get("attn_implementation"))
        return put_together(model, vision_tower, language_model).eval()


# `save_pretrained` writes this as auto_map, for readers with trust_remote_code=True and without this package.
OpenQwen2VLModel.register_for_auto_class("AutoModel")
OpenQwen2VLForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")

__all__ = ["OpenQwen2VLForConditionalGeneration", "OpenQwen2VLModel", "OpenQwen2VLPreTrainedModel"]
