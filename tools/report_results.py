"""The results that other commands wrote into the folders of runs: tables, protocols and figures, whatever they are of."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cossl.tools.report_page import Album, Html, join, pairs, section, shown, table, tag, warning
from cossl.tools.report_read import FAMILIES, Record, Told, compared

FIGURE_LIMIT = 24  # of each result
NETWORK = ("checkpoint", "step", "weights_sha256", "weights")
"""Of a protocol, and of the protocol of a head within it: which network was asked, not how. Runs differ in it by right."""


def family_section(told: Sequence[Told], family: str, album: Album) -> Html:
    """Each result of the family: its table, with several runs' under one another if they have the same columns, protocol and figures.

    Of several runs the figure with all as lines comes first, if the command that made the results has drawn it.
    """
    names = dict.fromkeys(name for one in told for name in one.families[family])
    return section(FAMILIES[family], *(part for name in names for part in _result(told, family, name, album)))


def _result(told: Sequence[Told], family: str, name: str, album: Album) -> Iterator[Html]:
    owners = [one for one in told if name in one.families[family]]
    results = [one.families[family][name] for one in owners]
    titles = list(dict.fromkeys(shown(of["title"]) if "title" in of else name for of in results))
    yield tag("h3", " / ".join(titles))
    tables = [of["table"] for of in results]
    if len(told) > 1 and all(of["columns"] == tables[0]["columns"] for of in tables):
        rows = [[one.name, *row] for one, of in zip(owners, tables, strict=True) for row in of["rows"]]
        yield table(titles[0], ["run", *tables[0]["columns"]], rows, quiet=True)
    else:
        for one, of, result in zip(owners, tables, results, strict=True):
            caption = shown(result.get("title", name))
            yield table(f"{one.name}: {caption}" if len(told) > 1 else caption, of["columns"], of["rows"], quiet=len(told) == 1)
    yield protocols(owners, results)
    for one, of in zip(owners, results, strict=True):
        yield _stamp(f"{one.name}, measured" if len(told) > 1 else "measured", of)
    figures = list(_compared(owners, family, name, titles[0], album)) if len(owners) > 1 else []
    figures += [part for one, of in zip(owners, results, strict=True) for part in _figures(one, family, of, album, len(told) > 1)]
    yield tag("div", *figures) if figures else Html()


def _stamp(label: str, result: Record) -> Html:
    versions = result["versions"] if isinstance(result.get("versions"), dict) else {}
    protocol: Record = result["protocol"] if isinstance(result.get("protocol"), dict) else {}
    parts = [protocol, *(part for part in protocol.values() if isinstance(part, dict))]
    known: Record = {key: part[key] for part in parts for key in NETWORK if key in part}
    known |= {key: result[key] for key in ("time", "device", "code_version") if key in result} | versions
    return join([tag("p", label, class_="label"), pairs((key, shown(value)) for key, value in known.items())]) if known else Html()


def _compared(owners: Sequence[Told], family: str, name: str, title: str, album: Album) -> Iterator[Html]:
    path, notes = compared(owners, family, name)
    if path is not None:
        yield album.figure(path, f"{title}: {', '.join(one.name for one in owners)} ({path.name})", missing=True)
    yield from (tag("p", note, class_="note") for note in notes)


def _figures(one: Told, family: str, result: Record, album: Album, several: bool) -> Iterator[Html]:
    files = result.get("figures")
    for file in files[:FIGURE_LIMIT] if isinstance(files, list) else []:
        if not isinstance(file, str) or not file or "\0" in file or Path(file).name != file:
            yield tag("p", f"{shown(file)}: not shown (expected the name of a picture beside {family}/*.json)", class_="note")
            continue
        caption = f"{shown(result.get('title', family))} ({file})"
        yield album.figure(one.run_dir / family / file, f"{one.name}: {caption}" if several else caption, missing=True)


def protocols(told: Sequence[Told], results: Sequence[Record]) -> Html:
    """How the numbers above were measured: once, or if runs differ, of each run and loudly."""
    kept = [(one.name, _how(of)) for one, of in zip(told, results, strict=True) if of]
    if not kept:
        return Html()
    if len({json.dumps(how, sort_keys=True) for _, how in kept}) == 1:
        return _protocol("protocol", kept[0][1])
    keys = dict.fromkeys(key for _, how in kept for key in how or {})
    words = {key: [shown((how or {}).get(key)) for _, how in kept] for key in keys}
    lines = [f"{key}: {', '.join(f'{name} {word}' for (name, _), word in zip(kept, of, strict=True))}" for key, of in words.items()
             if len(set(of)) > 1]  # fmt: skip
    return join([
        warning("Protocols differ: do not compare these numbers with one another", lines or ["some are not recorded"]),
        *(_protocol(f"protocol of {name}", how) for name, how in kept),
    ])  # fmt: skip


def _how(result: Record) -> Record | None:
    protocol = result.get("protocol")
    if not isinstance(protocol, dict):
        return None
    # A list of features says which rows there are, each of which is what it would be alone.
    rows = {key: value for key, value in protocol.items() if not (key == "features" and isinstance(value, list))}
    return _but_network({key: _but_network(value) for key, value in rows.items()})


def _but_network(part: Any) -> Any:
    return {key: value for key, value in part.items() if key not in NETWORK} if isinstance(part, dict) else part


def _protocol(label: str, protocol: Record | None) -> Html:
    if protocol is None:
        return tag("p", f"{label}: not recorded", class_="label")
    return join([tag("p", label, class_="label"), pairs((key, shown(value)) for key, value in protocol.items())])
