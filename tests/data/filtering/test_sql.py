"""--sql: the same report as an expression, and nothing but the scores within its reach."""

import pytest

from open_qwen2vl.cli import main
from open_qwen2vl.data.storage.uids import read_uids
from tests.data.killed_step import OUTPUT, check_killed_step

from .conftest import uid_of

UIDS = sorted(uid_of(number) for number in range(40))


@pytest.fixture
def scores(write_score_file, tmp_path):
    """A folder of two scores of 40 pairs, one of which has no `clip` and two names things."""
    write_score_file("clip", {uid: number / 10 if number else "corrupt_image" for number, uid in enumerate(UIDS)})
    names = ["cat" if number % 4 else "cat, dog" for number in range(40)]
    write_score_file("concepts", {uid: float(len(n.split(", "))) for uid, n in zip(UIDS, names, strict=True)},
                     details=names)  # fmt: skip
    return tmp_path / "scores"


@pytest.fixture
def choose_by_sql(scores, tmp_path, capsys):
    """`choose_by_sql("SELECT ...")`: exit code, the uids that stay, what was printed and the error."""

    def run(query: str, *options: str) -> tuple[int, list[str], str, str]:
        command = ["filter", str(scores), "--sql", query, "--output", str(tmp_path / "subset.npy"), "--threads", "1"]
        code = main([*command, *options])
        uids = [f"{high:016x}{low:016x}" for high, low in read_uids(tmp_path / "subset.npy")] if not code else []
        shown = capsys.readouterr()
        return code, uids, shown.out, shown.err.splitlines()[-1] if shown.err else ""

    return run


def test_a_statement_chooses_as_an_expression_does(choose_by_sql, choose, decisions):
    code, uids, shown, _ = choose_by_sql("SELECT uid FROM scores WHERE clip >= 2 AND concepts > 1")
    assert code == 0 and uids == choose("clip >= 2 and concepts > 1")[0] == UIDS[20::4]
    assert "kept        5 (12.5%)" in shown and "dropped     35 by --sql" in shown
    # What an expression cannot say: the best of each group.
    best = 'SELECT uid FROM scores QUALIFY row_number() OVER (PARTITION BY "concepts.detail" ORDER BY clip DESC) <= 2'
    assert choose_by_sql(best)[1] == [UIDS[32], UIDS[36], UIDS[38], UIDS[39]]
    assert decisions()[UIDS[39]] == (True, "--sql: yes") and decisions()[UIDS[0]] == (False, "--sql: no")


def test_the_page_shows_the_statement(choose_by_sql, tmp_path):
    assert choose_by_sql("SELECT uid FROM scores WHERE clip < 1 -- <b>")[0] == 0
    page = (tmp_path / "subset_report/index.html").read_text()
    assert "SELECT uid FROM scores WHERE clip &lt; 1 -- &lt;b&gt;" in page and "<svg" in page


def test_uids_may_be_text_twice_unknown_or_nothing(choose_by_sql):
    stranger = uid_of(1000)
    query = f"SELECT replace(uid::VARCHAR, '-', '') AS uid FROM scores UNION ALL SELECT '{stranger}' AS uid"
    code, uids, shown, _ = choose_by_sql(f"{query} UNION ALL SELECT uid::VARCHAR FROM scores UNION ALL SELECT NULL")
    assert code == 0 and uids == UIDS and "not scored  1 uids of --sql" in shown
    assert "not a uid   1 rows of --sql" in shown and "no score" not in shown
    code, *_, error = choose_by_sql("SELECT 17 AS uid FROM scores")
    assert code == 2 and "--sql: none of the 40 rows of the result is a uid" in error
    code, *_, error = choose_by_sql("SELECT uid FROM scores WHERE clip > 100")
    assert code == 2 and "--sql: no pair is left" in error


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("SELECT uid FROM scores WHERE RANDOM() < 0.5", "random() gives other pairs each time"),
        ("SELECT uid FROM (SELECT uid FROM scores ORDER BY uuid())", "uuid() gives other pairs each time"),
        ("SELECT uid FROM scores USING SAMPLE 5", "a sample gives other pairs each time"),
        (
            "WITH a AS (SELECT uid FROM scores TABLESAMPLE 50%) SELECT uid FROM a",
            "a sample gives other pairs each time",
        ),
    ],
)
def test_what_is_drawn_anew_is_refused(choose_by_sql, query, message):
    code, *_, error = choose_by_sql(query)
    assert code == 2 and f"--sql: {message}; draw by the uid" in error


