"""`cossl convert` and `cossl verify`: the command lines over pipelines/convert.py and pipelines/beton.py."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from cossl.models.flags import parse_flags
from cossl.pipelines import convert as conversion
from cossl.pipelines.beton import manifest_path, verify

NAMES_SHOWN = 20


@dataclass(frozen=True)
class ConvertArgs:
    """The command line of `cossl convert`; each field's text is its help."""

    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")]
    """Folder of class folders, SRC/<class>/<picture>, or with --labels a folder of pictures."""

    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT.beton")]
    """The beton to write; its manifest goes beside it as OUT.beton.json."""

    mode: conversion.Mode = "jpg"
    """jpg: small, decoded in training. raw: pixels, about six times as large, no decoding. proportion: some of each."""

    max_side_px: int | None = None
    """Shrink pictures whose longer side exceeds this (default: keep every size)."""

    jpeg_quality: int = 90
    """Quality, 1 to 100, of the pictures that have to be encoded; the others keep their bytes."""

    jpeg_fraction: float = 0.5
    """With --mode proportion: the share of pictures stored as JPEG."""

    labels: Path | None = None
    """For a flat folder: lines `<picture> <class>`, or Kaggle's LOC_val_solution.csv."""

    classes: str | None = None
    """Only these classes: imagenet100, or a file with one class per line (default: all)."""

    workers: int | None = None
    """Writer processes (default: one per core)."""

    resume: bool = False
    """Go on with a conversion that was killed or met a full disk; does nothing if it is finished, starts if there is none."""

    force: bool = False
    """Replace OUT.beton; the old one stays until the new one is whole."""


@dataclass(frozen=True)
class VerifyArgs:
    """The command line of `cossl verify`; each field's text is its help."""

    beton: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT.beton")]
    """The beton to prove; its manifest must lie beside it."""

    decode: int | Literal["all"] = 64
    """How many rows to decode besides hashing every byte, evenly spread, or `all`."""

    source: Path | None = None
    """Compare as many rows with their pictures in this folder, the SRC of the conversion."""

    labels: Path | None = None
    """With --source: the --labels of the conversion."""

    classes: str | None = None
    """With --source: the --classes of the conversion."""


def summary(report: conversion.ConvertReport) -> str:
    """The end of a conversion, for people: counts, size, time, and the first pictures left out with their reasons."""
    how = ", ".join(f"{count:,} {name}" for name, count in sorted(report.stored.items()))
    before = report.num_rows + len(report.quarantined) - report.num_converted
    cost = f"in {report.seconds:.1f} s ({report.num_converted / report.seconds:,.0f} pictures/s)"
    if before:
        cost += f" for {report.num_converted:,} of them; {before:,} were done before"
    if not report.num_converted:
        cost = "(was finished before)"
    size = f"{report.beton_bytes / 2**20:,.1f} MiB"
    lines = [f"{report.out}: {report.num_rows:,} pictures ({how}) in {len(report.class_names):,} classes, {size} {cost}"]
    if left_out := report.quarantined:
        lines.append(f"{len(left_out):,} left out, each listed in {manifest_path(report.out).name}:")
        # A name need not be UTF-8: what cannot be printed is shown as bytes.
        lines += [f"  {os.fsencode(file).decode(errors='backslashreplace')}: {reason}" for file, reason in left_out[:NAMES_SHOWN]]
        lines += [f"  ... and {len(left_out) - NAMES_SHOWN:,} more"] if len(left_out) > NAMES_SHOWN else []
    return "\n".join(lines)


def convert_main(argv: Sequence[str]) -> None:
    """`cossl convert SRC OUT.beton`. Raises what `convert` raises; exit code 130 after Ctrl-C."""
    args = parse_flags(ConvertArgs, argv, "cossl convert", conversion.__doc__ or "")
    try:
        report = _convert(args)
    except KeyboardInterrupt:
        print("cossl convert: interrupted; --resume goes on with what is done", file=sys.stderr)
        raise SystemExit(130) from None
    print(summary(report))


def _convert(args: ConvertArgs) -> conversion.ConvertReport:
    return conversion.convert(
        args.source,
        args.out,
        mode=args.mode,
        max_side_px=args.max_side_px,
        jpeg_quality=args.jpeg_quality,
        jpeg_fraction=args.jpeg_fraction,
        labels_file=args.labels,
        classes=args.classes,
        num_workers=args.workers,
        resume=args.resume,
        overwrite=args.force,
    )


def verify_main(argv: Sequence[str]) -> None:
    """`cossl verify OUT.beton`. Raises what `verify` raises."""
    description = "Prove a beton whole against its manifest: every pointer, every byte's hash, and a sample of pictures decoded."
    args = parse_flags(VerifyArgs, argv, "cossl verify", description)
    if args.source is None and (args.labels or args.classes):
        raise ValueError("--labels and --classes say how --source was read: give it too")
    rows = None if args.decode == "all" else args.decode
    size = args.beton.stat().st_size if args.beton.is_file() else 0
    with conversion.progress_bar(size, "hashing", "B") as tick:
        report = verify(args.beton, decode=rows, progress=tick)
    line = (
        f"{args.beton} is whole: {report.num_rows:,} pictures in {report.num_classes:,} classes, "
        f"{report.beton_bytes / 2**20:,.1f} MiB hashed, {report.num_decoded:,} decoded"
    )
    if args.source is not None:
        same = conversion.compare_with_source(args.beton, args.source, labels_file=args.labels, classes=args.classes, rows=rows)
        line += f", {same:,} compared with their source"
    print(line)
