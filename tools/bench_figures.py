"""The figures of `cossl bench step`: rows and ratios from turns, the goals, and the table for people."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from cossl.tools.bench import spread
from cossl.tools.bench_peers import PEERS
from cossl.tools.bench_turns import OURS, Row, Work, percentile


def figures(row: Row, work: Work, best: dict[str, float], precision: str) -> dict[str, Any]:
    """The row of the JSON: medians, and over all turns the spread; what does not apply is None."""
    rate, trains = spread(row.rates), row.name == OURS and not row.source.endswith("alone")
    periods = [1e3 * period for turn in row.turns for period in turn.periods]
    step, wait = spread(periods), spread([sum(turn.waits) / sum(turn.periods) for turn in row.turns])
    per_s, eager = rate.median / row.batch_size, row.mode == "eager"
    tflops, moved = per_s * work.flops / 1e12, per_s * (work.all_bytes if eager else work.product_bytes) / 1e9
    ceiling = best[f"matmul_{'fp32' if precision == 'fp32' else 'bf16'}_tflops"]
    return {
        "name": row.name,
        "source": row.source,
        "mode": row.mode,
        "batch_size": row.batch_size,
        "images_per_s": round(rate.median, 2),
        "step_ms": round(step.median, 3),
        "step_p95_ms": round(percentile(periods, 0.95), 3),
        "data_wait_share": None if row.source.endswith("alone") else round(wait.median, 4),
        "loop_wait_share": round(spread([turn.loop_wait_s / turn.seconds for turn in row.turns]).median, 4),
        "peak_mib": round(max(turn.peak_mib for turn in row.turns), 1),
        "tflops": round(tflops, 4) if trains else None,
        "mfu": round(tflops / ceiling, 4) if trains else None,
        "gb_per_s": round(moved, 2) if trains else None,
        "gb_per_s_counts": None if not trains else "all operations" if eager else "products and convolutions, the least",
        "of_copy": round(moved / best["copy_gb_per_s"], 4) if trains else None,
        "recompiled": sum(turn.recompiled for turn in row.turns),
        "n": len(row.turns),
        "steps": len(periods),
        "spread": {
            "images_per_s": [round(rate.low, 2), round(rate.high, 2)],
            "step_ms": [round(step.low, 3), round(step.high, 3)],
            "data_wait_share": None if row.source.endswith("alone") else [round(wait.low, 4), round(wait.high, 4)],
        },
        "turns": [round(value, 2) for value in row.rates],
    }


def ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per batch size: overlap efficiency, what a costless loader would gain, compiled over eager, augmentation's share, ours over a peer.

    Each is taken turn by turn. Overlap efficiency is end-to-end over the slower of loader alone and step alone, in pictures per second.
    """
    found = []
    for size in dict.fromkeys(row["batch_size"] for row in rows):
        rates = {(row["name"], row["source"], row["mode"]): row["turns"] for row in rows if row["batch_size"] == size}

        def add(name: str, mode: str, of: Callable[..., float], *keys: tuple[str, str, str], size: int = size, rates: Any = rates) -> None:
            if all(key in rates for key in keys):
                value = spread(taken := [of(*turn) for turn in zip(*(rates[key] for key in keys), strict=False)])
                entry = {"name": name, "mode": mode, "batch_size": size, "median": round(value.median, 4), "n": len(taken)}
                found.append(entry | {"spread": [round(value.low, 4), round(value.high, 4)]})

        alone, colours = (OURS, "loader alone", "-"), (OURS, "augmentation alone", "-")
        for mode in ("eager", "compiled"):
            real, cached, step = ((OURS, source, mode) for source in ("loader", "cached", "synthetic"))
            add("overlap efficiency", mode, lambda e, a, s: e / min(a, s), real, alone, step)
            add("loader alone / step alone", mode, lambda a, s: a / s, alone, step)
            add("cached / real loader", mode, lambda c, e: c / e, cached, real)
            add("augmentation / step", mode, lambda s, a: s / a, step, colours)
            for source in ("loader", "synthetic") if mode == "compiled" else ():
                add(f"compiled / eager, {source}", mode, lambda c, e: c / e, (OURS, source, mode), (OURS, source, "eager"))
            for peer, source in itertools.product(PEERS, ("loader", "synthetic")):
                add(f"ours / {peer}, {source}", mode, lambda o, p: o / p, (OURS, source, mode), (peer, source, "eager"))
    return found


class Goal(NamedTuple):
    """A figure to reach on one H200, for CO-BYOL with RF99-ResNet50 and two views of 224 px, compiled, at the best batch size."""

    what: str
    key: str
    bound: float
    least: bool


