"""Exact attention over packed documents, for `attn_implementation="packed_varlen"`.

`cu_seq_lens_q` of the batch says where documents begin; a token attends to the earlier tokens of its own document and
no mask is built. On a GPU in half precision this is `torch.nn.attention.varlen`; elsewhere documents of similar length
are batched through SDPA, which costs about the sum of their squared lengths instead of the square of the pack's.
Documents may share a prefix: a *branch* then has the prefix's keys before its own (`key_positions`), not its queries.
Without `cu_seq_lens_q` (generation, padded batches, the vision tower) it is transformers' own `sdpa`.
"""

import inspect

import torch
from torch import nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, Cache, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, create_causal_mask, sdpa_mask

PACKED_VARLEN = "packed_varlen"


def packed_varlen_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    cu_seq_lens_k: torch.Tensor | None = None,
    max_length_k: int | None = None,
    key_positions: torch.Tensor | None = None,
    sliding_window: int | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each document, and of branches to the prefix that they share.

    Args:
        module (`nn.Module`): the attention layer that calls.
        query (`torch.Tensor` of shape `(packs, heads, sequence, head_dim)`): queries.
        key (`torch.Tensor` of shape `(packs, kv_heads, sequence, head_dim)`): keys.
        value (`torch.Tensor` of shape `(packs, kv_heads, sequence, head_dim)`): values.
        attention_mask (`torch.Tensor`, *optional*): used only without `cu_seq_lens_q`.
        scaling (`float`, *optional*): factor of the scores, `head_dim ** -0.5` by default.
        dropout (`float`, *optional*, defaults to 0.0): attention dropout; 0 for every model of this family.
        cu_seq_lens_q (`torch.IntTensor` of shape `(documents + 1,)`, *optional*): document boundaries in the flattened
            batch; with shared prefixes of documents and branches.
        max_length_q (`int`, *optional*): length of the longest of them.
        cu_seq_lens_k (`torch.IntTensor` of shape `(documents + 1,)`, *optional*): boundaries of what each attends to
            in `key_positions`: its prefix, if it is a branch, and itself. Read only with these.
        max_length_k (`int`, *optional*): the most that one of them attends to; likewise.
        key_positions (`torch.LongTensor` of shape `(keys,)`, *optional*): positions of that in the flattened batch;
            only where there are branches.
        sliding_window (`int`, *optional*): a token attends to this many, itself included; layers of Gemma 3 have one.
        **kwargs: what else the attention layer passes on.

    Returns:
        `tuple[torch.Tensor, None]`: output of shape `(packs, sequence, heads, head_dim)`, and no weights.
    """
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    packs, heads, sequence, head_dim = query.shape
    # RoPE leaves queries and keys in fp32 under autocast, and not the values.
    device = query.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else query.dtype
    # (packs, heads, sequence, head_dim) -> (packs * sequence, heads, head_dim)
    flat = [states.to(dtype).transpose(1, 2).flatten(0, 1) for states in (query, key, value)]
    if key_positions is None:
        cu_seq_lens_k, max_length_k = cu_seq_lens_q, max_length_q
    if runs_varlen(query.device, dtype):
        if key_positions is not None:
            flat[1:] = [states.index_select(0, key_positions) for states in flat[1:]]
        lengths = (cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k)
        output = _flash_varlen(*flat, *lengths, scaling, sliding_window)
    else:
        output = _bucketed_sdpa(*flat, cu_seq_lens_q, cu_seq_lens_k, key_positions, scaling, sliding_window)
    return output.view(packs, sequence, heads, head_dim), None


# torch 2.11 has no `enable_gqa`.
_HAS_GQA = "enable_gqa" in inspect.signature(varlen_attn).parameters


def runs_varlen(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch's varlen kernels take tensors of this kind."""
    return device.type == "cuda" and dtype in (torch.float16, torch.bfloat16)


