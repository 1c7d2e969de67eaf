import hashlib
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from open_qwen2vl.data.filtering import FilterOptions, select_pairs
from open_qwen2vl.data.scoring.score_files import SCHEMA, write_scores
from open_qwen2vl.data.storage.uids import UID_DTYPE, parse_uid

from .conftest import uid_of

UIDS = [uid_of(number) for number in range(400)]


def is_drawn(uid: str, name: str, share: tuple[int, int], seed: int = 42) -> bool:
    """The documented rule for ties, in Python."""
    digest = hashlib.md5(f"{seed}:{name}:{uid}".encode()).digest()
    return int.from_bytes(digest[8:], "little") < share[0] * 2**64 // share[1]


def test_comparisons_lists_and_logic_equal_those_of_numpy(write_score_file, write_uid_file, choose):
    random = np.random.default_rng(0)
    clip, words = random.normal(0.3, 0.1, 400), random.integers(0, 9, 400).astype(float)
    for tar in range(2):  # two tars, in each half of the pairs
        half = slice(200 * tar, 200 * tar + 200)
        write_score_file("clip", dict(zip(UIDS[half], clip[half], strict=True)), f"{tar:05d}")
        write_score_file("basic.words", dict(zip(UIDS[half], words[half], strict=True)), f"{tar:05d}")
    listed = set(random.choice(UIDS, 90).tolist())
    path = write_uid_file([*listed, uid_of(1000)])
    found, report = choose(f"(clip >= 0.35 and not basic.words < 3) or in({path}) and basic.words <= 4 or clip > 0.5")
    is_in = np.array([uid in listed for uid in UIDS])
    kept = ((clip >= 0.35) & ~(words < 3)) | (is_in & (words <= 4)) | (clip > 0.5)
    assert found == sorted(uid for uid, ok in zip(UIDS, kept, strict=True) if ok) and 0 < len(found) < 400
    assert report.pairs == 400 and report.unscored == {str(path): 1}


def test_missing_score_is_neither_true_nor_false(write_score_file, choose, decisions):
    a, b, c, d = sorted(UIDS[:4])
    write_score_file("clip", {a: 0.5, b: 0.1, c: "corrupt_image", d: float("nan")})
    write_score_file("dfn", {a: 1.0, c: 1.0})
    assert choose("clip >= 0.3")[0] == [a]
    assert choose("not clip >= 0.3")[0] == [b]
    assert choose("clip >= 0.3 or not clip >= 0.3")[0] == [a, b]
    kept, report = choose("clip >= 0.3 or dfn > 0")
    assert kept == [a, c]
    assert report.no_score == {"clip": {"corrupt_image": 1, "nan_score": 1}, "dfn": {"not in the score files": 2}}
    assert decisions() == {
        a: (True, "clip >= 0.3: 0.5"),
        b: (False, "clip >= 0.3: 0.1; dfn > 0: no score"),
        c: (True, "dfn > 0: 1"),
        d: (False, "clip >= 0.3: no score (nan_score); dfn > 0: no score"),
    }


def test_reason_is_the_first_failing_clause_with_its_score(write_score_file, write_uid_file, choose, decisions):
    a, b, c = sorted(UIDS[:3])
    write_score_file("clip", {a: 0.21, b: 0.4, c: 0.5})
    write_score_file("mlm", {a: 90, b: 10, c: 99})
    path = write_uid_file([a, b])
    _, report = choose(f"clip >= 0.3 and (mlm >= 85 or not in({path}))")
    assert decisions() == {
        a: (False, "clip >= 0.3: 0.21"),
        b: (False, f"mlm >= 85: 10; not in({path}): yes"),
        c: (True, "clip >= 0.3: 0.5; mlm >= 85: 99"),
    }
    assert [count for _, count in report.steps] == [1, 1]
    assert [clause[1:] for clause in report.clauses] == [(2, 1, 0), (2, 1, 0), (1, 2, 0)]


