"""A folder of pictures for the writer, and what it must become."""

from __future__ import annotations

from pathlib import Path

from encoded import encoded, picture

from cossl.pipelines.beton import manifest_path, verify
from cossl.pipelines.convert import convert


def ninety_pictures(root: Path) -> Path:
    """90 pictures in 3 classes, so 6 shards; three of them are left out."""
    for i in range(90):
        (root / f"class{i // 30}").mkdir(parents=True, exist_ok=True)
        (root / f"class{i // 30}" / f"{i:03}.jpg").write_bytes(encoded(picture(i, width=40 + i)) if i % 40 else b"no picture")
    return root


def undisturbed(folder: Path, out: Path) -> tuple[bytes, bytes]:
    """Beton and manifest, as one worker writes them undisturbed."""
    convert(folder, out, mode="proportion", num_workers=1, progress=False)
    assert verify(out, decode=None).num_decoded == 87
    return out.read_bytes(), manifest_path(out).read_bytes()


def content(out: Path) -> tuple[bytes, bytes]:
    """What lies under the final names, which must be all there is."""
    assert sorted(path.name for path in out.parent.iterdir()) == [out.name, manifest_path(out).name]
    return out.read_bytes(), manifest_path(out).read_bytes()
