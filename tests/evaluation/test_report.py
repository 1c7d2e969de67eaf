"""The report: its numbers by hand, its samples, what it refuses; the page in a browser, with hostile data."""

import io
import json
import random
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from open_qwen2vl.cli import main
from open_qwen2vl.evaluation.benchmarks import BENCHMARKS
from open_qwen2vl.evaluation.intervals import bootstrap, confidence_interval, wilson
from open_qwen2vl.evaluation.report import write_report
from open_qwen2vl.evaluation.report.folders import load_evaluations
from open_qwen2vl.evaluation.report.page import render_page
from open_qwen2vl.evaluation.report.samples import ImageStore, PromptFrame, choose_samples
from open_qwen2vl.evaluation.report.scores import build_rows

SCHEMA = pa.schema(
    [(name, pa.string()) for name in ("sample_id", "category", "prompt", "answer", "prediction", "response")]
    + [("score", pa.float64()), ("images", pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())])))]
)
# What a page must show and never obey; every text field of the hostile test has all of it.
EVIL = (
    "<img src=x onerror=\"document.title='ran'\"></script><script>document.title='ran'</script>"
    "<svg onload=alert(1)>\u2028\u2029{{ 7*7 }}&lt;b&gt;<!-- \x07'\"`]]>"
)


def jpeg(color: tuple[int, int, int], label: str = "") -> bytes:
    image = Image.new("RGB", (96, 72), color)
    ImageDraw.Draw(image).text((8, 28), label, fill="white")
    out = io.BytesIO()
    image.save(out, "JPEG")
    return out.getvalue()


def sample(name, score, prediction="a", answer="a", category=None, prompt="What is it?", image=None, response=None):
    """A row of a samples file."""
    response = prediction if response is None else response
    texts = dict(zip(SCHEMA.names[:6], (name, category, prompt, answer, prediction, response), strict=True))
    return {**texts, "score": score, "images": [{"bytes": image, "path": None}] if image else []}


def entry(rows, value=None, rule="exact match", **more):
    """A task of results.json for these rows, its categories included."""
    scores = [row["score"] for row in rows]
    value = 100 * sum(scores) / len(scores) if value is None else value
    parts = {}
    for row in rows:
        if row["category"]:
            parts.setdefault(row["category"], []).append(row["score"])
    categories = {name: {"score": 100 * sum(own) / len(own), "num_samples": len(own)} for name, own in parts.items()}
    metric = {"value": value, "stderr": None, "higher_is_better": True, **more.pop("metric", {})}
    described = {"version": 1, "rule": rule, "main_metric": "acc", "metrics": {"acc": metric}}
    described |= {"num_samples": len(rows), "generation_kwargs": {"max_new_tokens": 16}, "seconds": 1.5}
    return described | {"prompt": {"prefix": "", "suffix": "\nAnswer:"}, "categories": categories, **more}


def write_folder(folder: Path, name: str, tasks: dict[str, list[dict]], entries=None, **more) -> Path:
    """Results in the form of `open-qwen2vl evaluate`."""
    (folder / "samples").mkdir(parents=True)
    for task, rows in tasks.items():
        pq.write_table(pa.Table.from_pylist(rows, SCHEMA), folder / "samples" / f"{task}.parquet")
    entries = {task: entry(rows) for task, rows in tasks.items()} | (entries or {})
    results = {
        "format_version": 1,
        "model": {"name": name, "path": f"models/{name}", "revision": None, "fingerprint": "0f" * 8},
        "harness": {"lmms-eval": "0.7.3"},
        "versions": {"torch": "2.15.0"},
        "rules": "standard",
        "shots": 0,
        "options": {"batch_size": 8, "limit": None},
        "seconds": 12.5,
        "tasks": entries,
    }
    (folder / "results.json").write_text(json.dumps(results | more), encoding="utf-8")
    return folder


