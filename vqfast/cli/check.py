"""`vqfast check`: every kernel against its reference, on this machine's devices."""

import argparse

import torch
from tqdm import tqdm

from vqfast import ops
from vqfast.cli._models import choose_device
from vqfast.cli._parser import Report, UsageError
from vqfast.testing import Row, check_ops


def run(args: argparse.Namespace) -> Report:
    """Runs every case; exit code 1 if one fails. --device auto means the CPU and a GPU if there."""
    if args.op is not None and args.op not in ops.load_all():
        raise UsageError(f"--op must be one of {', '.join(ops.load_all())}, got {args.op}")
    if args.device == "auto":
        devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    else:
        devices = [str(choose_device(args.device))]
    rows: list[tuple[str, Row]] = []
    for device in devices:
        for row in tqdm(check_ops(device, args.op), desc=device, unit="case", disable=None):
            rows.append((device, row))
    failed = sum(not row.ok for _, row in rows)
    values = {
        "devices": devices,
        "passed": len(rows) - failed,
        "failed": failed,
        "rows": [{"device": device, **row._asdict()} for device, row in rows],
    }
    return Report(values, _table(rows, failed), 1 if failed else 0)


def _table(rows: list[tuple[str, Row]], failed: int) -> str:
    """One line per device, op and backend, then one per failure."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for device, row in rows:
        groups.setdefault((device, row.op, row.backend), []).append(row)
    lines = []
    for (device, op, backend), members in sorted(groups.items()):
        bad = sum(not row.ok for row in members)
        worst = max(row.error for row in members)
        verdict = f"{bad} FAILED" if bad else "ok"
        head = f"{device:<5}{op:<26}{backend:<10}{len(members):>4} cases"
        lines.append(f"{head}  worst {worst:8.3g}  {verdict}")
    for device, row in rows:
        if not row.ok:
            where = f"{device} {row.op} {row.case} {row.dtype} {row.backend}"
            lines.append(f"FAILED {where}: {row.reason}")
    lines.append(f"{len(rows) - failed} passed, {failed} failed")
    return "\n".join(lines)
