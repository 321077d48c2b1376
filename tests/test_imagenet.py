"""ImageNet as it lies on disk: a flat validation folder with labels, and the classes of ImageNet-100."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest
from encoded import encoded, picture

from cossl.pipelines.beton import Beton, list_image_folder, manifest_path
from cossl.pipelines.convert import convert
from cossl.pipelines.imagenet import IMAGENET100, list_pictures, read_classes, read_labels
from cossl.tools import cli

CLASSES = ["n01440764", "n02102040", "n02979186"]


@pytest.fixture
def folders(tmp_path) -> Path:
    """tree/<wnid>/ and, the same pictures, flat/."""
    (tmp_path / "flat").mkdir()
    for i in range(12):
        name, wnid = f"ILSVRC2012_val_{i + 1:08}.JPEG", CLASSES[i * 7 % 3]
        (tmp_path / "tree" / wnid).mkdir(parents=True, exist_ok=True)
        for file in (tmp_path / "tree" / wnid / name, tmp_path / "flat" / name):
            file.write_bytes(encoded(picture(i)))
    return tmp_path


def wnid_of(folders: Path) -> dict[str, str]:
    return {file.name: file.parent.name for file in sorted((folders / "tree").glob("*/*"))}


def plain(folders: Path) -> str:
    return "".join(f"{name} {wnid}\n" for name, wnid in sorted(wnid_of(folders).items()))


def kaggle(folders: Path) -> str:
    lines = [f"{name[:-5]},{wnid} 10 20 30 40 {wnid} 1 2 3 4 " for name, wnid in wnid_of(folders).items()]
    return "\n".join(["ImageId,PredictionString", *lines])


LABEL_FILES = {
    "plain": plain,
    "tabs, folders, empty lines": lambda folders: plain(folders).replace(" ", "\t").replace("ILS", "val/ILS").replace("\n", "\n\n"),
    "Kaggle": kaggle,
}


@pytest.mark.parametrize("kind", LABEL_FILES)
@pytest.mark.parametrize("inside", [True, False])
def test_a_flat_folder_gives_the_beton_of_the_tree(kind, inside, folders):
    labels = (folders / "flat" if inside else folders) / "labels.txt"
    labels.write_text(LABEL_FILES[kind](folders))
    convert(folders / "tree", folders / "tree.beton", num_workers=1, progress=False)
    convert(folders / "flat", folders / "flat.beton", labels_file=labels, num_workers=1, progress=False)
    assert (folders / "flat.beton").read_bytes() == (folders / "tree.beton").read_bytes()
    assert Beton(folders / "flat.beton").class_names == tuple(CLASSES)


WRONG_LABELS = {
    "the development kit's": (lambda folders: "490\n361\n171\n", r"labels.txt:1: '490' numbers its class, .*LOC_val_solution.csv"),
    "numbered": (lambda folders: plain(folders).replace("n0", "0"), r"labels.txt:1: .* numbers its class"),
    "a picture too few": (
        lambda folders: plain(folders).split("\n", 1)[1],
        r"has no line for 1 of the 12 files in .*flat: ILSVRC2012_val_00000001",
    ),
    "a picture too many": (
        lambda folders: plain(folders) + "x.JPEG n01440764",
        r"flat lacks 1 of the 13 pictures that .*labels.txt names: x.JPEG",
    ),
    "two answers": (
        lambda folders: plain(folders) + "ILSVRC2012_val_00000001.JPEG n09999999",
        r"labels.txt:13: .*contradicts a line above",
    ),
    "two classes": (lambda folders: kaggle(folders) + " n09999999 1 2 3 4", r"labels.txt:13: .*does not name one picture and one class"),
    "a word": (lambda folders: "nothing", r"labels.txt:1: .*does not name one picture and one class"),
    "empty": (lambda folders: "\n", r"labels.txt names no picture"),
}


@pytest.mark.parametrize("mistake", WRONG_LABELS)
def test_labels_that_do_not_fit_are_refused(mistake, folders):
    text, message = WRONG_LABELS[mistake]
    (folders / "labels.txt").write_text(text(folders))
    with pytest.raises(ValueError, match=message) as error:
        list_pictures(folders / "flat", folders / "labels.txt")
    assert "\n" not in str(error.value)


def test_labels_for_class_folders_or_nothing(folders):
    (folders / "labels.txt").write_text(plain(folders))
    with pytest.raises(ValueError, match="holds no pictures itself; --labels is for one flat folder"):
        list_pictures(folders / "tree", folders / "labels.txt")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        list_pictures(folders / "nowhere", folders / "labels.txt")
    with pytest.raises(FileNotFoundError, match=r"--labels .*nowhere"):
        read_labels(folders / "nowhere")


def test_imagenet100_is_a_hundred_of_imagenets_classes():
    assert len(IMAGENET100) == len(set(IMAGENET100)) == 100
    assert sorted(IMAGENET100) == IMAGENET100
    assert all(len(wnid) == 9 and wnid[0] == "n" and wnid[1:].isdigit() for wnid in IMAGENET100)
    assert IMAGENET100[0] == "n01558993"
    assert IMAGENET100[-1] == "n13040303"


def test_classes_select_and_number(folders):
    (folders / "two.txt").write_text("n02979186\n\n  n01440764 \n")
    for source, labels in (("tree", None), ("flat", folders / "labels.txt")):
        (folders / "labels.txt").write_text(plain(folders))
        files, numbers, names = list_pictures(folders / source, labels, str(folders / "two.txt"))
        assert names == ["n01440764", "n02979186"]
        assert [names[label] for label in numbers] == [wnid_of(folders)[file.name] for file in files]
        assert len(files) == 8
    shutil.rmtree(folders / "tree" / "n02102040")
    assert list_pictures(folders / "tree", None, str(folders / "two.txt")) == list_image_folder(folders / "tree")


def test_a_byte_order_mark_is_no_part_of_a_name_and_other_bytes_are_no_list(folders):
    (folders / "two.txt").write_bytes(b"\xef\xbb\xbfn02979186\r\nn01440764\r\n")
    assert list_pictures(folders / "tree", None, str(folders / "two.txt"))[2] == ["n01440764", "n02979186"]
    (folders / "labels.txt").write_bytes(b"\xef\xbb\xbf" + plain(folders).encode())
    assert "\ufeff" not in "".join(read_labels(folders / "labels.txt"))
    (folders / "binary").write_bytes(b"\xff\xfe\0")
    for read in (read_labels, read_classes):
        with pytest.raises(ValueError, match=r"binary is no text file of UTF-8; expected lines"):
            read(str(folders / "binary") if read is read_classes else folders / "binary")


def test_classes_that_are_missing_are_named(folders, monkeypatch, capfd):
    monkeypatch.chdir(folders)
    (folders / "list.txt").write_text("n01440764\nn09999999\n")
    (folders / "none.txt").write_text("\n")
    for classes, message in [
        ("imagenet100", f"tree lacks 100 of the 100 classes asked for: {', '.join(IMAGENET100[:5])}, ..."),
        ("list.txt", "tree lacks 1 of the 2 classes asked for: n09999999"),
        ("none.txt", "the file names no class"),
        ("nowhere.txt", "no such file, and no list of that name; lists: imagenet100"),
    ]:
        monkeypatch.setattr(sys, "argv", ["cossl", "convert", "tree", "set.beton", "--classes", classes])
        with pytest.raises(SystemExit):
            cli.main()
        said = capfd.readouterr().err
        assert message in said
        assert len(said.splitlines()) == 1


def test_verify_compares_with_the_source(folders, monkeypatch, capfd):
    monkeypatch.chdir(folders)
    (folders / "labels.txt").write_text(plain(folders))
    (folders / "two.txt").write_text("n02979186\nn01440764\n")
    (folders / "flat" / "ILSVRC2012_val_00000004.JPEG").write_bytes(b"no picture")
    how = ["--labels", "labels.txt", "--classes", "two.txt"]

    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["cossl", *arguments])
        try:
            cli.main()
        except SystemExit:
            return capfd.readouterr().err
        return capfd.readouterr().out

    assert "7 pictures" in run("convert", "flat", "set.beton", *how)
    assert "7 decoded, 7 compared with their source" in run("verify", "set.beton", "--source", "flat", *how)
    assert "flat does not hold the pictures that set.beton was made of" in run(
        "verify", "set.beton", "--source", "flat", "--labels", "labels.txt"
    )
    assert "give it too" in run("verify", "set.beton", *how)
    changed = next(file for file in sorted((folders / "flat").iterdir()) if wnid_of(folders)[file.name] == CLASSES[0])
    changed.write_bytes(encoded(picture(99)))
    assert f"row 0 is not what flat/{changed.name} holds" in run("verify", "set.beton", "--source", "flat", *how)


@pytest.mark.parametrize("mode", ["jpg", "raw"])
def test_verify_compares_pixels_where_bytes_may_differ(mode, folders):
    """A PNG that this Pillow encodes to other bytes than the one that converted it: here, at another quality."""
    from cossl.pipelines.convert import FolderRows, compare_with_source

    picture(50, width=64, height=64).save(folders / "tree" / CLASSES[0] / "a.png")
    out = folders / "set.beton"
    convert(folders / "tree", out, mode=mode, num_workers=1, progress=False)
    assert compare_with_source(out, folders / "tree") == 13
    make = FolderRows._row

    def requantized(self, data, as_jpeg):
        self.options.__dict__["jpeg_quality"] = 93
        return make(self, data, as_jpeg)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FolderRows, "_row", requantized)
        assert compare_with_source(out, folders / "tree") == 13
    picture(51, width=64, height=64).save(folders / "tree" / CLASSES[0] / "a.png")
    with pytest.raises(ValueError, match=r"row \d+ is not what .*a.png holds"):
        compare_with_source(out, folders / "tree", rows=None)


DATA = Path(os.environ.get("COSSL_DATA", "/nonexistent"))


@pytest.mark.skipif(not DATA.is_dir(), reason="COSSL_DATA names no folder")
def test_classes_of_the_imagenet_sample(tmp_path):
    root = DATA / "imagenet-sample" / "train"
    names = sorted(file.name for file in root.iterdir())[10:20]
    (tmp_path / "ten.txt").write_text("\n".join(reversed(names)))
    report = convert(root, tmp_path / "set.beton", classes=str(tmp_path / "ten.txt"), num_workers=1, progress=False)
    assert report.class_names == tuple(names)
    assert manifest_path(tmp_path / "set.beton").is_file()