GOALS = (
    Goal("images/s, real loader", "images_per_s", 2700, True),
    Goal("data-wait share", "data_wait_share", 0.03, False),
    Goal("ours / lightly, loader", "ours / lightly, loader", 3, True),
    Goal("augmentation / step", "augmentation / step", 0.02, False),
)


def judged(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Each goal, its figure and whether it is met; none where the goals are not meant: another card or another preset."""
    if "H200" not in str(report["machine"]["gpu"]) or report["settings"]["preset"] != "in1k":
        return []
    real = [row for row in report["rows"] if (row["name"], row["source"], row["mode"]) == (OURS, "loader", "compiled")]
    best = max(real, key=lambda row: row["images_per_s"], default={"batch_size": None})
    known = {
        **best,
        **{r["name"]: r["median"] for r in report["ratios"] if r["mode"] == "compiled" and r["batch_size"] == best["batch_size"]},
    }
    lightly = [r["median"] for r in report["ratios"] if (r["name"], r["mode"]) == ("ours / lightly, loader", "compiled")]
    known |= {"ours / lightly, loader": lightly[0]} if lightly else {}  # measured at the smallest batch size
    return [
        {"goal": f"{goal.what} {'at least' if goal.least else 'under'} {goal.bound:g}", "figure": figure, "met": _met(goal, figure)}
        for goal in GOALS
        for figure in [known.get(goal.key)]
    ]


def _met(goal: Goal, figure: float | None) -> bool | None:
    """None: not measured."""
    if figure is None:
        return None
    return figure >= goal.bound if goal.least else figure < goal.bound


def table(report: dict[str, Any]) -> Iterator[str]:
    """The report for people, line by line."""

    def shown(value: float | None, form: str, width: int) -> str:
        return f"{'-' if value is None else format(value, form):>{width}}"

    yield (
        f"{'batch':>5}  {'':<44}{'images/s':>10}{'from':>9}{'to':>9}{'step ms':>10}{'p95':>10}{'wait':>7}{'TFLOP/s':>9}{'MFU':>7}"
        f"{'GB/s':>8}{'peak MiB':>10}"
    )
    for row in report["rows"]:
        low, high = row["spread"]["images_per_s"]
        name = f"{row['name']}, {row['source']}" + (f", {row['mode']}" if row["mode"] != "-" else "")
        yield (
            f"{row['batch_size']:>5}  {name:<44}{row['images_per_s']:>10,.1f}{low:>9,.1f}{high:>9,.1f}{row['step_ms']:>10,.2f}"
            f"{row['step_p95_ms']:>10,.2f}{shown(row['data_wait_share'], '.1%', 7)}{shown(row['tflops'], '.3g', 9)}"
            f"{shown(row['mfu'], '.1%', 7)}{shown(row['gb_per_s'], ',.0f', 8)}{row['peak_mib']:>10,.0f}"
            + (f"  recompiled {row['recompiled']}x while timed" if row["recompiled"] else "")
        )
    for entry in report["missing"]:
        yield f"{entry['batch_size']:>5}  {entry['name']:<44}missing: {entry['install']}"
    for entry in report["failed"]:
        yield f"{entry['batch_size']:>5}  {entry['name']}, {entry['source']}, {entry['mode']} failed: {entry['reason']}"
    yield f"\n{'batch':>5}  {'ratios, by turn':<44}{'median':>10}{'from':>9}{'to':>9}"
    for ratio in report["ratios"]:
        low, high = ratio["spread"]
        yield f"{ratio['batch_size']:>5}  {ratio['name'] + ', ' + ratio['mode']:<44}{ratio['median']:>10.3f}{low:>9.3f}{high:>9.3f}"
    for goal in report["goals"]:
        verdict = {True: "met", False: "not met", None: "not measured"}[goal["met"]]
        yield f"goal: {goal['goal']:<44}{shown(goal['figure'], '.4g', 10)}  {verdict}"
    best, seen, settings = report["ceilings"], report["machine"], report["settings"]
    yield (
        f"\nceilings of this run: matrix product {best['matmul_bf16_tflops']:,.2f} TFLOP/s in bf16, {best['matmul_fp32_tflops']:,.2f} in "
        f"float32; copy {best['copy_gb_per_s']:,.1f} GB/s"
    )
    how = f"{settings['turns']} turns of {settings['steps']} steps, {settings['views']} views a picture, {settings['config']['precision']}"
    yield f"{how}; {settings['pictures']}"
    yield f"{seen['gpu'] or seen['cpu']}, {seen['cores']} cores, torch {seen['torch']}, {report['seconds']:.0f} s: $ {report['command']}"
