"""The files of `cossl sweep collect`: whole, with every number, whatever names the settings have."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from finished_sweeps import HEADS, NASTY, PROTOCOL, cells, crossed_sweep, nasty_sweep, point, rows_of, sweep_of

from cossl.models.flags import sealed
from cossl.slurm.collect import as_latex, as_markdown, collect, tables, write
from cossl.slurm.figures import draw_accuracy
from cossl.slurm.outcomes import Collected


@pytest.fixture
def crossed(tmp_path: Path) -> Collected:
    return crossed_sweep(tmp_path)


@pytest.fixture
def nasty(tmp_path: Path) -> Collected:
    return nasty_sweep(tmp_path)


def test_the_csv_has_a_line_a_point_and_every_number(crossed: Collected) -> None:
    rows = rows_of(crossed)
    assert len(rows) == 48
    fixed = "seed state linear_top1 knn_top1 untrained_linear_top1 untrained_knn_top1 pixels_linear_top1 pixels_knn_top1 images_per_s"
    rest = "seconds collapsed std rank device hardware torch code_version protocol run identity"
    assert list(rows[0]) == ["preset", "data", "local_head", "local_to_global", *fixed.split(), *rest.split()]
    row = rows[2]
    assert (row["preset"], row["data"], row["local_head"], row["local_to_global"], row["seed"]) == (
        "in1k",
        "/data/in1k",
        "conv1x1",
        "0.5",
        "0",
    )
    numbers = [float(row[name]) for name in fixed.split()[2:]]
    assert numbers == [42.0, 40.0, 20.5, 14.0, 15.25, 13.0, 2000.0]
    assert [row[n] for n in rest.split()[:8]] == ["170.2", "False", "0.9", "30.0", "cpu", "Xeon", "2.11.0", "0.1.0+gabc"]
    assert json.loads(row["protocol"]) == PROTOCOL
    assert Path(row["run"]) == crossed.outcomes[2].run_dir
    assert {row["state"] for row in rows if row["linear_top1"] == ""} == {"failed"}


def test_two_varied_keys_are_crossed_for_each_preset(crossed: Collected) -> None:
    every, *two = tables(crossed)
    assert every.groups == [("", 2), ("in1k", 3), ("in100", 3)]
    assert [table.columns for table in two] == [["local_head", "0.2", "0.5", "0.8"]] * 2
    linear = {tuple(cell.text for cell in row[:2]): (row[2], row[5]) for row in every.rows}
    for preset, table in enumerate(two):
        for row in table.rows:
            assert row[1:] == [linear[row[0].text, weight][preset] for weight in ("0.2", "0.5", "0.8")]
    assert two[0].rows[2][2].text == "— failed"
    assert two[0].rows[1][3].text == "50.0 (1 of 2)"


def test_a_setting_that_a_preset_has_not_is_empty_there(tmp_path: Path) -> None:
    points = [point({"model.local_head": head}, 0, "a") for head in HEADS] + [point({"model.local_head": HEADS[0]}, 0, "b")]
    markdown = as_markdown(collect(sweep_of(tmp_path, *points)))
    assert cells(markdown, "mlp2") == ["— missing", "— missing", "—", "", "", ""]
    assert cells(markdown, "conv1x1")[3:] == ["— missing", "— missing", "—"]


def test_any_name_comes_back_from_the_csv(nasty: Collected) -> None:
    rows = rows_of(nasty)
    assert [row["local_head"] for row in rows] == list(NASTY) * 2
    assert {row["device"] for row in rows} == {"a_b|c%"}


def test_any_name_leaves_the_markdown_whole(nasty: Collected) -> None:
    lines = [line for line in as_markdown(nasty).splitlines() if line.startswith("| ")]
    assert len(lines) == len(NASTY) + 2
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {8}
    assert len({len(line) for line in lines}) == 1
    text = "\n".join(lines)
    for escaped in (r"a\|b", r"\_x\_", r"\&amp;", r"\$5 and \$6", r"\*\[2pt\]", r"\<b\>", "two lines"):
        assert escaped in text
    assert "local_head" in text


def test_any_name_leaves_the_latex_whole(nasty: Collected) -> None:
    text = as_latex(nasty)
    body = "\n".join(line for line in text.splitlines() if not line.startswith("%"))
    bare = re.sub(r"\\[&%$#_{}]", "", body)
    assert bare.count("{") == bare.count("}")
    depth = 0
    for character in bare:
        depth += {"{": 1, "}": -1}.get(character, 0)
        assert depth >= 0
    assert not re.search(r"[%#~<>|]", bare)
    assert set(re.findall(r"\^.{8}", bare)) <= {r"^\dagger"}
    assert "_" not in bare
    assert bare.count("$") == 2 * body.count(r"$\pm$") + 2 * body.count("dagger$")
    rows = [line for line in bare.splitlines() if line.endswith(r"\\")]
    assert len(rows) == 2 + len(NASTY)
    assert {line.count("&") + 2 * line.count("multicolumn") for line in rows} == {6}
    assert not re.search(r"\\\\\s*[\[*]", body)
    assert body.count(r"\begin{") == body.count(r"\end{")
    for escaped in (r"a\textbar{}b", r"\_x\_", r"100\%", r"a \& b", r"\$5", r"\#1", r"\{\}", r"\textasciitilde{}", "-{}-x", "{*}{[}2pt{]}"):
        assert escaped in body


def test_latex_has_the_cells_of_the_markdown(crossed: Collected) -> None:
    text = as_latex(crossed)
    assert r"local\_head & local\_to\_global & linear & 20-NN & images/s & linear & 20-NN & images/s \\" in text
    assert r" &  & \multicolumn{3}{c}{in1k} & \multicolumn{3}{c}{in100} \\" in text
    assert r"\cmidrule(lr){3-5}\cmidrule(lr){6-8}" in text
    assert r"mlp3 & 0.5 & --- failed & --- failed & --- &" in text
    assert r"\textbf{62.5 $\pm$ 0.7}" in text


def test_the_folder_gets_every_file_and_no_part_of_one(crossed: Collected, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra log is missing")
    out = tmp_path / "out" / "deep"
    said = write(crossed, out)
    assert {path.name for path in out.iterdir()} == {"results.csv", "table.md", "table.tex", "accuracy.png", "speed.png"}
    assert said == (out / "table.md").read_text()


def test_without_matplotlib_the_tables_are_there_and_a_line_says_what_installs_it(
    crossed: Collected, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    said = write(crossed, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"results.csv", "table.md", "table.tex"}
    assert said.splitlines()[-1] == "no accuracy.png, no speed.png: matplotlib is missing, pip install -c constraints.txt -e '.[log]'"


def test_a_figure_that_fails_leaves_the_one_before(crossed: Collected, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = pytest.importorskip("matplotlib.figure", reason="the extra log is missing").Figure
    draw_accuracy(crossed, tmp_path / "accuracy.png")
    before = (tmp_path / "accuracy.png").read_bytes()

    def half(self: Any, path: Path, **_: Any) -> None:
        path.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(figure, "savefig", half)
    with pytest.raises(OSError, match="no space"):
        write(crossed, tmp_path)
    assert (tmp_path / "accuracy.png").read_bytes() == before
    assert (tmp_path / "table.md").read_text() == as_markdown(crossed)


def test_a_sweep_is_collected_without_torch(tmp_path: Path) -> None:
    (tmp_path / "heads").mkdir()
    (tmp_path / "heads" / "sweep.json").write_text(json.dumps(sealed({"points": [point({})._asdict()]})))
    code = (
        "import sys, pathlib\n"
        "from cossl.slurm.folder import read_sweep\n"
        "from cossl.slurm.collect import collect, write\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "write(collect(read_sweep(folder)), folder)\n"
        "print(sorted({'torch', 'cossl.train', 'submitit'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "heads")], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert (tmp_path / "heads" / "table.md").exists()
