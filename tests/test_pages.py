"""The base of the HTML pages: escaping, the policy in a browser, whole or absent."""

import pytest

from open_qwen2vl import pages

EVIL = "</title><script>document.title='ran'</script><img src=x onerror=\"document.title='ran'\">\ud800"


def test_a_page_shows_what_data_says_and_runs_only_its_own_script(browser, tmp_path):
    body = (
        f"<p id=p>{pages.escape(EVIL)}</p>{pages.figures([(EVIL, EVIL)])}<table>{pages.rows([(EVIL, EVIL)])}</table>"
    )
    # Were something to get in after all, the policy would stop it: here it does get in.
    text = pages.page(EVIL, body + EVIL, ".x { color: red; }", "document.body.dataset.own = 'ran';")
    pages.write_page(tmp_path / "new" / "page.html", text)
    page = browser.new_page()
    blocked = []
    page.on("console", lambda message: blocked.append(message.text))
    page.goto((tmp_path / "new" / "page.html").as_uri())
    page.wait_for_timeout(100)
    shown = EVIL.replace("\ud800", "?")
    assert page.title() == shown and page.evaluate("document.body.dataset.own") == "ran"
    assert page.locator("#p").inner_text() == page.locator(".figures b").inner_text() == shown
    assert page.locator("td").first.inner_text() == shown
    assert page.evaluate("getComputedStyle(document.body).maxWidth") == "1240px"
    assert any("Content Security Policy" in one for one in blocked)
    page.close()


def test_a_page_is_there_as_a_whole_and_a_killed_ones_rest_is_removed(tmp_path):
    (tmp_path / "page.html.77.tmp").write_text("half")
    with pytest.raises(TypeError):
        pages.write_page(tmp_path / "page.html", None)
    assert list(tmp_path.iterdir()) == []
    pages.write_page(tmp_path / "page.html", "whole")
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