@pytest.fixture
def two_models(tmp_path) -> list[Path]:
    """Forty questions in two categories, which model A answers better, and a task that B was not asked."""
    draw = random.Random(0)
    folders = []
    for name, share in (("model-a", 0.8), ("model-b", 0.4)):
        rows = []
        for number in range(40):
            right = draw.random() < share
            answer = ("circle", "square")[number % 2]
            said = answer if right else "triangle"
            picture = jpeg((40 + 5 * number, 90, 160), str(number))
            question = f"What is the shape in picture {number}?"
            rows.append(sample(f"q{number:02}", float(right), said, answer, f"{answer}s", question, picture))
        tasks = {"mmstar": rows}
        if name == "model-a":
            tasks["ocr_task"] = [sample("only", 0.5, "Helo", "Hello", response="Helo, I think")]
        folders.append(write_folder(tmp_path / name, name, tasks))
    return folders


def test_wilson_and_bootstrap_equal_reference_values():
    # scipy.stats.binomtest(k, n).proportion_ci(method="wilson")
    references = {(8, 10): (0.490162, 0.943318), (0, 10): (0.0, 0.277533), (397, 900): (0.408991, 0.473732)}
    for (right, count), expected in references.items():
        assert wilson(right / count, count) == pytest.approx(expected, abs=1e-5)
    # Of many samples a bootstrap is near the normal interval of the mean.
    scores = np.random.default_rng(1).choice([0.0, 0.3, 0.6, 1.0], 2000)
    half = 1.96 * scores.std() / np.sqrt(len(scores))
    assert bootstrap(scores) == pytest.approx((scores.mean() - half, scores.mean() + half), abs=0.1 * half)
    assert bootstrap(scores) == bootstrap(scores)


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_holds_the_share_and_stays_in_range(case):
    right, count = case
    low, high = wilson(right / count, count)
    assert 0 <= low <= right / count + 1e-12 and right / count - 1e-12 <= high <= 1


def test_the_method_fits_what_is_known():
    binary, soft = np.array([1.0, 0, 1, 1]), np.array([1.0, 0.3, 0.6, 0])
    assert confidence_interval(75.0, binary)[:2] == pytest.approx([100 * end for end in wilson(0.75, 4)])
    assert confidence_interval(0.75, binary)[:2] == pytest.approx(wilson(0.75, 4))
    assert confidence_interval(47.5, soft).method == "bootstrap"
    # An F1 is no mean of its samples: their interval would be another number's.
    assert confidence_interval(80.0, binary, stderr=2.0) == (pytest.approx(76.08, abs=0.01), 83.919928, "normal")
    assert confidence_interval(80.0, binary) is None
    assert confidence_interval(50.0, np.array([1.0, np.nan])) is None
    assert confidence_interval(50.0, np.empty(0)) is None


def test_rows_side_by_side_by_rule_with_the_papers_scores(two_models, tmp_path):
    rows = [sample(f"q{number:02}", float(number < 10), "x") for number in range(40)]
    other = write_folder(tmp_path / "c", "model-c", {"mmstar": rows}, {"mmstar": entry(rows, rule="substring")})
    built = build_rows(load_evaluations([*two_models, other]))
    assert [(row.task, row.rule) for row in built] == [
        ("mmstar", "exact match"),
        ("mmstar", "substring"),
        ("ocr_task", "exact match"),
    ]
    strict, lenient, ocr = built
    assert [cell and cell.num_samples for cell in strict.cells] == [40, 40, None]
    assert lenient.cells[:2] == [None, None] and lenient.cells[2].value == 25.0
    assert lenient.cells[2].interval[:2] == pytest.approx([100 * end for end in wilson(0.25, 40)])
    assert strict.paper == dict(BENCHMARKS["mmstar"].paper_scores) and ocr.paper == {}
    assert [name for name, _ in strict.categories] == ["circles", "squares"]
    assert all(cell.interval.method == "Wilson" for _, cells in strict.categories for cell in cells[:2])


def test_seeds_of_one_question_are_one_sample_of_the_interval(tmp_path):
    rows = [sample(f"q{number}", float(number % 2), "x") for number in range(10) for _ in range(3)]
    folder = write_folder(tmp_path / "seeds", "base", {"few": rows})
    (row,) = build_rows(load_evaluations([folder]))
    assert row.cells[0].interval[:2] == pytest.approx([100 * end for end in wilson(0.5, 10)])
    (few,) = choose_samples(load_evaluations([folder]), 100, ImageStore())
    assert few.total == len(few.samples) == 30


