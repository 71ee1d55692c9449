"""The suites model and train: whole networks, ours against other projects.

Measures and their inputs, which opponents get too:
    encode, decode      (tokenizer, data)   the opponent takes tokenizer.state_dict(), with taming's
        names
    train_tokenizer     (VQGANConfig, images, start)   one step of generator and discriminator that
        gives their losses by name; start holds the state dicts `vqgan`, `discriminator` and, in
        cases with a perceptual net, `perceptual`: a SqueezeNet with random weights
    train_transformer   (GPT, idx, cond)   forward, backward and AdamW, from copies of its weights
The gate is that of every op that the network runs on; then each contestant is held against plain
torch (agreement.py), and with --memory what a call takes is measured in a process of its own.
"""

import copy
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import baselines
import memory
import torch
from agreement import Judge, WrongResultError
from micro import DTYPES, Gate, Options, RefusedError
from report import Row, rows_of

from vqfast import GPT, VQGAN, GPTConfig, VQGANConfig
from vqfast.losses import LPIPS, NLayerDiscriminator
from vqfast.testing.timing import race
from vqfast.train.distributed import World
from vqfast.train.tokenizer import TokenizerConfig, TokenizerStage

_SMALL = {"ch": 32, "ch_mult": (1, 2, 2), "z_channels": 64, "embed_dim": 64, "resolution": 64}
_VQGANS = {  # id: config, batch, side
    "f16_256": (VQGANConfig(), 1, 256),
    "f16_256_batch4": (VQGANConfig(), 4, 256),
    "small_64": (VQGANConfig(attn_resolutions=(16,), n_embed=1024, **_SMALL), 8, 64),
}
GPTS = {  # gpt_small has 38 M parameters; 256 and 576 tokens are images of 16 x 16 and 24 x 24
    "gpt_336m": GPTConfig(16384, 256, n_layer=24, n_head=16, n_embd=1024),
    "gpt_small": GPTConfig(1024, 256, n_layer=12, n_head=8, n_embd=512),
    "gpt576_336m": GPTConfig(16384, 576, n_layer=24, n_head=16, n_embd=1024),
    "gpt576_775m": GPTConfig(16384, 576, n_layer=36, n_head=20, n_embd=1280),
    "gpt576_1b4": GPTConfig(16384, 576, n_layer=48, n_head=24, n_embd=1536),
}
_STEPS = {  # id: VQGAN, batch, side, SqueezeNet
    "f16_64": ("f16_256", 4, 64, False),
    "f16_64_squeeze": ("f16_256", 4, 64, True),
    "f16_256": ("f16_256", 1, 256, False),
    "f16_256_squeeze": ("f16_256", 1, 256, True),
    "small_64": ("small_64", 8, 64, False),
}
_TRAINED = {"gpt_336m": ("gpt_336m", 1), "gpt_336m_batch8": ("gpt_336m", 8)}
_TRAINED |= {"gpt_small": ("gpt_small", 1), "gpt_small_batch8": ("gpt_small", 8)}  # id: GPT, batch
_OPS = {
    "encode": ("group_norm_silu", "conv3x3", "nearest"),
    "decode": ("group_norm_silu", "conv3x3"),
    "train_tokenizer": (
        "group_norm_silu",
        "conv3x3",
        "conv3x3_weight",
        "conv_few",
        "conv_few_input",
        "conv_few_weight",
        "nearest",
        "straight_through",
        "quantize",
    ),  # fmt: skip
    "train_transformer": ("causal_attention", "cross_entropy"),
}
MEASURES = tuple(_OPS)


class Case(NamedTuple):
    """A network of a suite: what is measured on it, and the inputs by dtype."""

    id: str
    measure: str
    inputs: Callable[[], tuple]


def _images(batch: int, side: int) -> torch.Tensor:
    return torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1


def _tokenizer_inputs(name: str, measure: str) -> tuple:
    config, batch, side = _VQGANS[name]
    torch.manual_seed(0)
    model = VQGAN(config).eval().requires_grad_(False)
    if measure == "encode":
        return model, _images(batch, side)
    at = side // config.factor
    g = torch.Generator().manual_seed(1)
    return model, torch.randint(config.n_embed, (batch, at, at), generator=g)


def _train_inputs(name: str) -> tuple:
    model, batch, side, squeeze = _STEPS[name]
    config = _VQGANS[model][0]
    torch.manual_seed(0)
    start = {"vqgan": VQGAN(config), "discriminator": NLayerDiscriminator()}
    if squeeze:
        start["perceptual"] = LPIPS(net="squeeze")
    return config, _images(batch, side), {k: v.state_dict() for k, v in start.items()}


def _gpt_inputs(name: str) -> tuple:
    model, batch = _TRAINED[name]
    config, g = GPTS[model], torch.Generator().manual_seed(2)
    cond = torch.randint(8, (batch, 1), generator=g)
    idx = torch.randint(config.vocab_size, (batch, 256), generator=g)
    torch.manual_seed(0)
    return GPT(config), idx, cond


def cases(suite: str) -> list[Case]:
    """The cases of a suite."""
    found = []
    if suite == "model":
        for name in _VQGANS:
            for m in ("encode", "decode"):
                found.append(Case(name, m, lambda n=name, m=m: _tokenizer_inputs(n, m)))
    if suite == "train":
        for name in _STEPS:
            found.append(Case(name, "train_tokenizer", lambda n=name: _train_inputs(n)))
        for name in _TRAINED:
            found.append(Case(name, "train_transformer", lambda n=name: _gpt_inputs(n)))
    return found


