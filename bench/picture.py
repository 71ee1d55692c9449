"""A PNG of measured rows: python bench/picture.py bench/results/micro.jsonl OUT.png [--measure M]

Left the measured roofline with every contestant, then the part of the read bandwidth that decoding
reaches, right how many times faster ours is than each opponent; panels without rows are left out.
Of a ledger, the newest figure of each row on the device of its
last line counts. `bench/run.py --plot` draws what it has just measured.
"""

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_COLOURS = (
    "#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#775511", "#ee8866",
    "#44bb99", "#999933", "#332288", "#882255",
)  # fmt: skip
_STYLES = ("-", "--", ":")  # of the ceilings by dtype
_MARKERS = "sD^vPX<>hdp8"
_OURS = "black"
_ROW_INCHES = 0.3


def newest(ledger: list[dict]) -> dict:
    """One record with the newest race of each case on the device of the last line.

    Raises:
        ValueError: the ledger is empty.
    """
    if not ledger:
        raise ValueError("the ledger holds no line")
    device = ledger[-1]["environment"]["device"]
    races: dict[tuple, list[dict]] = {}
    ceilings: dict[str, Any] = {}
    for line in ledger:
        if line["environment"]["device"] == device:
            ceilings |= line.get("ceilings", {})
            raced: dict[tuple, list[dict]] = {}
            for row in line["rows"]:
                raced.setdefault((row["measure"], row["case"], row["dtype"]), []).append(row)
            for key, race in raced.items():
                # opponents of a decoding have races of their own formats, where ours may be absent
                kept = [] if any(r["ours"] for r in race) else races.get(key, [])
                races[key] = [r for r in kept if r["ours"]] + race
    return {
        **ledger[-1],
        "rows": [r for race in races.values() for r in race],
        "ceilings": ceilings,
    }


