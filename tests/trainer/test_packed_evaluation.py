"""Evaluation of a mixture: the loss of each source, and of all."""

import pytest

from open_qwen2vl.data import PackMixture, parse_sources, plan_packs
from tests.tars import write_caption_tar


@pytest.fixture
def sources(tmp_path, processor):
    """Plans of two kinds of captions, as `parse_sources` takes them."""
    for name, captions in (("cats", ["a cat on a mat", "a cat"]), ("dogs", ["two dogs run in the park"] * 3)):
        write_caption_tar(tmp_path / f"{name}.tar", captions)
        options = {"image_seq_length": 4, "max_length": 24, "num_workers": 1}
        plan_packs([tmp_path / f"{name}.tar"], tmp_path / name, processor.tokenizer, **options)
    return {name: {"path": str(tmp_path / name)} for name in ("cats", "dogs")}


@pytest.mark.parametrize("batch_size", [1, 3])
def test_each_source_has_its_own_loss(make_trainer, processor, sources, batch_size):
    trainer = make_trainer(per_device_eval_batch_size=batch_size)

    def evaluated(*names):
        return trainer.evaluate(PackMixture(parse_sources([sources[name] for name in names]), processor))

    cats, dogs, both = evaluated("cats"), evaluated("dogs"), evaluated("cats", "dogs")
    assert both["eval_loss/cats"] == pytest.approx(cats["eval_loss"], rel=1e-6)
    assert both["eval_loss/dogs"] == pytest.approx(dogs["eval_loss"], rel=1e-6)
    assert cats["eval_loss"] != pytest.approx(dogs["eval_loss"], rel=1e-3)
    assert min(cats["eval_loss"], dogs["eval_loss"]) < both["eval_loss"] < max(cats["eval_loss"], dogs["eval_loss"])
    assert not any("/" in name for name in cats), "one source is the whole"
