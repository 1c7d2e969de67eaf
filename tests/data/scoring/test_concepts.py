import pyarrow.parquet as pq
import pytest

from open_qwen2vl.cli import main
from open_qwen2vl.data.scoring.concepts import SHIPPED, ConceptScorer, read_concepts
from open_qwen2vl.data.scoring.pairs import RawPair
from open_qwen2vl.data.scoring.score_files import DETAIL, SCHEMA


@pytest.fixture
def found(tmp_path):
    """`found(caption, names)`: what of a list of concepts a caption names."""

    def find(caption: str, names: str) -> list[str]:
        (tmp_path / "names.txt").write_text(names)
        return ConceptScorer(str(tmp_path / "names.txt")).prepare(RawPair("k", "0" * 32, b"", caption))

    return find


def test_whole_words_in_any_case_and_their_plurals(found):
    names = "# things\nCat\nhot dog\ndog\nfox\nberry\nfireman\nglass\nglasses\nbus\ncaf\u00e9\n\n"
    assert found("A CAT, concatenated: hot\n dogs", names) == ["cat", "dog", "hot dog"]
    assert found("foxes eat berries, firemen buses", names) == ["berry", "bus", "fireman", "fox"]
    assert found("glasses", names) == ["glasses"] and found("a glass", names) == ["glass"]
    assert found("Caf\u00e9s; cats-dogs", names) == ["caf\u00e9", "cat", "dog"]
    assert found("dogma of scatter", names) == [] and found("", names) == []


def test_a_mark_at_the_start_and_accents_of_two_signs(found):
    assert found("a cat, a dog", "\ufeffcat\ndog") == ["cat", "dog"]
    assert found("CAFE\u0301", "caf\u00e9") == found("caf\u00e9s", "cafe\u0301") == ["caf\u00e9"]


def test_the_shipped_list_knows_common_things():
    names = read_concepts(SHIPPED)
    assert len(names) > 3000 and {"zebra", "pizza", "traffic light", "house", "oak"} <= set(names)
    assert names == sorted(set(names)) and not any("princeton" in name or "," in name for name in names)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"# nothing\n\n", "no concept in it"),
        (b"cat\nred, green\n", "'red, green' has a comma"),
        (b"\xff\xfe\x00", "no text of UTF-8"),
        (None, "No such file"),
    ],
)
def test_a_wrong_list_is_one_line(tmp_path, pool, capsys, content, message):
    if content is not None:
        (tmp_path / "names.txt").write_bytes(content)
    command = ["score", str(pool), "--scorer", "concepts", "--concepts", str(tmp_path / "names.txt")]
    assert main([*command, "--output", str(tmp_path / "scores"), "--num-workers", "1"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("open-qwen2vl score: error: ") and message in error


def test_a_pool_is_scored_with_the_names_as_detail(pool, tmp_path, capsys):
    assert main(["score", str(pool), "--scorer", "concepts", "--output", str(tmp_path), "--num-workers", "1"]) == 0
    table = pq.read_table(tmp_path / "concepts/00001.parquet")
    assert table.schema.equals(SCHEMA.append(DETAIL), check_metadata=False)
    rows = {row["key"]: row for row in table.to_pylist()}
    assert (rows["0000"]["value"], rows["0000"]["detail"]) == (2, "cat, tree")
    assert (rows["0006"]["value"], rows["0006"]["detail"]) == (3, "bear, bee, tree")
    assert rows["0000"]["model"] == SHIPPED.name