def draw(record: Mapping[str, Any], path: Path) -> None:
    """Writes the PNG of a record as report.record makes it. ValueError when it has no row."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = record["rows"]
    ours = [r for r in rows if r.get("ratios")]
    if not rows:
        raise ValueError("nothing to draw: no row was measured")
    peers = sorted({r["contestant"] for r in rows if not r["ours"]})
    looks = {n: (_COLOURS[i % 12], _MARKERS[i % 12]) for i, n in enumerate(peers)}
    points = [r for r in rows if r.get("gflop_s") and r.get("gb_s")]
    reads = [r for r in rows if r["ours"] and r.get("of_read")]
    height = max(5.0, 2.2 + _ROW_INCHES * max(len(ours), len(reads)))
    panels = bool(points) + bool(reads) + bool(ours)
    if not panels:
        raise ValueError("nothing to draw: no row has an opponent or a cost")
    width = (8.5, 13.0, 19.0)[panels - 1]
    figure, axes = plt.subplots(
        1, panels, figsize=(width, height), squeeze=False, layout="constrained"
    )
    at = list(axes[0])
    if points:
        numbers = {_key(r): i + 1 for i, r in enumerate(ours)}  # as on the lines of the other panel
        _roofline(at.pop(0), points, record.get("ceilings", {}), looks, numbers)
    if reads:
        _reads(at.pop(0), reads, rows, looks)
    if ours:
        _ratios(at.pop(0), ours, rows, looks)
    _legend(figure, rows, looks, record.get("ceilings", {}) if points else {})
    where = record["environment"]
    threads = f"{where['threads']} thread" + "s" * (where["threads"] != 1)
    figure.suptitle(
        f"{where['device']}, {threads}, torch {where['torch']}, commit {record['commit']}",
        fontsize=10,
    )
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _key(row: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(row[k] for k in ("measure", "case", "dtype", "contestant"))


def _misses(row: Mapping[str, Any]) -> bool:
    return any(x > 0 for x in row.get("misses", {}).values())


def _face(row: Mapping[str, Any], colour: str) -> str:
    """Hollow for a search that misses rows."""
    return "none" if _misses(row) else colour


def _roofline(
    axes: Any, rows: list[dict], ceilings: Mapping, looks: Mapping, numbers: Mapping
) -> None:
    """GFLOP/s over flops per byte; a line for each dtype whose ceilings were measured."""
    intensity = [r["gflop_s"] / r["gb_s"] for r in rows]
    low, high = min(intensity) / 3, max(intensity) * 3
    for style, (_, top) in zip(_STYLES, sorted(ceilings.items()), strict=False):
        knee = top["gemm"] / top["read"]
        x = sorted({low, min(max(knee, low), high), high})
        y = [min(top["gemm"], i * top["read"]) / 1e9 for i in x]
        axes.plot(x, y, color="0.3", linestyle=style, linewidth=1.2, zorder=1)
    for i, r in zip(intensity, rows, strict=True):
        colour, marker = (_OURS, "*") if r["ours"] else looks[r["contestant"]]
        axes.plot(
            i, r["gflop_s"], marker=marker, color=colour, markerfacecolor=_face(r, colour),
            markersize=11 if r["ours"] else 6, linestyle="none", zorder=3 if r["ours"] else 2,
        )  # fmt: skip
        if _key(r) in numbers:
            axes.annotate(
                str(numbers[_key(r)]), (i, r["gflop_s"]), xytext=(6, 4),
                textcoords="offset points", fontsize=8,
            )  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(low, high)
    _plain_ticks(axes.xaxis, *axes.get_xlim())
    _plain_ticks(axes.yaxis, *axes.get_ylim())
    axes.set_xlabel("useful flops per byte of input and output")
    axes.set_ylabel("useful GFLOP/s")
    axes.set_title("Measured roofline", fontsize=11)
    axes.grid(True, which="major", color="0.9")
    axes.set_axisbelow(True)


def _reads(axes: Any, ours: list[dict], rows: list[dict], looks: Mapping) -> None:
    """One line per case and precision: ours, and the opponents in the same format."""
    for y, r in enumerate(ours):
        axes.plot(100 * r["of_read"], y, "*", color=_OURS, markersize=11, zorder=3)
        for peer in rows:
            if not peer["ours"] and _key(peer)[:3] == _key(r)[:3] and peer.get("of_read"):
                colour, marker = looks[peer["contestant"]]
                axes.plot(100 * peer["of_read"], y, marker=marker, color=colour, markersize=7)
    axes.axvline(100, color="0.3", linewidth=1)
    axes.set_xlim(0, max(105, *(105 * r["of_read"] for r in rows if r.get("of_read"))))
    axes.set_yticks(range(len(ours)), [f"{r['case']} {r['dtype']}" for r in ours], fontsize=8)
    axes.set_ylim(len(ours) - 0.5, -0.5)
    axes.set_title("Reading each weight once per step", fontsize=11)
    axes.set_xlabel("% of the read bandwidth measured in the same rounds")
    axes.grid(True, color="0.9")
    axes.set_axisbelow(True)


def _ratios(axes: Any, ours: list[dict], rows: list[dict], looks: Mapping) -> None:
    """One line per case: a mark for each opponent, the figure of the best of them beside it."""
    by_key = {_key(r): r for r in rows}
    many = {k: len({r[k] for r in ours}) > 1 for k in ("measure", "dtype", "contestant")}
    labels = []
    for y, r in enumerate(ours):
        name = [r["case"]] + [r[k] for k in ("dtype", "contestant") if many[k]]
        name = [r["measure"], *name] if many["measure"] else name
        labels.append(f"{' '.join(name)}  {y + 1}")
        for peer, x in r["ratios"].items():
            colour, marker = looks[peer]
            theirs = by_key.get((r["measure"], r["case"], r["dtype"], peer), {})
            axes.plot(
                x, y, marker=marker, color=colour, markerfacecolor=_face(theirs, colour),
                markersize=7, linestyle="none",
            )  # fmt: skip
        best = min(r["ratios"].values())
        axes.annotate(
            f"{best:.2f}x", (1.01, y), xycoords=("axes fraction", "data"), va="center", fontsize=8
        )
    top = max(x for r in ours for x in r["ratios"].values())
    least = min(x for r in ours for x in r["ratios"].values())
    axes.set_xscale("log")
    axes.set_xlim(min(0.5, least / 1.5), max(4.0, top * 1.5))
    _plain_ticks(axes.xaxis, *axes.get_xlim())
    axes.axvline(1, color="0.3", linewidth=1)
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    measures = sorted({r["measure"] for r in ours})
    what = measures[0] if len(measures) == 1 else f"{len(measures)} measures"
    axes.set_title(f"{what}: time of the opponent / ours (right: the best of them)", fontsize=11)
    axes.set_xlabel("times as fast as the opponent, in interleaved rounds")
    axes.grid(True, color="0.9")
    axes.set_axisbelow(True)


def _plain_ticks(axis: Any, low: float, high: float) -> None:
    """Labels 1, 2, 5, 10, ... on a logarithmic axis; 1, 10, 100, ... when that were too many."""
    steps = (1, 2, 5) if high / low < 2000 else (1,)
    ticks = [s * 10.0**e for e in range(-9, 10) for s in steps]
    shown = [t for t in ticks if low <= t <= high]
    axis.set_ticks(shown, [f"{t:g}" for t in shown], fontsize=8)
    axis.set_ticks([], minor=True)


def _legend(figure: Any, rows: list[dict], looks: Mapping, ceilings: Mapping) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], marker="*", color=_OURS, markersize=11, linestyle="none")]
    names = ["vqfast"]
    for name, (colour, marker) in looks.items():
        handles.append(Line2D([], [], marker=marker, color=colour, linestyle="none"))
        names.append(name)
    if any(map(_misses, rows)):
        hollow = {"marker": "o", "color": "0.3", "markerfacecolor": "none", "linestyle": "none"}
        handles.append(Line2D([], [], **hollow))
        names.append("hollow: misses some nearest codes")
    for style, (dtype, top) in zip(_STYLES, sorted(ceilings.items()), strict=False):
        handles.append(Line2D([], [], color="0.3", linestyle=style, linewidth=1.2))
        names.append(f"{dtype}: {top['gemm'] / 1e9:.0f} GFLOP/s, {top['read'] / 1e9:.0f} GB/s")
    figure.legend(handles, names, loc="outside lower center", ncols=5, fontsize=8, frameon=False)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("ledger", type=Path)
    parser.add_argument("png", type=Path)
    parser.add_argument("--measure", help="only rows of this measure")
    args = parser.parse_args()
    try:
        record = newest([json.loads(line) for line in args.ledger.read_text().splitlines()])
        rows = [r for r in record["rows"] if args.measure in (None, r["measure"])]
        draw({**record, "rows": rows}, args.png)
    except (OSError, ValueError) as error:
        print(f"picture: {error}", file=sys.stderr)
        return 2
    print(f"drawn: {args.png}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
