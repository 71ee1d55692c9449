"""`vqfast info`: versions, devices, instruction sets, and which backend each op takes and why."""

import argparse

import vqfast
from vqfast.cli._parser import Report


def run(args: argparse.Namespace) -> Report:
    """Collects; fails only if the package itself is broken."""
    values = vqfast.info()
    packages = [f"{k} {v}" for k, v in values["packages"].items() if v]
    lines = [
        f"vqfast {values['vqfast']}, Python {values['python']}, torch {values['torch']}",
        f"packages   {', '.join(packages)}",
        f"cpu        {values['cpu']['machine']}, {values['cpu']['cores']} cores, "
        f"{values['cpu']['threads']} threads, ISA {values['cpu']['isa']} "
        f"(has {', '.join(values['cpu']['isas']) or 'none'})",
        f"cuda       {', '.join(values['cuda']) or 'no device'}",
        f"native     cpu: {values['native']['cpu']}; cuda: {values['native']['cuda']}",
    ]
    if values["forced_backend"]:
        lines.append(f"forced     {values['forced_backend']}")
    for device, ops in values["ops"].items():
        for name, op in ops.items():
            against = [f"{k}: {why}" for k, why in op["reasons"].items() if why is not None]
            lines.append(f"{device:<5}{name:<26}{op['takes']:<11}{'; '.join(against)}")
    return Report(values, "\n".join(lines))
