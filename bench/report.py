"""From measured times to rows, a table, a ledger and a picture."""

import datetime
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from vqfast.testing.timing import Times, ratio

ROOT = Path(__file__).resolve().parent.parent
LEDGER = Path(__file__).resolve().parent / "results"


class Row(NamedTuple):
    """One measured contestant on one case. Times in ms of a call, or of one `unit`; `ratios` are
    times faster than each peer.
    """

    measure: str
    case: str
    dtype: str
    contestant: str
    ours: bool
    p50: float | None = None
    p20: float | None = None
    p80: float | None = None
    gb_s: float | None = None
    gflop_s: float | None = None
    roofline: float | None = None  # part of the measured ceiling, 1 = on it
    ratios: Mapping[str, float] = {}
    note: str = ""
    extra_mib: float | None = None  # peak memory of one call beyond what was there
    misses: Mapping[str, float] = {}  # a search: part of the rows that miss, by kind of data
    unit: str = ""  # "step" of a decoding, "run" of a process
    tokens: int | None = None  # drawn for each sequence in one call,
    of_tokens: int | None = None  # of so many of an image
    tokens_s: float | None = None
    images_s: float | None = None
    of_read: float | None = None  # part of read_gb_s that reading each weight once per step takes
    read_gb_s: float | None = None  # streaming reads, in the same rounds
    quality: Mapping[str, float] = {}  # of a packed model, as quality.py says


def rows_of(
    measure: str,
    case: str,
    dtype: str,
    times: Mapping[str, Times],
    ours: set[str],
    cost: tuple[float, float] | None,
    ceiling: Any = None,
    notes: Mapping[str, str] | None = None,
) -> list[Row]:
    """One row per contestant; a row of ours carries its ratio to every opponent."""
    rows = []
    for name, t in times.items():
        figures: dict[str, Any] = {}
        if cost is not None:
            moved, flops = cost
            figures = {"gb_s": moved / t.p50 / 1e9, "gflop_s": flops / t.p50 / 1e9}
            if ceiling is not None:
                figures["roofline"] = ceiling.seconds(moved, flops) / t.p50
        if name in ours:
            peers = {n: ratio(t, other) for n, other in times.items() if n not in ours}
            figures["ratios"] = dict(sorted(peers.items(), key=lambda p: p[1]))
        at = (t.p50 * 1e3, t.p20 * 1e3, t.p80 * 1e3)
        note = (notes or {}).get(name, "")
        rows.append(Row(measure, case, dtype, name, name in ours, *at, **figures, note=note))
    return rows


_HEAD = (
    "case", "dtype", "contestant", "p50 [p20-p80] ms", "tokens/s", "images/s", "% of read GB/s",
    "GB/s", "GFLOP/s", "% roof", "+MiB", "misses", "nats", "loss", "agreement", "divergence",
    "ours is",
)  # fmt: skip

_QUALITY = {"nats": ".4f", "loss": "+.3%", "agreement": ".2%", "divergence": ".5f"}


def table(rows: list[Row]) -> str:
    """Aligned text, one block per measure. `ours is`: times faster than each opponent, said beside
    the opponent where there is one contestant of ours; `misses`: rows of a search whose code is not
    the nearest, by kind of data.
    """
    lines: list[str] = []
    rows = [_split(r, rows) for r in rows]
    for measure in dict.fromkeys(r.measure for r in rows):
        unit = next(r.unit for r in rows if r.measure == measure)
        cells = [tuple(f"{h} per {unit}" if unit and h.endswith("ms") else h for h in _HEAD)]
        for r in rows:
            if r.measure == measure:
                cells.append(_cells(r))
        shown = [i for i in range(len(_HEAD)) if any(c[i] not in ("-", "") for c in cells[1:])]
        widths = [max(len(c[i]) for c in cells) for i in shown]
        lines.append(f"== {measure}")
        for c in cells:
            columns = zip((c[i] for i in shown), widths, strict=True)
            lines.append("  ".join(v.ljust(w) for v, w in columns).rstrip())
    return "\n".join(lines)


def _split(r: Row, rows: list[Row]) -> Row:
    """A row with the ratios that it should show. Those of a sole contestant of ours move to the
    rows of its peers, each as a ratio to "": six in one line would not be legible.
    """
    together = [x for x in rows if x[:3] == r[:3]]  # measure, case, dtype
    ours = [x for x in together if x.ours]
    if len(ours) != 1 or not set(ours[0].ratios) <= {x.contestant for x in together}:
        return r
    own = ours[0].ratios.get(r.contestant)
    return r._replace(ratios={} if own is None else {"": own})


def _cells(r: Row) -> tuple[str, ...]:
    def figure(x: float | None, form: str) -> str:
        return "-" if x is None else format(x, form)

    part = r.tokens is not None and r.of_tokens is not None and r.tokens < r.of_tokens
    capped = f"first {r.tokens} of {r.of_tokens} tokens" if part else ""
    ratios = ", ".join(f"{x:.2f}x {name}".rstrip() for name, x in r.ratios.items())
    return (
        r.case,
        r.dtype,
        r.contestant,
        "-" if r.p50 is None else f"{r.p50:.4g} [{r.p20:.4g}-{r.p80:.4g}]",
        figure(r.tokens_s, ".4g"),
        ("<" if capped else "") + figure(r.images_s, ".3g"),  # later tokens take longer
        "-" if r.of_read is None else f"{100 * r.of_read:.0f} of {r.read_gb_s:.4g}",
        figure(r.gb_s, ".3g"),
        figure(r.gflop_s, ".4g"),
        figure(None if r.roofline is None else 100 * r.roofline, ".0f"),
        figure(r.extra_mib, ".1f"),
        ", ".join(f"{kind} {100 * x:.2g} %" for kind, x in r.misses.items()),
        *(figure(r.quality.get(name), form) for name, form in _QUALITY.items()),
        "; ".join(x for x in (ratios, capped, r.note) if x),
    )


def _git(*words: str) -> str:
    """What git prints; empty when it fails or is not there."""
    try:
        done = subprocess.run(
            ["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()


def commit(ref: str = "HEAD") -> str:
    """Short hash of a commit; for HEAD "+" when tracked files differ. "unknown" without git."""
    found = _git("rev-parse", "--short", ref) or "unknown"
    return found + ("+" if ref == "HEAD" and _git("status", "--porcelain", "-uno") else "")


def record(
    rows: list[Row],
    environment: Mapping[str, Any],
    peers: Mapping[str, str],
    gate: str,
    ceilings: Mapping[str, Any] | None = None,
) -> dict:
    """What the last line and the ledger hold: figures with all that is needed to believe them.
    `ceilings`: the measured roofline of each dtype.
    """
    return {
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "command": " ".join(["python", "bench/run.py", *sys.argv[1:]]),
        "gate": gate,
        "environment": dict(environment),
        "peers": dict(peers),
        "ceilings": {k: c._asdict() for k, c in (ceilings or {}).items()},
        "rows": [{k: v for k, v in r._asdict().items() if v not in (None, "", {})} for r in rows],
    }


def append(suite: str, line: dict) -> Path:
    """One line more in the ledger of a suite."""
    LEDGER.mkdir(exist_ok=True)
    path = LEDGER / f"{suite}.jsonl"
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")
    return path
