"""README, docs/ and the pages of recipes/: lines that fit a screen, files and modules that exist."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOUND = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "recipes").rglob("*.md"))]
PAGES = {str(path.relative_to(ROOT)): path for path in FOUND}
WIDTH = 120
# Where a path in the text may begin.
BASES = (ROOT, *(ROOT / name for name in ("src/open_qwen2vl", "docs", "recipes", "benchmarks", "tests")))
NOT_OURS = {"mlm_filter_scoring_single_image.py", "convert_hf_to_gguf.py"}  # the original's, llama.cpp's


def prose(text: str) -> Iterator[tuple[int, str]]:
    """Lines outside of code blocks and tables, with their numbers."""
    fence = ""
    for number, line in enumerate(text.splitlines(), 1):
        mark = re.match(r"\s*(`{3,})", line)
        if mark and (not fence or mark[1] == fence):
            fence = "" if fence else mark[1]
        elif not fence and not line.lstrip().startswith("|"):
            yield number, line


@pytest.mark.parametrize("page", PAGES)
def test_lines_of_prose_fit(page):
    text = PAGES[page].read_text(encoding="utf8")
    assert [number for number, line in prose(text) if len(line) > WIDTH] == []


def is_there(path: str, page: Path) -> bool:
    """Whether a path in a page's text is a file or folder, from the root, the package or the page's own folder on."""
    return any((base / path).exists() for base in (*BASES, page.parent)) or (
        "/" not in path and any(any((ROOT / top).rglob(path)) for top in ("src", "recipes", "benchmarks", "tests"))
    )


@pytest.mark.parametrize("page", PAGES)
def test_files_that_are_named_exist(page):
    text = PAGES[page].read_text(encoding="utf8")
    named = set(re.findall(r"(?<![\w/.-])(?:[\w.-]+/)*\w+\.py\b", text))
    named |= set(re.findall(r"`((?:src|docs|recipes|benchmarks|tests)/[\w./-]+)`", text))
    named |= set(re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", text))
    assert [path for path in sorted(named - NOT_OURS) if not is_there(path, PAGES[page])] == []


@pytest.mark.parametrize("page", PAGES)
def test_modules_that_are_named_exist(page):
    text = PAGES[page].read_text(encoding="utf8")
    wrong = []
    for name in sorted(set(re.findall(r"(?<!/)\bopen_qwen2vl(?:\.(?!py\b|yaml\b)[A-Za-z_]\w*)+", text))):
        parts = name.split(".")
        # A module, or a name within one; the parts are found without importing torch.
        path = ROOT / "src" / Path(*parts)
        inner = path.parent / "__init__.py" if path.parent.is_dir() else path.parent.with_suffix(".py")
        known = path.is_dir() or path.with_suffix(".py").is_file()
        known = known or (inner.is_file() and re.search(rf"\b{parts[-1]}\b", inner.read_text(encoding="utf8")))
        wrong += [] if known else [name]
    assert wrong == []