def test_top_fraction_draws_the_ties_by_uid(write_score_file, choose):
    scores = {uid: float(90 + number % 5 if number < 100 else 50) for number, uid in enumerate(UIDS)}
    write_score_file("mlm", scores)
    # 0.4 of 400 are 160: the 100 above 50, and each of the 300 at 50 with probability 60 / 300.
    expected = sorted(uid for uid, score in scores.items() if score > 50 or is_drawn(uid, "mlm", (60, 300)))
    assert choose("top(mlm, 0.4)")[0] == expected and abs(len(expected) - 160) < 21
    assert choose("not top(mlm, 0.4)")[0] == sorted(set(UIDS) - set(expected))
    other = sorted(uid for uid, score in scores.items() if score > 50 or is_drawn(uid, "mlm", (60, 300), seed=7))
    assert choose("top(mlm, 0.4)", seed=7)[0] == other != expected
    assert len(choose("top(mlm, 0.25)")[0]) == 100 and len(choose("top(mlm, 1)")[0]) == 400
    with pytest.raises(ValueError, match="no pair is left"):
        choose("top(mlm, 0.001)")


def test_top_fraction_is_of_the_pairs_with_the_score_and_exact(write_score_file, choose):
    scores = {uid: number / 7 for number, uid in enumerate(UIDS[:100])}
    write_score_file("clip", {**scores, **dict.fromkeys(UIDS[100:], "corrupt_image")})
    assert choose("top(clip, 0.29)")[0] == sorted(UIDS[71:100])  # 0.29 * 100 is 28.999999999999996 in floating point


def test_uid_of_two_tars_is_one_pair_with_its_larger_score(write_score_file, choose):
    a, b, c = sorted(UIDS[:3])
    write_score_file("clip", {a: 0.1, b: 0.4}, "00000")
    write_score_file("clip", {a: 0.5, b: "corrupt_image", c: 0.2}, "00001")
    found, report = choose("top(clip, 0.67)")
    assert found == [a, b] and report.pairs == 3


def test_same_bytes_in_any_order_and_with_any_number_of_threads(write_score_file, tmp_path):
    random = np.random.default_rng(1)
    for tar in range(3):
        scores = {uid_of(1000 * tar + number): float(random.integers(0, 9)) for number in range(700)}
        write_score_file("mlm", scores, f"{tar:05d}")
        write_score_file("clip", {uid: random.random() for uid in scores}, f"{tar:05d}")
    outputs = []
    for run, threads in enumerate((1, 2)):
        folder = tmp_path / f"run{run}"
        shutil.copytree(tmp_path / "scores", folder / "scores")
        for path in (folder / "scores" / "mlm").glob("*.parquet") if run else ():
            table, metadata = pq.read_table(path), pq.read_schema(path).metadata
            table = table.take(random.permutation(len(table))).combine_chunks().cast(SCHEMA)
            pq.write_table(table.replace_schema_metadata(metadata), path)
            write_scores(path, table, {"recipe": {}})
        select_pairs(
            FilterOptions([folder / "scores"], folder / "subset.npy", "top(mlm, 0.3) and clip < 0.8", threads=threads)
        )
        names = ("subset.npy", "subset_report/decisions.parquet", "subset_report/index.html")
        outputs.append([(folder / name).read_bytes() for name in names])
    assert outputs[0] == outputs[1]
    assert sorted(path.name for path in folder.iterdir()) == ["scores", "subset.npy", "subset_report"]


def test_subset_is_what_numpy_saves(write_score_file, choose, tmp_path):
    write_score_file("clip", dict.fromkeys(UIDS, 1.0))
    choose("clip > 0")
    np.save(tmp_path / "expected.npy", np.sort(np.array([parse_uid(uid) for uid in UIDS], UID_DTYPE)))
    assert (tmp_path / "subset.npy").read_bytes() == (tmp_path / "expected.npy").read_bytes()


def test_uids_that_are_none_are_left_out_and_counted(write_score_file, choose, caplog):
    write_score_file("clip", {UIDS[0]: 1.0, "xyz": 1.0, UIDS[1][:-1]: 1.0})
    found, report = choose("clip > 0")
    assert found == [UIDS[0]] and report.bad_uids == 2 and report.pairs == 1
    assert "2 rows" in caplog.text and "bad_uid" in caplog.text


def test_scores_without_keys_take_the_keys_of_others(write_score_file, choose, tmp_path):
    write_score_file("clip", {UIDS[0]: 1.0}, "00007")
    path = write_score_file("a-table", {UIDS[0]: 2.0}, "part")
    table = pq.read_table(path, schema=SCHEMA)
    write_scores(path, table.set_column(0, SCHEMA.field(0), pa.nulls(1, pa.string())), {"recipe": {}})
    choose("a-table > 1")
    (row,) = pq.read_table(tmp_path / "subset_report" / "decisions.parquet").to_pylist()
    assert (row["key"], row["tar"]) == (f"k{UIDS[0][:4]}", "00007")