# ---- ours


def _ours(case: Case, dtype: str, inputs: tuple, device: str) -> Callable[[], Any]:
    return globals()[f"_our_{case.measure}"](dtype, device, *inputs)


def _our_encode(dtype: str, device: str, model: VQGAN, images: torch.Tensor) -> Callable:
    model = copy.deepcopy(model).to(device, DTYPES[dtype])
    images = images.to(device, DTYPES[dtype])
    return torch.no_grad()(lambda: model.encode(images))


def _our_decode(dtype: str, device: str, model: VQGAN, codes: torch.Tensor) -> Callable:
    model, codes = copy.deepcopy(model).to(device, DTYPES[dtype]), codes.to(device)
    return torch.no_grad()(lambda: model.decode(codes))


def _our_train_tokenizer(
    dtype: str, device: str, config: VQGANConfig, images: torch.Tensor, start: dict[str, Any]
) -> Callable:
    squeeze = "perceptual" in start
    settings = TokenizerConfig(model=config)
    settings.data.size, settings.data.batch_size = images.shape[-1], len(images)
    settings.loss.perceptual_weight, settings.loss.disc_start = float(squeeze), 0
    settings.loss.perceptual_net, settings.loss.perceptual_weights = "squeeze", "random"
    settings.loss.perceptual_heads = "random"
    settings.train.precision = dtype
    stage = TokenizerStage(settings, World(0, 1, torch.device(device)), None)
    stage.model.load_state_dict(start["vqgan"])
    for name in start.keys() - {"vqgan"}:
        getattr(stage.loss, name).load_state_dict(start[name])
    batch = {"image": images}
    return lambda: stage.step(1, [batch])


def _our_train_transformer(
    dtype: str, device: str, gpt: GPT, idx: torch.Tensor, cond: torch.Tensor
) -> Callable:
    model = copy.deepcopy(gpt).to(device).train()
    optimizer = torch.optim.AdamW(model.decay_groups(), lr=1e-4, betas=(0.9, 0.95), fused=True)
    idx, cond = idx.to(device), cond.to(device)

    def step() -> torch.Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=dtype == "bf16"):
            loss = model.loss(idx, cond)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


# ---- the suites


def _work(case: Case, inputs: tuple) -> str:
    """What one call does, for the notes."""
    if case.measure == "train_transformer":
        return f"{inputs[1].numel()} tokens"
    return f"batch {len(inputs[1])}"


def contestant(
    name: str, measure: str, case_id: str, dtype: str, device: str = "cpu"
) -> Callable[[], Any]:
    """One contestant of a case, "vqfast" or an opponent, ready to run. StopIteration: no case."""
    suite = "train" if measure.startswith("train") else "model"
    case = next(c for c in cases(suite) if (c.measure, c.id) == (measure, case_id))
    inputs = case.inputs()
    if name == "vqfast":
        return _ours(case, dtype, inputs, device)
    return baselines.runner(name, measure, baselines.Told(case_id, dtype, device), inputs)


def run(
    suite: str, options: Options, say: Callable[[str], None]
) -> Iterator[tuple[list[Row], dict[str, str]]]:
    """As micro.run.

    Raises:
        ValueError: unknown case. RefusedError: an op's checks fail, or our network is wrong.
    """
    gate = Gate(options.device, options.gate, say)
    todo = [c for c in cases(suite) if options.takes(c.id)]
    if not todo:
        known = ", ".join(dict.fromkeys(c.id for c in cases(suite)))
        raise ValueError(f"--case must be one of {known}, got {options.case!r}")
    for case in todo:
        gate.require(_OPS[case.measure])
        inputs = case.inputs()
        judge = Judge(case.measure, inputs, options.device)
        for dtype in options.dtypes:
            yield _race(case, dtype, inputs, judge, options, say)
            torch.compiler.reset()  # what opponents compiled for this case


def _race(
    case: Case,
    dtype: str,
    inputs: tuple,
    judge: Judge,
    options: Options,
    say: Callable[[str], None],
) -> tuple[list[Row], dict[str, str]]:
    say(f"preparing {case.measure} {case.id} {dtype}")
    ours = _ours(case, dtype, inputs, options.device)
    try:
        judge.require(ours, dtype)
    except WrongResultError as error:
        raise RefusedError(f"{case.measure} {case.id} {dtype}: ours {error}") from None
    peers, missing = baselines.runners(
        case.measure,
        baselines.Told(case.id, dtype, options.device),
        inputs,
        options.device,
        chosen=lambda module: dtype in baselines.formats(module, case.measure),
        once=lambda peer: judge.require(peer, dtype),
    )
    say(f"timing {case.measure} {case.id} {dtype}")
    runs = {"vqfast": ours, **peers}
    times = race(
        runs,
        device=options.device,
        rounds=options.rounds,
        least_s=0.0,
        budget_s=options.budget_s,
        warm=True,
    )
    notes = {name: getattr(peer, "note", "") for name, peer in peers.items()}
    notes["vqfast"] = _work(case, inputs) + ("" if options.gate else ", UNVERIFIED")
    key = (case.measure, case.id, dtype)
    rows = rows_of(*key, times, {"vqfast"}, None, None, notes)
    if options.memory:
        say("the memory of a call")
        extra = {n: memory.extra_mib(*key, n, options.device, run) for n, run in runs.items()}
        rows = [r._replace(extra_mib=extra[r.contestant]) for r in rows]
    return rows, missing
