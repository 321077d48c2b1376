"""Vector kernels compute what their formulas say, and compiled code never outlives the sources it was made from."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numba
import numpy as np
import pytest

from cossl.pipelines import simd
from cossl.pipelines.beton import Beton
from cossl.pipelines.ffcv_stock import require_ffcv
from cossl.pipelines.simd import address, compiled, kernel


@kernel(16)
def mixed(v, a, b, taps, out):  # type: ignore[no-untyped-def]
    x, y = v.load(a, 8), v.load(b, 16, signed=True)
    total = v.accumulate(taps, v.constant(5), lambda tap: v.load(v.offset(a, 1, tap), 8))
    v.store(v.interleave(x * 3 - y, ((total | 1) + 2).clamp(10, 600) >> 1), out, 32)


@compiled
def call_mixed(a, b, taps, out):  # type: ignore[no-untyped-def]
    mixed(address(a), address(b), taps, address(out))


def test_a_kernel_is_its_formula_on_every_lane() -> None:
    random = np.random.default_rng(0)
    a, b, out = random.integers(0, 256, 24, np.uint8), random.integers(-300, 300, 16).astype(np.int16), np.zeros(32, np.int32)
    call_mixed(a, b, 4, out)
    x = a.astype(int)
    total = 5 + sum(x[tap : tap + 16] for tap in range(4))
    np.testing.assert_array_equal(out[::2], x[:16] * 3 - b)
    np.testing.assert_array_equal(out[1::2], ((total | 1) + 2).clip(10, 600) >> 1)


def plus_one(x):  # type: ignore[no-untyped-def]
    return x + 1


def test_code_is_kept_for_the_next_process_until_any_source_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    for stamp, hits in (("before", None), ("before", 1), ("after", 0), ("after", 1)):
        monkeypatch.setattr(simd, "_sources", lambda stamp=stamp: stamp)
        function = compiled(plus_one)
        assert function(1) == 2
        if hits is not None:
            assert sum(function.stats.cache_hits.values()) == hits  # type: ignore[attr-defined]


def test_the_sources_are_all_files_with_compiled_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.py").write_text("@compiled\ndef f(): ...")
    (tmp_path / "b.py").write_text("no code of that kind")
    monkeypatch.setattr(simd, "__file__", str(tmp_path / "simd.py"))
    seen = []
    for change in ("@kernel(8)", "more"):
        seen.append(simd._sources.__wrapped__())
        (tmp_path / "b.py").write_text("still none")
        assert simd._sources.__wrapped__() == seen[-1]
        (tmp_path / "a.py").write_text(change + "@compiled")
    assert seen[0] != seen[1]


def test_leaving_in_the_middle_of_an_epoch_ends_the_process_cleanly(betons: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from cossl.pipelines import make_loader; from cossl.pipelines.batch import LoaderSpec\n"
        "from cossl.pipelines.views import byol; import torch; before = torch.get_num_threads()\n"
        "loader = make_loader('ffcv', Path(sys.argv[1]), LoaderSpec(byol(32), 8)); epoch = loader.epoch(0); batch = next(epoch)\n"
        "assert torch.get_num_threads() == before"
    )
    done = subprocess.run([sys.executable, "-c", code, str(betons / "train.beton")], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_stock_ffcv_reads_pages_and_leaves_numbas_types_as_they_were(betons: Path) -> None:
    """All code of a process shares one instance of each type: a changed one is not found again among the signatures compiled with it."""
    pytest.importorskip("ffcv")
    require_ffcv()
    from ffcv.memory_managers import OSCacheManager
    from ffcv.reader import Reader

    kind, beton = numba.uint8[::1], Beton(betons / "train.beton")
    manager = OSCacheManager(Reader(str(betons / "train.beton")))
    read = manager.compile_reader()
    assert kind.mutable
    assert kind is numba.typeof(np.empty(1, np.uint8))
    with manager.schedule_epoch(None) as context:
        assert read(np.uint64(beton.starts[0]), context.state).tobytes() == beton.payload(0).tobytes()
