"""The pieces of a report's page: markup that escapes whatever is not markup, tables, pictures, and the page around them."""

from __future__ import annotations

import base64
import html
import io
import json
import math
import os
import re
import stat
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from cossl.tools.report_style import STYLE

TEXT_LIMIT, LONG_TEXT_LIMIT = 2_000, 200_000  # characters of a word or cell, and of a diff
ROW_LIMIT, COLUMN_LIMIT = 2_000, 200
TALL = 30  # rows, above which a table scrolls in itself
FILE_LIMIT, PICTURE_LIMIT, ALBUM_LIMIT = 32 << 20, 8 << 20, 64 << 20  # bytes
PIXEL_LIMIT = 50_000_000

# ------------------------------------------------------------------------------------------------- markup


class Html(str):
    """Markup. Any other string is text, and is escaped where it is put into markup: see `tag`."""

    __slots__ = ()


VOID = {"img", "meta", "link", "br"}
NO_SIGN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff\ufeff\ufff9-\ufffb\U000e0000-\U000e007f]"
)


def escape(text: str, limit: int = TEXT_LIMIT) -> Html:
    """Text as markup that shows it: characters without a sign of their own, such as those that turn the writing round, as \\u202e.

    What is longer than `limit` characters is cut, with a note.
    """
    if isinstance(text, Html):
        return text
    cut = text if len(text) <= limit else f"{text[:limit]} [cut: {len(text):,} characters]"
    return Html(html.escape(NO_SIGN.sub(lambda found: f"\\u{ord(found[0]):04x}", cut)))


def tag(name: str, *children: str, **attributes: str | int) -> Html:
    """<name attributes>children</name>; `class_` and `aria_label` are class and aria-label."""
    shown = "".join(
        f' {key.strip("_").replace("_", "-")}="{escape(value if isinstance(value, str) else str(value))}"'
        for key, value in attributes.items()
    )
    return Html(f"<{name}{shown}>" if name in VOID else f"<{name}{shown}>{join(children)}</{name}>")


def join(parts: Iterable[str]) -> Html:
    """One after the other."""
    return Html("".join(map(escape, parts)))


def folded(summary: str, *children: str, open_: bool = False) -> Html:
    """Shown when asked for."""
    return tag("details", tag("summary", summary), *children, **({"open": ""} if open_ else {}))


def long_text(text: str) -> Html:
    """A diff or the like, as it is."""
    return tag("pre", escape(text, LONG_TEXT_LIMIT), tabindex=0)


def warning(title: str, lines: Sequence[str]) -> Html:
    """A box that is not overlooked; nothing without lines."""
    return (
        tag("div", tag("strong", title), tag("ul", *(tag("li", line) for line in lines)), class_="warning", role="note")
        if lines
        else Html()
    )


def section(title: str, *children: str) -> Html:
    """Empty if there is nothing in it."""
    return tag("section", tag("h2", title), *children, id=anchor(title)) if any(children) else Html()


def anchor(title: str) -> str:
    return re.sub(r"\W+", "-", title.lower())


# ------------------------------------------------------------------------------------------------- values


def number(value: Any) -> float | None:
    """The value if it is a finite number of a size that anything can be computed with."""
    good = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30
    return float(value) if good else None


def shown(value: Any) -> str:
    """A value of a JSON file as a word; a number with four digits that count, an empty dash for None."""
    if isinstance(value, str):
        return value
    if value is None:
        return "—"
    if (known := number(value)) is not None:
        return f"{value:,}" if isinstance(value, int) else f"{known:,.0f}" if abs(known) >= 10_000 else f"{known:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {shown(one)}" for key, one in list(value.items())[:COLUMN_LIMIT]) or "none"
    if isinstance(value, list):
        return " ".join(map(shown, value[:COLUMN_LIMIT])) + (f" ... ({len(value):,})" if len(value) > COLUMN_LIMIT else "") or "none"
    return "too large a number" if isinstance(value, int) and not isinstance(value, bool) else str(value).lower()


def as_set(value: Any) -> str:
    """A setting as one would type it: every digit of a number."""
    return json.dumps(value) if isinstance(value, int | float | bool) and number(value) is not None else shown(value)


def _column(values: Sequence[Any]) -> list[str]:
    """Numbers of a column with equally many decimals, so that they stand under one another, if they are of about one size."""
    known = [abs(one) for value in values if (one := number(value))]
    if not known or all(isinstance(value, int | None) for value in values) or max(known) > 100 * min(known) or max(known) < 1e-3:
        return [shown(value) for value in values]
    room = max(1, 3 - math.floor(math.log10(max(known))))
    used = max(1, *(len(f"{one:.{room}f}".rstrip("0").partition(".")[2]) for one in known))
    return ["—" if value is None else f"{value:,.{used}f}" for value in values]


# ------------------------------------------------------------------------------------------------- tables


