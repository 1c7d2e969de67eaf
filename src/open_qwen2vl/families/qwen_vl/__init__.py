"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: transformers' own models, processors and checkpoints, trained in packs.

sizes.py      an image's size ─► its grid of patches and number of tokens, nothing decoded
images.py     bytes ─► uint8 patches of one frame
positions.py  ids and grids ─► M-RoPE positions
processing.py these three as the data side of the seam (`QwenVLDocuments`)
model.py      parts, cost and preparation of the models (`QwenVL`); vision_attention.py: their towers' attention
from_clip.py  a vision tower of Qwen2-VL from a CLIP's, for `open-qwen2vl init-vit`
"""
