"""The page of a recaption: counts by reason, and pictures with the captions that they had and that were written."""

import hashlib
import heapq
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import pyarrow.compute as pc
import pyarrow.parquet as pq

from ... import pages
from ...pages import escape, write_page
from ...places import Place, arrow_source
from ..filtering.examples import Content, read_contents
from .options import RecaptionOptions

_SHOWN, _SHOWN_OF_A_REASON = 24, 6
REPORT_NAME = "report.html"
_STYLE = """
figure .picture { height: 150px; display: flex; align-items: center; justify-content: center; }
figure img { max-width: 100%; max-height: 150px; } td.n, th.n { text-align: right; }
.grid { grid-template-columns: repeat(auto-fill, minmax(270px, 1fr)); } figcaption p { margin: .4rem 0; }
.prompt { display: block; white-space: pre-wrap; background: var(--card); border: 1px solid var(--line);
  border-radius: 12px; padding: .7rem 1rem; margin: 1rem 0; }
"""


class _Shown(NamedTuple):
    order: int  # by the uid: which are drawn
    file: Place
    key: str
    text: str
    reason: str


def write_report(folder: Place, files: Sequence[Place], options: RecaptionOptions) -> None:
    """Write `report.html` from the files of captions; the same files give the same bytes."""
    counts: Counter[str] = Counter()
    words = different = 0
    drawn: dict[str, list[_Shown]] = {}
    for file in files:
        table = pq.read_table(arrow_source(file), columns=["key", "uid", "value", "reason", "detail"])
        different += len(set(table.filter(pc.is_valid(table["value"]))["detail"].to_pylist()))
        for row in table.to_pylist():
            reason = row["reason"] or ""
            counts[reason] += 1
            if not reason:
                words += int(row["value"])
            order = int(hashlib.sha256(row["uid"].encode()).hexdigest()[:16], 16)
            shown = _Shown(order, file, row["key"], row["detail"] or "", reason)
            drawn[reason] = heapq.nsmallest(_SHOWN_OF_A_REASON if reason else _SHOWN, [*drawn.get(reason, ()), shown])
    write_page(folder / REPORT_NAME, _page(counts, words, different, drawn, options))


def _page(
    counts: Counter, words: int, different: int, drawn: dict[str, list[_Shown]], options: RecaptionOptions
) -> str:
    total, used = counts.total(), counts[""]
    figures = [
        (f"{used:,}", "new captions"),
        (f"{used / max(1, total):.1%}", f"of {total:,} pictures"),
        (f"{words / max(1, used):.1f}", "words, on average"),
        (f"{different:,}", "of them different from the others of their tar"),
    ]
    contents = read_contents([(one.file, one.key) for own in drawn.values() for one in own])
    reasons = pages.rows((reason, f"{count:,}") for reason, count in counts.most_common() if reason)
    body = [
        "<h1>Captions that a model wrote</h1>",
        f"<p>{escape(options.model)}{' behind ' + escape(options.endpoint) if options.endpoint else ''}, asked:</p>",
        f'<code class="prompt">{escape(options.prompt)}</code>',
        pages.figures(figures),
        f"<h2>Without a new caption: {total - used:,}</h2><table>{reasons}</table>",
        _section(f"New captions: {used:,}", drawn.get("", []), contents),
    ]
    body += [_section(f"{name}: {counts[name]:,}", drawn[name], contents) for name in sorted(drawn) if name]
    return pages.page("Recaption", "\n".join(body), _STYLE)


def _section(title: str, shown: Sequence[_Shown], contents: dict[tuple[Place, str | None], Content]) -> str:
    cards = []
    for one in sorted(shown):
        content = contents[one.file, one.key]
        picture = pages.picture(content.picture, "jpeg") if content.picture else escape(content.problem)
        cards.append(
            f'<figure><div class="picture">{picture}</div><figcaption><p>{escape(one.text[:1000])}</p>'
            f'<p class="note">before: {escape(content.caption[:300]) or "no caption"}</p>'
            f'<p class="note">{escape(one.file.stem)}/{escape(one.key)}</p></figcaption></figure>'
        )
    return f'<h2>{escape(title)}</h2><div class="grid">{"".join(cards)}</div>' if cards else ""