def table(
    caption: str, columns: Sequence[Any], rows: Sequence[Sequence[Any]], right: Sequence[bool] | None = None, quiet: bool = False
) -> Html:
    """In a box of its own that scrolls. `right`: which columns are numbers; left out, those whose values all are.

    `quiet`: a heading above says what the caption does, which then is for those alone who hear the page.
    """
    cut = [list(row[:COLUMN_LIMIT]) + [None] * (min(len(columns), COLUMN_LIMIT) - len(row)) for row in rows[:ROW_LIMIT]]
    width = max([min(len(columns), COLUMN_LIMIT), *map(len, cut)])
    heads = [shown(column) for column in columns[:COLUMN_LIMIT]]
    values = [[row[i] if i < len(row) else None for row in cut] for i in range(width)]
    numeric = right or [any(number(v) is not None for v in of) and all(v is None or number(v) is not None for v in of) for of in values]
    kinds = [{"class_": "n"} if i < len(numeric) and numeric[i] else {} for i in range(width)]
    cells = [
        _column(of) if kind and right is None else [one if isinstance(one, Html) else shown(one) for one in of]
        for of, kind in zip(values, kinds, strict=True)
    ]
    head = tag("tr", *(tag("th", heads[i] if i < len(heads) else "", scope="col", **kinds[i]) for i in range(width)))
    body = (
        tag(
            "tr",
            *(
                tag("th", one, scope="row", **kind) if i == 0 else tag("td", one, **kind)
                for i, (one, kind) in enumerate(zip(row, kinds, strict=True))
            ),
        )
        for row in zip(*cells, strict=True)
    )
    whole = tag(
        "table", tag("caption", tag("span", caption), **({"class_": "quiet"} if quiet else {})), tag("thead", head), tag("tbody", *body)
    )
    left_out = f"cut: {len(rows):,} rows of up to {max(map(len, rows), default=0):,} columns"
    return join([
        tag("div", whole, class_="scroll tall" if len(cut) > TALL else "scroll", role="region", aria_label=caption, tabindex=0),
        tag("p", left_out, class_="note") if len(rows) > ROW_LIMIT or max(map(len, [columns, *rows])) > COLUMN_LIMIT else "",
    ])  # fmt: skip


def pairs(values: Iterable[tuple[str, str]], kind: str = "pairs") -> Html:
    """Names and what they are, in a line that wraps."""
    return tag("dl", *(tag("div", tag("dt", name), tag("dd", value)) for name, value in values), class_=kind)


# ------------------------------------------------------------------------------------------------- files


def read_bytes(path: Path, limit: int = FILE_LIMIT) -> bytes:
    """The file, whose size is bounded. ValueError if it is larger or no file (one could wait forever for a pipe); OSError as ever."""
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("no file")
        if status.st_size > limit:
            raise ValueError(f"too large, {status.st_size / 2**20:,.0f} MiB of at most {limit >> 20}")
        return file.read(limit)


def read_json(path: Path, kind: type[Any], name: str, troubles: list[str]) -> Any:
    """What the file holds, if it is of that kind; else an empty one, and unless the file is not there a line in `troubles`."""
    try:
        value = json.loads(read_bytes(path))
        if isinstance(value, kind):
            return value
        troubles.append(f"{name} damaged (expected a {'list' if kind is list else 'dictionary'})")
    except FileNotFoundError:
        pass
    except OSError as error:
        troubles.append(f"{name} unreadable ({error.strerror})")
    except json.JSONDecodeError as error:
        troubles.append(f"{name} damaged ({error})")
    except (ValueError, RecursionError) as error:
        troubles.append(f"{name} damaged ({error if str(error)[:3] in ('no ', 'too') else type(error).__name__})")
    return kind()


class Album:
    """Pictures that go into the page, up to ALBUM_LIMIT bytes of them."""

    def __init__(self) -> None:
        self.left = ALBUM_LIMIT

    def figure(self, path: Path, caption: str, missing: bool = False) -> Html:
        """A PNG or JPEG with its caption, or what is wrong with it; nothing if there is none, unless it is `missing` then."""
        try:
            source, width, height = self._source(path)
        except FileNotFoundError:
            return tag("p", f"{path.name}: not there", class_="note") if missing else Html()
        except Exception as error:  # Pillow's readers raise what they like on damage
            return tag("p", f"{path.name}: not shown ({error or type(error).__name__})", class_="note")
        kind = "light wide" if width > 2 * height else "light"
        picture = tag("img", src=Html(source), alt=caption, width=width, height=height)
        return tag("figure", tag("div", picture, class_=kind, **({"tabindex": 0} if "wide" in kind else {})), tag("figcaption", caption))

    def _source(self, path: Path) -> tuple[str, int, int]:
        data = read_bytes(path, PICTURE_LIMIT)
        if len(data) > self.left:
            raise ValueError(f"the page has {ALBUM_LIMIT >> 20} MiB of pictures already")
        kind = "png" if data.startswith(b"\x89PNG\r\n\x1a\n") else "jpeg" if data.startswith(b"\xff\xd8\xff") else ""
        if not kind:
            raise ValueError("neither PNG nor JPEG")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data), formats=[kind])
        width, height = image.size
        if width * height > PIXEL_LIMIT:
            raise ValueError(f"{width:,} x {height:,} pixels are too many")
        image.verify()
        self.left -= len(data)
        return f"data:image/{kind};base64,{base64.b64encode(data).decode()}", width, height


# ------------------------------------------------------------------------------------------------- the page


def page(title: str, header: str, sections: Sequence[str], footer: str) -> str:
    """A whole document that asks for nothing: its policy forbids scripts and any address but data."""
    titles = [html.unescape(found[1]) for one in sections if (found := re.search(r"<h2>(.*?)</h2>", one))]
    links = tag("nav", *(tag("a", name, href="#" + anchor(name)) for name in titles), aria_label="sections")
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name_="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name_="color-scheme", content="light dark"),
        tag("link", rel="icon", href="data:,"),
        tag("title", title),
        tag("style", Html(STYLE)),
    )
    body = tag("body", tag("header", header, links), tag("main", *sections), tag("footer", footer))
    return "<!doctype html>\n" + tag("html", head, body, lang="en") + "\n"