@pytest.mark.parametrize(
    ("keep", "options", "message"),
    [
        ("dfn > 1", {}, "--keep: no score is called dfn; there are clip"),
        ("in(nowhere.npy)", {}, "nowhere.npy"),
        ("clip > 1", {"memory_limit": "lots"}, "--memory-limit lots: give a size"),
        ("clip > 1", {"memory_limit": "1MB"}, "--memory-limit 1MB is not enough"),
        ("clip > 1", {"near_distance": 9}, "--near-distance must be from 0 to 8"),
        ("clip > 1", {"deduplicate": "fuzzy"}, "--deduplicate fuzzy: there are exact, near and semantic"),
        ("clip > 1", {"deduplicate": "near"}, "score POOL --scorer image-hash"),
        ("clip > 1", {"report": "scores/report"}, "the report would lie among the scores"),
        ("clip >", {}, "--keep, column 7"),
    ],
)
def test_mistake_is_one_error(write_score_file, choose, tmp_path, monkeypatch, keep, options, message):
    monkeypatch.chdir(tmp_path)
    write_score_file("clip", {UIDS[0]: 1.0})
    with pytest.raises((ValueError, OSError), match=message.replace("(", r"\(")):
        choose(keep, **options)
    assert not list(tmp_path.glob("subset.npy*"))


def test_nothing_left_is_an_error_after_the_report(write_score_file, choose, decisions):
    write_score_file("clip", {UIDS[0]: 1.0})
    with pytest.raises(ValueError, match=r"^--keep clip > 2: no pair is left; .*html says why$"):
        choose("clip > 2")
    assert decisions()[UIDS[0]] == (False, "clip > 2: 1")


def test_names_that_duckdb_takes_for_patterns_are_files(write_score_file, tmp_path):
    path = write_score_file("clip", {UIDS[0]: 1.0})
    folder = tmp_path / "key=1" / "a[b]*?'c"
    shutil.copytree(path.parent, folder)
    report = select_pairs(FilterOptions([folder], tmp_path / "key=1" / "subset.npy", "clip > 0"))
    assert report.kept == 1


def test_two_models_under_one_name_are_an_error(write_score_file, choose):
    write_score_file("clip", {UIDS[0]: 1.0}, "00000", model="openai/ViT-B-32")
    write_score_file("clip", {UIDS[1]: 1.0}, "00001", model="apple/DFN")
    with pytest.raises(ValueError, match="clip comes from two models, apple/DFN and openai/ViT-B-32"):
        choose("clip > 0")


def test_file_that_holds_no_scores_or_is_damaged_is_named(write_score_file, write_uid_file, choose, tmp_path):
    path = write_score_file("clip", {uid: float(number) for number, uid in enumerate(UIDS)})
    whole = path.read_bytes()
    path.write_bytes(whole[:-7])
    with pytest.raises(ValueError, match=r"00000.parquet: not a file of scores"):
        choose("clip > 0")
    path.write_bytes(whole[:40] + bytes(900) + whole[940:])
    with pytest.raises(ValueError, match=r"00000.parquet"):
        choose("clip > 0")
    path.write_bytes(whole)
    np.save(tmp_path / "wrong.npy", np.zeros(3))
    with pytest.raises(ValueError, match=r"wrong.npy: uids are one array of dtype u8,u8"):
        choose(f"in({tmp_path / 'wrong.npy'})")
    write_uid_file([UIDS[1], UIDS[0]])  # not sorted
    assert choose(f"in({tmp_path / 'list.npy'})")[0] == sorted(UIDS[:2])


def test_text_of_an_expression_never_becomes_sql(write_score_file, write_uid_file, choose, decisions, tmp_path):
    name, reason = "a-b.c", "it's '); DROP TABLE decided; --"
    write_score_file(name, {UIDS[0]: 1.0, UIDS[1]: reason})
    path = write_uid_file([UIDS[0]], "o'clock $p0.npy")
    assert choose(f'{name} > 0 and in("{path}")')[0] == [UIDS[0]]
    assert decisions()[UIDS[1]] == (False, f"{name} > 0: no score ({reason})")