def test_a_metric_without_a_number_is_no_cell(tmp_path):
    rows = [sample("q", 1.0)]
    folder = write_folder(tmp_path / "m", "m", {"t": rows}, {"t": entry(rows, metric={"value": None})})
    assert build_rows(load_evaluations([folder]))[0].cells == [None]
    assert "not evaluated" in write_report([folder], tmp_path / "r.html").read_text()


def test_disagreements_come_first_and_the_choice_is_the_same_each_time(two_models):
    evaluations, store = load_evaluations(two_models), ImageStore()
    mmstar, ocr = choose_samples(evaluations, 12, store)
    scores = [[answer["score"] for answer in own["models"]] for own in mmstar.samples]
    assert mmstar.total == 40 and len(scores) == 12 < mmstar.disagreements
    assert all(first != second for first, second in scores)
    everything = choose_samples(evaluations, 100, ImageStore())[0]
    assert everything.samples[:12] == [
        own | {"images": everything.samples[i]["images"]} for i, own in enumerate(mmstar.samples)
    ]
    assert sum(own["models"][0]["score"] != own["models"][1]["score"] for own in everything.samples) == (
        everything.disagreements
    )
    assert [own["id"] for own in everything.samples[:12]] != sorted(own["id"] for own in everything.samples[:12])
    # Both models have each image; the page has it once.
    assert len(store.urls) == 12 and store.urls[0].startswith("data:image/jpeg;base64,")
    assert ocr.samples[0]["models"] == [{"prediction": "Helo", "score": 0.5, "response": "Helo, I think"}, None]


def test_the_question_is_what_a_prompt_has_of_its_own():
    before, after = "<s><|im_start|>user\n<|image_pad|>\n", "<|im_end|>\n<|im_start|>assistant\n"
    questions = ["is there a circle?", "what is it?\nA. a cat\nB. a dog"]
    prompts = [before + question + after for question in questions]
    assert [PromptFrame.of(prompts).inner(prompt) for prompt in prompts] == questions
    assert [PromptFrame.of(questions).inner(question) for question in questions] == questions
    assert PromptFrame.of(prompts[:1] * 3).inner(prompts[0]) == prompts[0].strip()
    assert PromptFrame.of(["a\nb", "a"]).inner("a") == "" and PromptFrame.of([]) == (0, 0, "")


def test_the_same_results_give_the_same_bytes(two_models, tmp_path):
    first, second = (write_report(two_models, tmp_path / name, 10).read_bytes() for name in ("1.html", "2.html"))
    assert first == second and not list(tmp_path.glob("*.tmp"))


def test_two_models_of_one_name_are_told_apart_by_their_folder(two_models, tmp_path):
    twin = write_folder(tmp_path / "later", "model-a", {"t": [sample("q", 1.0)]})
    labels = [evaluation.label for evaluation in load_evaluations([*two_models, twin])]
    assert labels == [f"model-a ({two_models[0]})", "model-b", f"model-a ({twin})"]


def test_a_folder_without_samples_shows_its_scores(two_models, tmp_path):
    shutil.rmtree(two_models[0] / "samples")
    text = write_report(two_models[:1], tmp_path / "r.html").read_text()
    assert "There are no samples" in text and "mmstar" in text and "Not whole" not in text


def test_a_limited_evaluation_says_so(tmp_path):
    folder = write_folder(tmp_path / "m", "m", {"t": [sample("q", 1.0)]}, options={"limit": 20})
    text = write_report([folder], tmp_path / "r.html").read_text()
    assert "<bdi>m</bdi> saw only the first 20 samples of each task." in text


