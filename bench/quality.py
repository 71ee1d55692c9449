"""The suite quality: what the small formats of the weights cost, on pictures held out of training.

Codes of the pictures are fed to the engine one by one, as in sampling, and each next code is held
against the logits before it, so cached attention and rounded activations count too. A row says

    nats        mean cross-entropy of the codes
    loss        the part by which that differs from float32's
    agreement   part of the codes at which the likeliest code is float32's
    divergence  mean over codes of KL(float32's distribution || this one), in nats

Cases: `held_out`, the pictures that the recipe (`--config`) keeps for validation, and `learned`,
as many as 400 of those that it trains on. The files come from `--data`, as in `vqfast train`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from micro import Gate, Options
from report import ROOT, Row
from torch import Tensor

import vqfast
from vqfast import Engine, Pipeline, config
from vqfast.data.source import Selection
from vqfast.train import codes
from vqfast.train.distributed import World
from vqfast.train.feed import open_sources
from vqfast.train.transformer import TransformerConfig

PRECISIONS = ("fp32", "bf16", "int8", "int4")
CASES = ("held_out", "learned")
GOALS = {"int8": 0.005, "int4": 0.02}  # most of |loss| on held-out pictures
MODEL = Path(vqfast.__file__).parent / "assets" / "emoji64"
RECIPE = ROOT / "configs" / "emoji64_transformer.yaml"
_LEARNED = 400  # of the pictures that were trained on
_ROWS = 40  # sequences at a time


def examples(
    pipe: Pipeline, recipe: str | Path, data: str | Path, case: str
) -> tuple[Tensor, Tensor]:
    """codes [n, T] and condition tokens [n, Tc] of the pictures of a case, on the CPU.

    Args:
        recipe: file of `vqfast train transformer`; it says what is held out.
        data: pictures, or what `vqfast encode` made of them.

    Raises:
        ValueError: the recipe holds nothing out, or the model is conditioned on pictures.
        DataError: the data cannot be read, or are codes of another tokenizer.
    """
    quoted = str(data).replace("'", "''")
    settings = config.load(recipe, [f"data.path='{quoted}'"], TransformerConfig)
    given = codes.are_codes(settings.data)
    parts: Any = (
        codes.given_codes(settings.data, pipe.tokenizer) if given else open_sources(settings.data)
    )
    part = parts[CASES.index(case) == 0]
    if part is None:
        raise ValueError(f"{recipe}: no picture of {data} is held out")
    most = len(part) if case == "held_out" else min(len(part), _LEARNED)
    some = np.arange(most) * len(part) // most  # spread evenly
    if given:
        found = part.select(some)
    else:
        encoder = codes.Encoder(pipe.tokenizer, None, World(0, 1, pipe.device))
        settings.data.size = settings.data.size or pipe.tokenizer.config.resolution
        found = codes.encode_pictures(Selection(part, some), settings.data, encoder, None)
    rows, kind = found.rows(torch.arange(len(found))), pipe.conditioning.kind
    if kind not in ("class", "sos"):
        raise ValueError(f"--model: conditioned on {kind!r}, the suite takes none or classes")
    cond = pipe.conditioning.encode(rows["label"] if kind == "class" else len(found))
    return rows["codes"], cond.cpu()


def logits(engine: Engine, idx: Tensor, cond: Tensor) -> Tensor:
    """Teacher forcing by the steps of sampling: idx [B, T], cond [B, Tc] -> [B, T, V] float64."""
    rows = [engine.prefill(cond)]
    rows += [engine.step(idx[:, t]) for t in range(idx.shape[1] - 1)]
    return torch.stack(rows, 1).double().cpu()


def figures(ours: Tensor, exact: Tensor, idx: Tensor) -> dict[str, float]:
    """Sums over the codes of a batch, by name, and their number.

    Args:
        ours: [B, T, V] logits. exact: those of float32. idx: [B, T] codes.
    """
    log_p, log_q = exact.log_softmax(-1), ours.log_softmax(-1)
    said = {
        "nats": F.cross_entropy(ours.flatten(0, 1), idx.flatten(), reduction="sum"),
        "exact_nats": F.cross_entropy(exact.flatten(0, 1), idx.flatten(), reduction="sum"),
        "agreement": (ours.argmax(-1) == exact.argmax(-1)).sum(),
        "divergence": (log_p.exp() * (log_p - log_q)).sum(),
    }
    return {name: float(value) for name, value in said.items()} | {"codes": idx.numel()}


def measure(
    gpt: torch.nn.Module, idx: Tensor, cond: Tensor, precisions: Sequence[str]
) -> dict[str, dict[str, float]]:
    """nats, loss, agreement and divergence by precision, on the device of the model."""
    totals: dict[str, dict[str, float]] = {name: {} for name in precisions}
    batch = min(len(idx), _ROWS)
    engines = {name: Engine(gpt, name, batch) for name in dict.fromkeys(["fp32", *precisions])}
    device = engines["fp32"].device
    for at in torch.arange(len(idx)).split(_ROWS):
        fed = (idx[at].to(device), cond[at].to(device))
        exact = logits(engines["fp32"], *fed)
        for name, total in totals.items():
            found = exact if name == "fp32" else logits(engines[name], *fed)
            for key, value in figures(found, exact, idx[at]).items():
                total[key] = total.get(key, 0.0) + value
    return {name: _means(total) for name, total in totals.items()}


def _means(total: Mapping[str, float]) -> dict[str, float]:
    n = total["codes"]
    return {
        "nats": total["nats"] / n,
        "loss": total["nats"] / total["exact_nats"] - 1,
        "agreement": total["agreement"] / n,
        "divergence": total["divergence"] / n,
    }


def run(
    options: Options,
    say: Callable[[str], None],
    *,
    data: str | Path | None,
    model: str | Path = MODEL,
    recipe: str | Path = RECIPE,
) -> Iterator[tuple[list[Row], dict[str, str]]]:
    """As micro.run.

    Raises:
        ValueError: no --data, unknown case, or data and model that do not suit. DataError,
        CheckpointError: what cannot be read. RefusedError: an op's checks fail.
    """
    if data is None:
        raise ValueError("the suite quality needs --data, the pictures of the recipe")
    if options.case not in (None, *CASES):
        raise ValueError(f"--case must be one of {', '.join(CASES)}, got {options.case!r}")
    Gate(options.device, options.gate, say).require(("decode_step", "sample_logits"))
    pipe = Pipeline.from_pretrained(model).to(options.device)
    for case in CASES if options.case is None else (options.case,):
        say(f"encoding {case}")
        idx, cond = examples(pipe, recipe, data, case)
        say(f"measuring {case}")
        found = measure(pipe.transformer, idx, cond, options.dtypes)
        note = f"{len(idx)} pictures of {idx.shape[1]} codes"
        note += "" if options.gate else ", UNVERIFIED"
        rows = []
        for name, said in found.items():
            more = note + _verdict(case, name, said)
            rows.append(Row("quality", case, name, "vqfast", True, quality=said, note=more))
        yield rows, {}


def _verdict(case: str, precision: str, said: Mapping[str, float]) -> str:
    """Whether the goal is reached, where there is one."""
    if case != "held_out" or precision not in GOALS:
        return ""
    goal = GOALS[precision]
    return f", {'within' if abs(said['loss']) <= goal else 'NOT within'} {100 * goal:g} %"
