"""What a mixture's weights mean, against figures by hand."""

from open_qwen2vl import OpenQwen2VLProcessor
from open_qwen2vl.data.packing.mixture import PackMixture, parse_sources
from open_qwen2vl.data.packing.mixture_report import mixture_lines, uneven_lengths
from open_qwen2vl.data.packing.plan import plan_packs
from tests.tars import write_caption_tar


def test_shares_of_packs_and_tokens(processor: OpenQwen2VLProcessor, tmp_path):
    """Captions of one length: `short` has packs of one document, `long` packs of two."""
    write_caption_tar(tmp_path / "0.tar", ["a cat"] * 8)
    documents = {}
    for name in ("one", "two"):
        report = plan_packs(
            [tmp_path / "0.tar"],
            tmp_path / name,
            processor,
            max_length=12 if name == "one" else 24,
            num_workers=1,
        )
        documents[name] = report.tokens / 8
        assert report.packs == {"one": 8, "two": 4}[name]
    assert documents["one"] == documents["two"]
    length = documents["one"]
    sources = [{"path": str(tmp_path / name), "weight": 1} for name in ("one", "two")]
    mixture = PackMixture(parse_sources(sources), processor)
    assert mixture_lines(mixture) == [
        f"source one: 8 packs, read 1.00 times an epoch: 50.0% of packs, 33.3% of tokens ({8 * length:,.0f})",
        f"source two: 4 packs, read 2.00 times an epoch: 50.0% of packs, 66.7% of tokens ({16 * length:,.0f})",
    ]
    assert uneven_lengths(mixture).endswith("different numbers of positions: one 12, two 24")
    unweighted = PackMixture(parse_sources([{"path": source["path"]} for source in sources]), processor)
    assert uneven_lengths(unweighted) is None
    assert "50.0% of tokens" in mixture_lines(unweighted)[0]
