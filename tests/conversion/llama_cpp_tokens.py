"""Greedy tokens of llama.cpp itself: `llama_cpp_tokens.py SOURCE LIBRARIES MODEL MMPROJ`, jobs and answers as JSON.

A job is a text with one placeholder, the picture's file, and the most tokens; an answer has the ids of the prompt's
texts, the number of positions that the picture takes, and the new ids.
"""

import ctypes
import json
import os
import sys
import types
from pathlib import Path

source, libraries, model_file, mmproj_file = sys.argv[1:]
os.environ["LLAMA_CPP_LIB_PATH"] = os.environ["MTMD_CPP_LIB"] = libraries
# The package's own __init__ asks for more packages than its bindings do.
package = types.ModuleType("llama_cpp")
package.__path__ = [str(Path(source) / "llama_cpp")]
sys.modules["llama_cpp"] = package

import llama_cpp.llama_cpp as llama  # noqa: E402
import llama_cpp.mtmd_cpp as mtmd  # noqa: E402


def read_chunks(chunks) -> tuple[list[int], int]:
    """Ids of the texts, positions of the picture."""
    ids, positions, count = [], 0, ctypes.c_size_t()
    for number in range(mtmd.mtmd_input_chunks_size(chunks)):
        chunk = mtmd.mtmd_input_chunks_get(chunks, number)
        if mtmd.mtmd_input_chunk_get_type(chunk) == mtmd.MTMD_INPUT_CHUNK_TYPE_TEXT:
            tokens = mtmd.mtmd_input_chunk_get_tokens_text(chunk, ctypes.byref(count))
            ids += tokens[: count.value]
        else:
            positions += mtmd.mtmd_input_chunk_get_n_tokens(chunk)
    return ids, positions


def answer(context, vision, vocabulary, text: str, picture: str, most: int) -> dict:
    """One prompt, from an empty cache."""
    llama.llama_memory_clear(llama.llama_get_memory(context), True)
    bitmap = mtmd.mtmd_helper_bitmap_init_from_file(vision, picture.encode(), False)
    chunks = mtmd.mtmd_input_chunks_init()
    marked = text.encode().replace(b"<|image_pad|>", mtmd.mtmd_get_marker(vision))
    given = mtmd.mtmd_input_text(text=marked, text_len=len(marked), add_special=False, parse_special=True)
    bitmaps = (mtmd.mtmd_bitmap_p_ctypes * 1)(bitmap)
    assert mtmd.mtmd_tokenize(vision, chunks, ctypes.byref(given), bitmaps, 1) == 0
    ids, positions = read_chunks(chunks)
    past = llama.llama_pos(0)
    assert mtmd.mtmd_helper_eval_chunks(vision, context, chunks, 0, 0, 512, True, ctypes.byref(past)) == 0
    assert past.value == len(ids) + positions
    greedy, new = llama.llama_sampler_init_greedy(), []
    while len(new) < most:
        new.append(llama.llama_sampler_sample(greedy, context, -1))
        if llama.llama_vocab_is_eog(vocabulary, new[-1]):
            break
        one = (llama.llama_token * 1)(new[-1])
        assert llama.llama_decode(context, llama.llama_batch_get_one(one, 1)) == 0
    return {"prompt": ids, "positions": positions, "new": new}


llama.llama_backend_init()
model = llama.llama_model_load_from_file(model_file.encode(), llama.llama_model_default_params())
settings = llama.llama_context_default_params()
settings.n_ctx, settings.n_batch, settings.n_threads = 1024, 512, 1
context = llama.llama_init_from_model(model, settings)
options = mtmd.mtmd_context_params_default()
options.n_threads, options.warmup, options.use_gpu = 1, False, False
vision = mtmd.mtmd_init_from_file(mmproj_file.encode(), model, options)
assert model and context and vision
vocabulary = llama.llama_model_get_vocab(model)
print(json.dumps([answer(context, vision, vocabulary, *job) for job in json.load(sys.stdin)]))
