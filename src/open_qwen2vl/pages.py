"""The base of all HTML pages that are written here: one style, one frame, one way to escape.

A page is one file that loads nothing: its policy lets no script run but its own (by its hash) and no picture load but
embedded ones. Text from data goes through [`escape`] (or a template that escapes) and nowhere else.
"""

import base64
import hashlib
import html
from collections.abc import Iterable

from .files import remove_temporaries, renamed_when_whole
from .places import Place
from .transfers import make_folder

escape = html.escape

STYLE = """
:root {
  color-scheme: light dark;
  --ink: #1c2330; --muted: #5d6878; --line: #e2e6ec; --page: #f6f7f9; --card: #ffffff; --track: #e9edf2;
  --accent: #0b62c4; --right: #14713f; --right-back: #e3f4ea; --wrong: #b3261e; --wrong-back: #fbe9e7;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ink: #e7ebf1; --muted: #9ba7b7; --line: #2c3542; --page: #10151c; --card: #181f29; --track: #2a3340;
    --accent: #7db5ff; --right: #6fd39c; --right-back: #16352a; --wrong: #ff9a90; --wrong-back: #3d2022;
  }
}
* { box-sizing: border-box; }
[hidden] { display: none !important; }
body {
  margin: 0 auto; max-width: 1240px; padding: 2.5rem 1.5rem 3rem; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif;
}
h1 { margin: 0 0 .75rem; font-size: 1.9rem; line-height: 1.2; letter-spacing: -.015em; }
h2 { margin: 2.75rem 0 .5rem; font-size: 1.2rem; }
h3 { margin: 0 0 .35rem; font-size: .88rem; font-weight: 600; overflow-wrap: anywhere; }
code { font-family: ui-monospace, "SF Mono", Menlo, Consolas, monospace; font-size: .9em; overflow-wrap: anywhere; }
table { width: 100%; border-collapse: collapse; }
th { text-align: left; font-weight: 600; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
.note, .hint, footer { color: var(--muted); font-size: .87rem; }
.figures { display: flex; flex-wrap: wrap; gap: 1rem; margin: 1.5rem 0; }
.figures div { flex: 1 1 9rem; padding: .8rem 1rem; background: var(--card); border: 1px solid var(--line);
  border-radius: 12px; }
.figures b { display: block; font-size: 1.5rem; font-weight: 650; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(200px, 1fr)); gap: .8rem; }
figure { margin: 0; padding: .6rem; background: var(--card); border: 1px solid var(--line); border-radius: 12px; }
figcaption { font-size: .8rem; line-height: 1.4; overflow-wrap: anywhere; }
.right { color: var(--right); } .wrong { color: var(--wrong); } .truth { color: var(--muted); }
footer { margin-top: 3rem; padding-top: 1rem; border-top: 1px solid var(--line); }
@media (max-width: 720px) { body { padding: 1.25rem .9rem 2rem; } h1 { font-size: 1.5rem; } }
"""


def page(title: str, body: str, style: str = "", script: str = "") -> str:
    """A whole page: `title` is text, `body` HTML in which all data is escaped, `style` follows the common one.

    Only elements of the style sheet and the script given here take effect; `style=` attributes are allowed.
    """
    rules = STYLE + style
    policy = [
        "default-src 'none'",
        "img-src data:",
        f"style-src-elem {_hash(rules)}",
        "style-src-attr 'unsafe-inline'",
    ]
    policy += [f"script-src {_hash(script)}"] if script else []
    policy += ["base-uri 'none'", "form-action 'none'"]
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{"; ".join(policy)}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="referrer" content="no-referrer">
<title>{escape(title)}</title>
<style>{rules}</style>
</head>
<body>
{body}
{f"<script>{script}</script>" if script else ""}
</body>
</html>
"""


def figures(pairs: Iterable[tuple[str, str]]) -> str:
    """Boxes of large values with what they are, both text."""
    boxes = "".join(f"<div><b>{escape(value)}</b>{escape(meaning)}</div>" for value, meaning in pairs)
    return f'<div class="figures">{boxes}</div>'


def picture(data: bytes, kind: str = "png", alt: str = "") -> str:
    """An embedded image file."""
    return f'<img alt="{escape(alt)}" src="data:image/{kind};base64,{base64.b64encode(data).decode()}">'


def rows(pairs: Iterable[tuple[object, object]]) -> str:
    """Table rows of names and values."""
    return "".join(f"<tr><td>{escape(str(name))}</td><td>{escape(str(value))}</td></tr>" for name, value in pairs)


def write_page(path: Place, text: str) -> None:
    """Write a page as a whole; what a killed run left of it is removed, and its folder is made."""
    make_folder(path.parent)
    remove_temporaries([path])
    with renamed_when_whole(path) as temporary:
        # Text from data may hold half of a surrogate pair, which UTF-8 cannot.
        temporary.write_text(text, encoding="utf-8", errors="replace")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
