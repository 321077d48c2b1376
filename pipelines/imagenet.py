"""What is particular to ImageNet's pictures on disk: a flat validation folder with a file of labels, and the classes of ImageNet-100."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from cossl.pipelines.beton import kept_classes, list_image_folder, some

# Tian, Krishnan, Isola: Contrastive Multiview Coding (arXiv 1906.05849), imagenet100.txt of github.com/HobbitLong/CMC; solo-learn has the
# same classes. Sorted here: a label is the index in the sorted list, as in torchvision's ImageFolder. Other sets have this name too.
IMAGENET100 = """
    n01558993 n01692333 n01729322 n01735189 n01749939 n01773797 n01820546 n01855672 n01978455 n01980166 n01983481 n02009229
    n02018207 n02085620 n02086240 n02086910 n02087046 n02089867 n02089973 n02090622 n02091831 n02093428 n02099849 n02100583
    n02104029 n02105505 n02106550 n02107142 n02108089 n02109047 n02113799 n02113978 n02114855 n02116738 n02119022 n02123045
    n02138441 n02172182 n02231487 n02259212 n02326432 n02396427 n02483362 n02488291 n02701002 n02788148 n02804414 n02859443
    n02869837 n02877765 n02974003 n03017168 n03032252 n03062245 n03085013 n03259280 n03379051 n03424325 n03492542 n03494278
    n03530642 n03584829 n03594734 n03637318 n03642806 n03764736 n03775546 n03777754 n03785016 n03787032 n03794056 n03837869
    n03891251 n03903868 n03930630 n03947888 n04026417 n04067472 n04099969 n04111531 n04127249 n04136333 n04229816 n04238763
    n04336792 n04418357 n04429376 n04435653 n04485082 n04493381 n04517823 n04589890 n04592741 n07714571 n07715103 n07753275
    n07831146 n07836838 n13037406 n13040303
""".split()
CLASS_LISTS = {"imagenet100": IMAGENET100}


def list_pictures(source: Path, labels_file: Path | None = None, classes: str | None = None) -> tuple[list[Path], list[int], list[str]]:
    """Files, labels and class names below source: class folders, or with a labels_file one flat folder; sorted by class, then file.

    `classes` is a name of CLASS_LISTS or a file with one class per line; pictures of other classes are passed over. Raises
    FileNotFoundError or ValueError, one line with the remedy.
    """
    keep = None if classes is None else read_classes(classes)
    if labels_file is None:
        return list_image_folder(source, keep)
    if not source.is_dir():
        raise FileNotFoundError(f"no such folder: {source}; --labels expects a folder of pictures")
    class_of = read_labels(labels_file)
    entries = [entry for entry in os.scandir(source) if entry.is_file() and not entry.name.startswith(".")]
    found = sorted(entry.name for entry in entries if not os.path.samefile(entry.path, labels_file))
    if not found:
        raise ValueError(f"{source} holds no pictures itself; --labels is for one flat folder: leave it out for class folders")
    keys = {name: name if name in class_of else os.path.splitext(name)[0] for name in found}
    if unnamed := [name for name, key in keys.items() if key not in class_of]:
        raise ValueError(f"{labels_file} has no line for {len(unnamed):,} of the {len(found):,} files in {source}: {some(unnamed)}")
    if absent := sorted(set(class_of) - set(keys.values())):
        raise ValueError(f"{source} lacks {len(absent):,} of the {len(class_of):,} pictures that {labels_file} names: {some(absent)}")
    names = kept_classes(source, sorted(set(class_of.values())), keep)
    label_of = {name: label for label, name in enumerate(names)}
    pictures = sorted((label_of[class_of[key]], name) for name, key in keys.items() if class_of[key] in label_of)
    return [source / name for _, name in pictures], [label for label, _ in pictures], names


def read_classes(classes: str) -> Sequence[str]:
    """The classes of a list in CLASS_LISTS, or of a file with one class per line."""
    if classes in CLASS_LISTS:
        return CLASS_LISTS[classes]
    path = Path(classes)
    if not path.is_file():
        raise FileNotFoundError(f"--classes {classes}: no such file, and no list of that name; lists: {', '.join(CLASS_LISTS)}")
    names = [line for line in _lines(path, "with one class each") if line]
    if not names:
        raise ValueError(f"--classes {classes}: the file names no class; expected one class per line")
    return names


def read_labels(path: Path) -> dict[str, str]:
    """File name (or its stem) -> class, from lines `<picture> <class>` or from Kaggle's LOC_val_solution.csv.

    Numbers are refused: the development kit's ILSVRC2012_validation_ground_truth.txt counts classes in an order of its own, other lists
    count the sorted classes from 0, and nothing in a file tells which.
    """
    if not path.is_file():
        raise FileNotFoundError(f"--labels {path}: no such file; expected lines `<picture> <class>`, or LOC_val_solution.csv")
    lines = _lines(path, "`<picture> <class>`, or LOC_val_solution.csv")
    kaggle = lines[:1] == ["ImageId,PredictionString"]
    class_of: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        if not line or (kaggle and number == 1):
            continue
        name, classes = _kaggle_line(line) if kaggle else _plain_line(line)
        where = f"{path}:{number}: {line!r}"
        if any(label.isdigit() for label in classes):
            raise ValueError(
                f"{where} numbers its class, and lists differ in how they count (the development kit has an order of its own); "
                "write lines such as `ILSVRC2012_val_00000001.JPEG n01751748`, or take Kaggle's LOC_val_solution.csv"
            )
        if len(classes) != 1 or not name:
            raise ValueError(f"{where} does not name one picture and one class; expected `<picture> <class>`")
        if class_of.setdefault(name, *classes) not in classes:
            raise ValueError(f"{where} contradicts a line above: {name} is {class_of[name]}")
    if not class_of:
        raise ValueError(f"{path} names no picture; expected lines `<picture> <class>`")
    return class_of


def _lines(path: Path, expected: str) -> list[str]:
    """The lines of a text file, stripped; some editors put a byte order mark in front, which is no part of the first name."""
    try:
        return [line.strip() for line in path.read_text("utf-8-sig").splitlines()]
    except UnicodeDecodeError:
        raise ValueError(f"{path} is no text file of UTF-8; expected lines {expected}") from None


def _plain_line(line: str) -> tuple[str, set[str]]:
    """`val/ILSVRC2012_val_00000001.JPEG n01751748`; the folder does not count."""
    name, _, label = line.replace("\t", " ").rpartition(" ")
    return name.strip().rsplit("/", 1)[-1], {label}


def _kaggle_line(line: str) -> tuple[str, set[str]]:
    """`ILSVRC2012_val_00000001,n01751748 111 108 230 366 ...`: a class and a box for each object, all of one class."""
    name, _, boxes = line.partition(",")
    return name, set(boxes.split()[::5])