def refused(capsys, *arguments) -> str:
    assert main(["report", *map(str, arguments)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_what_cannot_be_read_is_one_line(two_models, tmp_path, capsys):
    page = tmp_path / "report.html"
    (tmp_path / "empty").mkdir()
    assert "empty: no results.json" in refused(capsys, tmp_path / "empty", "--output", page)
    assert "given 2 times" in refused(capsys, two_models[0], two_models[0], "--output", page)
    results = json.loads((two_models[1] / "results.json").read_text())
    (two_models[1] / "results.json").write_text(json.dumps(results | {"format_version": 2}))
    assert "format_version 2, and 1 is" in refused(capsys, *two_models, "--output", page)
    (two_models[1] / "results.json").write_text("{")
    assert "no JSON" in refused(capsys, *two_models, "--output", page)
    (two_models[0] / "samples" / "mmstar.parquet").write_bytes(b"PAR0")
    assert "mmstar.parquet: no parquet file" in refused(capsys, two_models[0], "--output", page)
    pq.write_table(pa.table({"sample_id": ["a"]}), two_models[0] / "samples" / "mmstar.parquet")
    assert "has no column category, prompt" in refused(capsys, two_models[0], "--output", page)
    assert "--samples-per-task=-1 must be" in refused(capsys, two_models[0], "--samples-per-task=-1")
    assert not page.exists()


ODD = (
    None,
    [],
    {},
    "x",
    "",
    -1,
    0,
    2.5,
    True,
    10**400,
    [[[]]],
    {"a": {"b": 1}},
    "A" * 5000,
    "\ud800",
    "a\0b",
    "../..",
)


def places(value, path=()):
    """All paths into a JSON value."""
    yield path
    if isinstance(value, dict | list):
        for name, own in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(own, (*path, name))


def replaced(value, path, odd):
    if not path:
        return odd
    changed = value.copy()
    changed[path[0]] = replaced(value[path[0]], path[1:], odd)
    return changed


def strict(text: str):
    """Refuse what JSON has not, as browsers do."""
    raise AssertionError(text)


def check_page(text: str) -> None:
    data = text.partition('<script type="application/json" id="data">')[2].partition("</script>")[0]
    json.loads(data, parse_constant=strict)
    assert not re.search(r"\b(inf|nan|Infinity|NaN)\b", text.partition("<main>")[2].partition("<script")[0])


def rendered(folder: Path) -> str:
    evaluations, images = load_evaluations([folder]), ImageStore()
    return render_page(evaluations, build_rows(evaluations), choose_samples(evaluations, 10, images), images)


def test_odd_results_are_a_page_or_one_line(tmp_path):
    """Values of results.json are replaced by odd ones, every value by some and every odd one for many."""
    rows = [sample("q", 1.0, category="c"), sample("r", 0.0)]
    folder = write_folder(tmp_path / "m", "m", {"t": rows})
    whole = json.loads((folder / "results.json").read_text())
    texts = ["[" * 10**5, "NaN", '{"format_version": 1, "model": {"name": NaN}, "tasks": {}}', "1" * 5000, "\udcff"]
    for number, path in enumerate(places(whole)):
        for odd in ODD[number % 3 :: 3]:
            text = json.dumps(replaced(whole, path, odd))
            texts.append(text.replace("2.5", "1e999") if odd == 2.5 else text)
    refusals = 0
    for text in texts:
        (folder / "results.json").write_text(text, errors="surrogateescape")
        try:
            check_page(rendered(folder))
        except ValueError as error:
            refusals += 1
            assert "results.json" in str(error) and len(str(error)) < 500, text[:300]
    assert 50 < refusals < len(texts) / 2


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("score", pa.array([float("inf"), float("nan")])),
        ("score", pa.array(["high", None])),
        ("score", pa.array([1, 10**18])),
        ("sample_id", pa.array([None, "r"])),
        ("prompt", pa.array([1, 2])),
        ("answer", pa.array([[1], [2]])),
        ("images", pa.array([1, 2])),
        ("images", pa.array([[b"\xff\xd8\xff" + b"0" * 2**22], [None]])),
        ("images", pa.array([[{"bytes": "text", "path": "/etc/passwd"}], None])),
        ("response", pa.array([b"\xff\xfe", b"a"])),
        ("response", pa.Array.from_buffers(pa.string(), 1, [None, *pa.array([b"\xff"]).buffers()[1:]])),
    ],
)
def test_odd_samples_are_a_page_or_one_line(tmp_path, column, values):
    folder = write_folder(
        tmp_path / "m", "m", {"t": [sample("q", 1.0, category="c"), sample("r", 0.0)][: len(values)]}
    )
    table = pq.read_table(folder / "samples" / "t.parquet")
    table = table.set_column(table.column_names.index(column), column, values)
    pq.write_table(table, folder / "samples" / "t.parquet")
    try:
        check_page(rendered(folder))
    except ValueError as error:
        assert "t.parquet" in str(error)


