"""torch's varlen attention on a CPU, which has no kernel for it: the operators behind it, document by document."""

import contextlib
from collections.abc import Iterator

import torch

from open_qwen2vl.families.qwen_vl import vision_attention
from open_qwen2vl.modeling import attention


def attend(query, key, value, cu_queries, cu_keys, causal, scale, window=-1):
    """Output `(queries, heads, head_dim)` and the logarithms of the sums `(heads, queries)`."""
    parts = list(_documents(query, key, value, cu_queries, cu_keys, causal, scale, window))
    outputs, sums = ([part[place] for part in parts] for place in (4, 5))
    # Laid out like the queries, as the kernels say of themselves.
    return torch.empty_like(query).copy_(torch.cat(outputs, 1).transpose(0, 1)), torch.cat(sums, 1).float()


def _documents(query, key, value, cu_queries, cu_keys, causal, scale, window):
    """Of each document queries, keys, values and weights `(heads, ..., ...)` in fp64, and what comes of them."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    ends = zip(cu_queries[1:].tolist(), cu_keys[1:].tolist(), strict=True)
    starts = zip(cu_queries.tolist(), cu_keys.tolist(), strict=True)
    for (first, first_key), (last, last_key) in zip(starts, ends, strict=False):
        q = query[first:last].transpose(0, 1).double()
        k, v = (states[first_key:last_key].transpose(0, 1).double() for states in (key, value))
        k, v = (states.repeat_interleave(len(q) // len(states), 0) for states in (k, v))
        scores = scale * q @ k.transpose(1, 2)
        if causal:
            # Aligned at the end: the last query sees all keys.
            ones, last_key = torch.ones(scores.shape[1:], dtype=torch.bool), k.shape[1] - q.shape[1]
            hidden = ones.triu(1 + last_key)
            if window >= 0:
                hidden |= ones.tril(last_key - window - 1)
            scores = scores.masked_fill(hidden, -torch.inf)
        weights = scores.softmax(-1)
        yield scale * q, scale * k, v, weights, weights @ v, scores.logsumexp(-1)


def _forward(
    query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, return_debug_mask, **options
):
    _check(query, key, (cum_seq_q, cum_seq_k), (max_q, max_k), options)
    output, sums = attend(query, key, value, cum_seq_q, cum_seq_k, *_of(is_causal, options))
    return output, sums, *(torch.empty(0) for _ in range(3))


def _backward(
    grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, rng_state,
    unused, **options,
):  # fmt: skip
    _check(query, key, (cum_seq_q, cum_seq_k), (max_q, max_k), options)
    gradients, start = [], 0
    for q, k, v, weights, *_ in _documents(query, key, value, cum_seq_q, cum_seq_k, *_of(is_causal, options)):
        grad = grad_out[start : start + q.shape[1]].transpose(0, 1).double()
        start += q.shape[1]
        of_scores = grad @ v.transpose(1, 2)
        of_scores = weights * (of_scores - (of_scores * weights).sum(-1, keepdim=True))
        found = (of_scores @ k, of_scores.transpose(1, 2) @ q, weights.transpose(1, 2) @ grad)
        # Heads that share keys add up.
        heads = (states.shape[1] for states in (query, key, value))
        gradients.append([one.unflatten(0, (number, -1)).sum(1) for one, number in zip(found, heads, strict=True)])
    joined = (torch.cat(one, 1).transpose(0, 1) for one in zip(*gradients, strict=True))
    return tuple(torch.empty_like(s).copy_(one) for s, one in zip((query, key, value), joined, strict=True))


def _check(query, key, boundaries, longest, options):
    """What the real kernels ask for."""
    assert query.shape[-1] % 8 == 0
    for states, ends, most in zip((query, key), boundaries, longest, strict=True):
        assert ends.dtype == torch.int32 and ends[-1] == len(states) and most == ends.diff().max()
    assert options["window_size_right"] == 0 or options["window_size_left"] == options["window_size_right"] == -1


def _of(is_causal, options):
    """Whether it is causal, as a window that ends with the query's own key is; scale; keys before that key."""
    return is_causal or options["window_size_right"] == 0, options.get("scale"), options["window_size_left"]


@contextlib.contextmanager
def varlen_on_cpu(monkeypatch) -> Iterator[None]:
    """Send packed attention of language models and towers through `varlen_attn`, in any type."""
    for module in (attention, vision_attention):
        monkeypatch.setattr(module, "runs_varlen", lambda device, dtype: True)
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("_flash_attention_forward", _forward, "CPU")
        library.impl("_flash_attention_backward", _backward, "CPU")
        yield