def test_random_in_a_text_or_comment_is_none(choose_by_sql):
    query = """SELECT uid FROM scores WHERE '"function_name":"random", "sample":{' <> '' -- random() USING SAMPLE 1"""
    assert choose_by_sql(query)[1] == UIDS


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("SELECT uid FROM read_csv('/etc/passwd')", "file system operations are disabled"),
        ("SELECT content AS uid FROM read_text('{scores}/clip/00000.parquet')", "file system operations are disabled"),
        ("SELECT uid FROM '{scores}/clip/00000.parquet'", "file system operations are disabled"),
        ("SELECT uid FROM read_parquet('https://example.com/x.parquet')", "file system operations are disabled"),
        ("SELECT file AS uid FROM glob('{scores}/*')", "file system operations are disabled"),
        ("COPY scores TO '{scores}/x.csv'", "takes one SELECT, this is COPY"),
        ("ATTACH '{scores}/x.duckdb'", "takes one SELECT, this is ATTACH"),
        ("SET enable_external_access = true", "takes one SELECT, this is SET"),
        ("DROP TABLE scores", "takes one SELECT, this is DROP"),
        ("INSTALL httpfs", "takes one SELECT, this is LOAD"),
        ("SELECT uid FROM scores; SELECT uid FROM scores", "this is SELECT, SELECT"),
        ("", "this is nothing"),
        ("SELECT clip FROM scores", "the result has no column uid, but clip"),
        ("SELECT uid FROM pairs", "does not exist"),
        ("SELECT uid FROM command", "does not exist"),  # a Python variable
        ("SELECT nothing FROM scores", "not found"),
        ("SELEKT uid", "syntax error"),
    ],
)
def test_nothing_but_the_scores_is_within_reach(choose_by_sql, scores, tmp_path, query, message):
    before = sorted(path.name for path in scores.rglob("*"))
    code, _, _, error = choose_by_sql(query.format(scores=scores))
    assert code == 2 and error.startswith("open-qwen2vl filter: error: --sql") and message in error
    assert sorted(path.name for path in scores.rglob("*")) == before and not (tmp_path / "subset.npy").exists()


def test_an_expression_or_a_statement(choose_by_sql, scores, tmp_path, capsys):
    code, *_, error = choose_by_sql("SELECT uid FROM scores", "--keep", "clip > 1")
    assert code == 2 and "give --keep EXPR or --sql SELECT, not both" in error
    assert main(["filter", str(scores), "--output", str(tmp_path / "x.npy")]) == 2
    assert "give --keep EXPR or --sql SELECT" in capsys.readouterr().err


@pytest.mark.slow
def test_a_killed_statement_ends_with_the_same_bytes(write_score_file, tmp_path):
    for tar in range(4):
        uids = [uid_of(1000 * tar + number) for number in range(1000)]
        write_score_file("clip", {uid: number / 1000 for number, uid in enumerate(uids)}, f"{tar:05d}")
    (tmp_path / "runs").mkdir()
    command = ["filter", str(tmp_path / "scores"), "--sql", "SELECT uid FROM scores WHERE clip > 0.5"]
    check_killed_step([*command, "--threads", "1", "--output", f"{OUTPUT}/subset.npy"], tmp_path / "runs", kills=20)