def test_a_damaged_samples_file_is_one_line(two_models, tmp_path, capsys):
    path = two_models[0] / "samples" / "mmstar.parquet"
    data = bytearray(path.read_bytes())
    data[40:400] = bytes(360)
    path.write_bytes(data)
    assert "mmstar.parquet" in refused(capsys, two_models[0], "--output", tmp_path / "r.html")


def test_what_a_killed_report_left_is_removed(two_models, tmp_path):
    (tmp_path / "r.html.123.tmp").write_text("half")
    write_report(two_models, tmp_path / "r.html")
    assert [path.name for path in tmp_path.glob("r.html*")] == ["r.html"]
    with pytest.raises(OSError, match="r.txt"):
        (tmp_path / "r.txt").write_text("")
        write_report(two_models, tmp_path / "r.txt" / "r.html")


def test_the_users_turn_is_shown_and_not_the_template(tmp_path):
    """Where the file has it; every prompt is the same here, so that nothing could be told from them."""
    row = sample("q", 1.0, prompt="<|im_start|>user\n<|image_pad|>what?<|im_end|>\n<|im_start|>assistant\n")
    folder = write_folder(tmp_path / "m", "m", {"t": [row]})
    table = pq.read_table(folder / "samples" / "t.parquet").append_column("question", pa.array(["what?"]))
    pq.write_table(table, folder / "samples" / "t.parquet")
    (shown,) = choose_samples(load_evaluations([folder]), 10, ImageStore())
    assert shown.samples[0]["question"] == "what?" and shown.samples[0]["prompt"] == row["prompt"]


def test_a_task_cannot_name_a_file_outside_its_folder(tmp_path):
    rows = [sample("secret", 1.0)]
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), tmp_path / "outside.parquet")
    folder = write_folder(tmp_path / "m", "m", {}, {"../../outside": entry(rows)})
    (shown,) = choose_samples(load_evaluations([folder]), 10, ImageStore())
    assert shown.samples == []


@settings(max_examples=25, deadline=None)
@given(text=st.text(max_size=30))
def test_any_text_comes_back_from_the_page_as_it_was(text, tmp_path_factory):
    folder = write_folder(tmp_path_factory.mktemp("any") / "m", "m", {"t": [sample("q", 1.0, text, text)]})
    page = write_report([folder], folder / "r.html").read_text(encoding="utf-8")
    data = page.partition('<script type="application/json" id="data">')[2].partition("</script>")[0]
    assert json.loads(data)["tasks"][0]["samples"][0]["answer"] == text


@pytest.fixture
def open_page(browser):
    """`open_page(path, **context)`: the page, the URLs that it asked for and the errors of its console."""
    contexts = []

    def run(path: Path, **options):
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        requests, errors = [], []
        page.on("request", lambda request: requests.append(request.url))
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("dialog", lambda dialog: (errors.append("dialog"), dialog.dismiss()))
        page.goto(path.as_uri())
        return page, requests, errors

    yield run
    for context in contexts:
        context.close()