def _flash_varlen(query, key, value, cu_queries, cu_keys, max_queries, max_keys, scaling, window=None) -> torch.Tensor:
    # Causal is aligned at the end: the last query of a branch sees all of its keys.
    options = {"window_size": (window - 1 if window else -1, 0)}
    if key.shape[1] != query.shape[1]:
        if _HAS_GQA:
            options["enable_gqa"] = True
        else:
            key, value = (s.repeat_interleave(query.shape[1] // s.shape[1], dim=1) for s in (key, value))
    if scaling is not None and scaling != query.shape[-1] ** -0.5:
        options["scale"] = scaling
    return varlen_attn(query, key, value, cu_queries, cu_keys, max_queries, max_keys, **options)


# What it does depends on the lengths, which a compiler would have to bake in.
@torch.compiler.disable
def _bucketed_sdpa(query, key, value, cu_queries, cu_keys, key_positions, scaling, window=None) -> torch.Tensor:
    """SDPA over documents of similar length, padded at their end: causal attention never looks at what comes later."""
    starts, lengths = cu_queries[:-1].long(), cu_queries.diff().long()
    prefixes = (cu_keys.diff() - cu_queries.diff()).tolist()
    outputs, targets = [], []
    for prefix, documents in _buckets(lengths.tolist(), prefixes):
        documents = torch.tensor(documents, device=starts.device)
        own_lengths = lengths[documents, None]
        offsets = torch.arange(int(own_lengths.max()), device=starts.device)
        # (documents, longest): position of each token; the padding repeats a document's last token.
        positions = keys = starts[documents, None] + torch.minimum(offsets, own_lengths - 1)
        if prefix:
            first = cu_keys[:-1].long()[documents, None]
            keys = torch.cat([key_positions[first + torch.arange(prefix, device=first.device)], positions], dim=1)
        # (documents, longest, heads, head_dim) -> (documents, heads, longest, head_dim)
        q, k, v = (
            states.index_select(0, where.flatten()).view(*where.shape, *states.shape[1:]).transpose(1, 2)
            for states, where in ((query, positions), (key, keys), (value, keys))
        )
        mask = None
        if prefix or window and window < k.shape[2]:
            # SDPA's own causal mask is aligned at the start, and has no window.
            mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(prefix)
            mask = mask.triu(prefix - window + 1) if window else mask
        attended = nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=k.shape[1] != q.shape[1]
        )
        real = torch.nonzero((offsets < own_lengths).flatten()).squeeze(1)
        outputs.append(attended.transpose(1, 2).flatten(0, 1).index_select(0, real))
        targets.append(positions.flatten()[real])
    return torch.cat(outputs).index_select(0, torch.argsort(torch.cat(targets)))


def _buckets(lengths: list[int], prefixes: list[int]) -> list[tuple[int, list[int]]]:
    """Documents by length, those of a bucket within a factor of 1.5 and behind prefixes of one length, which comes
    first: few calls, little padding.
    """
    buckets: list[tuple[int, list[int]]] = []
    for document in sorted(range(len(lengths)), key=lambda one: (prefixes[one], lengths[one])):
        prefix, shortest = (buckets[-1][0], lengths[buckets[-1][1][0]]) if buckets else (-1, 0)
        if prefix == prefixes[document] and lengths[document] <= 1.5 * shortest:
            buckets[-1][1].append(document)
        else:
            buckets.append((prefixes[document], [document]))
    return buckets


def packed_attention_mask(
    config: PreTrainedConfig, inputs_embeds: torch.Tensor, positions: torch.Tensor, has_branches: bool
) -> torch.Tensor | None:
    """For `packed_varlen`, which reads none, one of a single entry; for the others None lets transformers isolate
    documents by position, which knows no branches.
    """
    if packs_without_mask(config._attn_implementation):
        # A mask of four dimensions is passed on as it is, by every language model; for None a full one would be made.
        return inputs_embeds.new_empty((1, 1, 1, 1))
    return shared_prefix_mask(config, inputs_embeds, positions) if has_branches else None


def shared_prefix_mask(
    config: PreTrainedConfig, inputs_embeds: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor | None:
    """The mask of a packed batch with shared prefixes, in the form that the config's attention takes.

    `positions` `(packs, S)` are 0 where a document begins; a branch begins with the length of its document's prefix.
    None for `packed_varlen`; a ValueError for an attention that knows no branches.
    """
    attention = config._attn_implementation
    if packs_without_mask(attention):
        return None
    if "flash" in attention:
        raise ValueError(f"a pack with shared pictures does not go with {attention}: set packed_varlen, sdpa or eager")
    if has_windows(config):
        raise ValueError(f"a pack with shared pictures does not go with {attention} and windows: set packed_varlen")
    begins = positions != nn.functional.pad(positions, (1, 0), value=-2)[:, :-1] + 1
    document, segment = (positions == 0).cumsum(1), begins.cumsum(1)
    places = torch.arange(positions.shape[1], device=positions.device).expand_as(positions)
    # (packs, S): where a token's segment begins; what stands there is the length of its prefix.
    prefix = positions.gather(1, torch.where(begins, places, 0).cummax(1).values)
    shared = (document[:, :, None] == document[:, None]) & (positions[:, None] < prefix[:, :, None])
    # Only the first segment of a document begins at 0, and it holds the prefix.
    seen = (segment[:, :, None] == segment[:, None]) | shared & (prefix == 0)[:, None]
    return create_causal_mask(
        config, inputs_embeds, None, None, and_mask_function=lambda batch, head, query, key: seen[batch, query, key]
    )


def has_windows(config: PreTrainedConfig) -> bool:
    """Whether a layer of a language model attends to the last tokens alone."""
    layers = getattr(config, "layer_types", None)
    return "sliding_attention" in layers if layers else bool(getattr(config, "sliding_window", None))


def is_packed(kwargs: dict) -> bool:
    """Whether a batch is packed documents; the paged attention of `generate_batch` brings a `cache` beside lengths."""
    return kwargs.get("cu_seq_lens_q") is not None and kwargs.get("cache") is None


def check_packed_arguments(
    position_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | dict | None,
    past_key_values: Cache | None,
    use_cache: bool,
) -> None:
    """Refuse what would join the documents of a packed batch, or does not say where they begin."""
    if position_ids is None:
        raise ValueError("a packed batch (cu_seq_lens_q) needs position_ids that restart at 0 for each document")
    if attention_mask is not None:
        raise ValueError("a packed batch (cu_seq_lens_q) takes no attention_mask: it would join the documents")
    if past_key_values is not None or use_cache:
        raise ValueError("a packed batch (cu_seq_lens_q) takes no cache: it would join the documents")


def packs_without_mask(attention: str) -> bool:
    """Whether an attention keeps documents apart by their lengths alone; a ValueError for one that may join them."""
    # Flash attentions, those of kernel repositories too, take the lengths; transformers masks the others by position.
    if attention not in (PACKED_VARLEN, "sdpa", "eager", "flex_attention") and "flash" not in attention:
        raise ValueError(
            f"a packed batch (cu_seq_lens_q) does not go with the attention {attention!r}, which may join its "
            "documents: set packed_varlen, sdpa, eager or a flash attention"
        )
    return attention == PACKED_VARLEN


AttentionInterface.register(PACKED_VARLEN, packed_varlen_attention)
# Padded batches and generation under this name need sdpa's mask; without this entry they would get none.
AttentionMaskInterface.register(PACKED_VARLEN, sdpa_mask)
