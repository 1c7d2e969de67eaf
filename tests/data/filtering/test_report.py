import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from open_qwen2vl.data.storage.tars import find_shards

from .conftest import uid_of

EVIL = '<script>alert(1)</script> & "quoted" <img src=http://x.example/y.png>'


def links(text: str) -> list[str]:
    """What a browser would load or follow."""
    found: list[str] = []
    parser = HTMLParser()
    parser.handle_startendtag = parser.handle_starttag = lambda tag, attributes: found.extend(
        value for name, value in attributes if name in ("src", "href", "srcset", "data", "action")
    )
    parser.feed(text)
    return found


@pytest.fixture
def page(tmp_path):
    return lambda: (tmp_path / "subset_report" / "index.html").read_text(encoding="utf8")


def test_page_escapes_all_text_and_loads_nothing(write_score_file, write_tar, sample, choose, page, tmp_path):
    uids = [uid_of(number) for number in range(4)]
    members = [member for uid in uids[:3] for member in sample(f"k{uid[:4]}", EVIL, uid=uid)]
    write_tar([*members, (f"k{uids[3][:4]}.png", b"no picture"), (f"k{uids[3][:4]}.txt", b"\xff")], "00000.tar")
    write_score_file("clip", dict(zip(uids, (0.1, 0.5, "<b>bad</b>", 0.9), strict=True)))
    _, report = choose("clip > 0.3", pool=find_shards([tmp_path / "00000.tar"]))
    text = page()
    assert text.count("&lt;script&gt;alert(1)") == 3 and "<script" not in text
    assert text.count('src="data:image/jpeg;base64,') == 3 and "corrupt_image" in text
    assert "no score (&lt;b&gt;bad&lt;/<wbr>b&gt;)" in text and "<b>bad" not in text
    assert links(text) and all(link.startswith("data:image/jpeg;base64,") for link in links(text))
    assert "default-src 'none'" in text
    assert f"<b>{report.kept}</b>pairs kept" in text and "50.0%" in text


def test_pictures_come_from_the_tar_that_the_score_file_names(write_score_file, write_tar, sample, choose, page):
    uid = uid_of(1)
    image = Image.fromarray(np.zeros((400, 600, 3), np.uint8))
    write_tar(sample(f"k{uid[:4]}", "a black picture", uid=uid), "a.tar")
    assert image.size == (600, 400)
    write_score_file("clip", {uid: 1.0}, "a", recipe={"source": {"path": "../../a.tar", "size": 1, "mtime_ns": 1}})
    choose("clip > 0")
    assert "a black picture" in page() and page().count("data:image/jpeg") == 1


def test_page_without_a_pool_has_no_pictures(write_score_file, choose, page):
    uids = [uid_of(number) for number in range(60)]
    write_score_file("clip", {uid: float(number % 2) for number, uid in enumerate(uids)})
    choose("clip > 0")
    text = page()
    assert text.count("not in the pool") == 40 and "data:image" not in text
    assert "20 of them, drawn at random" in text and "Dropped by clip &gt; 0: 30 pairs" in text


def test_histograms_hold_every_scored_pair(write_score_file, choose, page):
    random = np.random.default_rng(0)
    scores = [*random.normal(0, 1, 500), 1e9, -1e9]
    write_score_file("clip", {uid_of(number): float(score) for number, score in enumerate(scores)})
    write_score_file("mlm", {uid_of(number): float(random.integers(0, 101)) for number in range(502)})
    write_score_file("flat", {uid_of(number): 3.0 for number in range(502)})
    _, report = choose("clip > 0.5 and mlm >= 85 or flat > 9")
    plots = re.findall(r"<svg.*?</svg>", page(), re.DOTALL)
    assert len(plots) == 3
    for plot in plots:
        counts = [tuple(map(int, found)) for found in re.findall(r": (\d+) kept, (\d+) dropped", plot)]
        assert sum(kept for kept, _ in counts) == report.kept > 0
        assert sum(map(sum, counts)) == 502 and plot.count("stroke-dasharray") == 1
    assert "0 to 2: " in plots[1] and "84 to 86: " in plots[1]  # whole numbers, two a bar


def test_duplicates_stand_beside_what_was_kept(write_score_file, write_hash_file, write_tar, sample, choose, page):
    a, b = sorted(uid_of(number) for number in range(2))
    write_tar([*sample(f"k{a[:4]}", "first", uid=a), *sample(f"k{b[:4]}", "second", uid=b)], "00000.tar")
    source = {"source": {"path": "../../00000.tar"}}
    write_score_file("clip", {a: 1.0, b: 1.0}, recipe=source)
    write_hash_file({a: (1, 1), b: (1, 1)})
    choose("clip > 0", deduplicate="exact")
    text = page()
    assert text.count("data:image/jpeg") == 3 and text.count('class="twin"') == 1
    assert "Dropped as duplicates: 1 pairs" in text