def test_filters_search_and_pages_in_a_browser(two_models, tmp_path, open_page):
    page, requests, errors = open_page(write_report(two_models, tmp_path / "report.html"))
    count, cards = page.locator("#count"), page.locator(".card")
    assert count.inner_text() == "41 of 41 samples" and cards.count() == 24
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.locator("#next").focus()
    page.keyboard.press("Enter")
    assert page.locator("#where").inner_text() == "Page 2 of 2" and cards.count() == 17
    a, b = ([row["score"] for row in pq.read_table(two / "samples/mmstar.parquet").to_pylist()] for two in two_models)
    page.select_option("#task", "mmstar")
    page.select_option("#relation", "first")
    assert count.inner_text() == f"{sum(x > y for x, y in zip(a, b, strict=True))} of 41 samples"
    page.select_option("#relation", "differ")
    assert count.inner_text() == f"{sum(x != y for x, y in zip(a, b, strict=True))} of 41 samples"
    page.select_option("#relation", "")
    page.select_option("#model", "1")
    page.select_option("#outcome", "wrong")
    assert count.inner_text() == f"{b.count(0)} of 41 samples"
    page.select_option("#category", "=circles")
    assert count.inner_text() == f"{b[::2].count(0)} of 41 samples"
    page.click("button[type=reset]")
    page.wait_for_function("document.getElementById('count').textContent.startsWith('41 of')")
    page.fill("#search", "PICTURE 7?")
    assert cards.count() == 1 and "What is the shape in picture 7?" in cards.first.inner_text()
    assert page.evaluate("document.querySelector('.picture img').naturalWidth") == 96
    page.fill("#search", "never said")
    assert count.inner_text() == "No sample fits these filters (of 41)." and cards.count() == 0
    assert errors == [] and [url for url in requests if not url.startswith(("file:", "data:"))] == []


def test_nothing_in_the_data_runs_or_loads(tmp_path, open_page):
    rows = [
        sample(EVIL, 1.0, EVIL, EVIL, EVIL, EVIL, jpeg((9, 9, 9)), EVIL + "!"),
        sample("b", 0.0, EVIL, image=b"<svg onload=1>"),
    ]
    named = entry(rows, rule=EVIL, version=EVIL, generation_kwargs={EVIL: EVIL}, prompt={"prefix": EVIL})
    named |= {"main_metric": EVIL, "metrics": {EVIL: named["metrics"]["acc"]}}
    (tmp_path / "x").mkdir()
    folders = []
    for number in range(2):
        folder = write_folder(
            tmp_path / str(number), EVIL, {"t": rows}, {"t": named}, rules=EVIL, options={EVIL: EVIL}
        )
        results = json.loads((folder / "results.json").read_text())
        results["model"] |= {"path": EVIL, "revision": EVIL, "fingerprint": EVIL}
        results["tasks"] |= {EVIL: {**named, "num_samples": 0}}
        (folder / "results.json").write_text(json.dumps(results))
        folders.append(folder)
    report = write_report(folders, tmp_path / "report.html")
    page, requests, errors = open_page(report)
    page.locator(".card").first.wait_for()
    page.evaluate("document.querySelectorAll('details').forEach((one) => (one.open = true))")
    page.wait_for_timeout(200)
    # The policy would stop a script that got in; that none got in is what these two show.
    assert page.evaluate("document.querySelectorAll('img[src=x], svg[onload], [onerror], table table').length") == 0
    assert page.evaluate("document.scripts.length") == 3
    assert page.title().startswith("Evaluation: <img src=x") and errors == []
    assert [url for url in requests if not url.startswith(("file:", "data:"))] == []
    assert page.evaluate("[...document.querySelectorAll('.prediction')][0].textContent") == EVIL
    # And were one to get in, the policy does stop it.
    page.evaluate("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"document.title=1\">')")
    page.evaluate("{const s = document.createElement('script'); s.text = 'document.title=1'; document.body.append(s)}")
    page.wait_for_timeout(100)
    assert page.title() != "1" and any("Content Security Policy" in error for error in errors)


def test_without_samples_and_on_a_narrow_screen_nothing_sticks_out(two_models, tmp_path, open_page):
    report = write_report(two_models, tmp_path / "report.html")
    for width in (390, 1280):
        page, _, _ = open_page(report, viewport={"width": width, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    empty, _, errors = open_page(write_report(two_models, tmp_path / "empty.html", 0))
    assert empty.locator(".empty").inner_text().startswith("There are no samples") and errors == []
