"""One step of each family on two gloo ranks under FSDP2, one without images, against both packs without sharding.

Usage: torch.distributed.run --nproc_per_node 2 fsdp2_step.py TOKENIZER_FOLDER
"""

import sys

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule, fully_shard
from transformers import AutoTokenizer

from open_qwen2vl import prepare_for_packing
from open_qwen2vl.families.qwen_vl.model import QwenVL
from open_qwen2vl.families.qwen_vl.processing import QwenVLDocuments
from tests.families.qwen_vl.packs import make_document, mixed_documents, pack
from tests.qwen_vl import FAMILIES, make_model, make_processor


def shard(model) -> None:
    """Block by block, then the rest: each changes the class of its module once more."""
    wrapped = [module for module in model.modules() if type(module).__name__ in QwenVL.block_classes]
    assert len(wrapped) == 4, wrapped
    for module in wrapped:
        fully_shard(module)
    fully_shard(model)
    assert isinstance(model, FSDPModule)


def main(folder: str) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for family in FAMILIES:
        processor = make_processor(family, tokenizer)
        layout = QwenVLDocuments(processor)
        texts = [make_document(layout, [text]) for text in ("only words on this rank", "and here")]
        batches = [pack([mixed_documents(layout)]), pack([texts])]
        alone = prepare_for_packing(make_model(family, tokenizer), processor).train()
        losses = [alone(**batch, num_items_in_batch=20).loss for batch in batches]
        (sum(losses) / 2).backward()

        model = prepare_for_packing(make_model(family, tokenizer), processor).train()
        model.activation_checkpointing_enable()
        shard(model)
        assert prepare_for_packing(model, processor) is model
        loss = model(**batches[rank], num_items_in_batch=20).loss
        loss.backward()
        torch.testing.assert_close(loss, losses[rank], atol=1e-5, rtol=1e-5)
        expected = dict(alone.named_parameters())
        for name, parameter in model.named_parameters():
            gradient = parameter.grad.full_tensor()
            torch.testing.assert_close(gradient, expected[name].grad, atol=1e-5, rtol=1e-5, msg=f"{family} {name}")
        print(f"rank {rank}: {family} {len(expected)} parameters equal")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
