"""The suites model, train and sample: whole networks, ours against other projects.

Measures and their inputs, which opponents get too:
    encode, decode      (tokenizer, data)        the opponent takes tokenizer.state_dict(), taming's
    names train_tokenizer     (VQGANConfig, images)    one step of generator and discriminator, no
    perceptual net train_transformer   (GPTConfig, idx, cond)   forward, backward and AdamW
    generate            (GPTConfig, cond, n)     n tokens with top-k 100, cache included
The gate is that of every op that the network runs on.
"""

import copy
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import baselines
import torch
from micro import DTYPES, Gate, Options, RefusedError
from report import Row, rows_of

from vqfast import GPT, VQGAN, Engine, GPTConfig, VQGANConfig, _dispatch, ops
from vqfast.testing.timing import race
from vqfast.train.distributed import World
from vqfast.train.tokenizer import TokenizerConfig, TokenizerStage

TOP_K = 100  # of the sampling suite: what taming's users type is 100 to 600

_SMALL = {"ch": 32, "ch_mult": (1, 2, 2), "z_channels": 64, "embed_dim": 64, "resolution": 64}
_VQGANS = {  # id: config, batch, side
    "f16_256": (VQGANConfig(), 1, 256),
    "small_64": (VQGANConfig(attn_resolutions=(16,), n_embed=1024, **_SMALL), 8, 64),
}
_GPTS = {  # id: config, batch, tokens: 336 M and 38 M parameters
    "gpt_336m": (GPTConfig(16384, 256, n_layer=24, n_head=16, n_embd=1024), 1, 32),
    "gpt_336m_batch8": (GPTConfig(16384, 256, n_layer=24, n_head=16, n_embd=1024), 8, 32),
    "gpt_small": (GPTConfig(1024, 256, n_layer=12, n_head=8, n_embd=512), 1, 64),
}
_OPS = {
    "encode": ("group_norm_silu", "nearest"),
    "decode": ("group_norm_silu",),
    "train_tokenizer": ("group_norm_silu", "nearest", "straight_through", "quantize"),
    "train_transformer": ("causal_attention", "cross_entropy"),
    "generate": ("decode_step", "sample_logits"),
}


class Case(NamedTuple):
    """A network of a suite: what is measured on it, and the inputs by dtype."""

    id: str
    measure: str
    inputs: Callable[[], tuple]


class Told(NamedTuple):
    """What an opponent is told of the case besides its inputs."""

    id: str
    dtype: str
    device: str


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
    config, batch, side = _VQGANS[name]
    return config, _images(batch, side)


def _gpt_inputs(name: str, measure: str) -> tuple:
    config, batch, n = _GPTS[name]
    g = torch.Generator().manual_seed(2)
    cond = torch.randint(8, (batch, 1), generator=g)
    if measure == "generate":
        return config, cond, n
    return config, torch.randint(config.vocab_size, (batch, 256), generator=g), cond


def cases(suite: str) -> list[Case]:
    """The cases of a suite."""
    found = []
    if suite == "model":
        for name in _VQGANS:
            for m in ("encode", "decode"):
                found.append(Case(name, m, lambda n=name, m=m: _tokenizer_inputs(n, m)))
    if suite == "train":
        for name in _VQGANS:
            found.append(Case(name, "train_tokenizer", lambda n=name: _train_inputs(n)))
    measure = {"train": "train_transformer", "sample": "generate"}.get(suite)
    if measure:
        for name in _GPTS:
            found.append(Case(name, measure, lambda n=name, m=measure: _gpt_inputs(n, m)))
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
    dtype: str, device: str, config: VQGANConfig, images: torch.Tensor
) -> Callable:
    settings = TokenizerConfig(model=config)
    settings.data.size, settings.data.batch_size = images.shape[-1], len(images)
    settings.loss.perceptual_weight, settings.loss.disc_start = 0.0, 0
    settings.train.precision = dtype
    stage = TokenizerStage(settings, World(0, 1, torch.device(device)), None)
    batch = {"image": images}
    return lambda: stage.step(1, [batch])


def _our_train_transformer(
    dtype: str, device: str, config: GPTConfig, idx: torch.Tensor, cond: torch.Tensor
) -> Callable:
    torch.manual_seed(0)
    model = GPT(config).to(device).train()
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


def _our_generate(dtype: str, device: str, config: GPTConfig, cond: torch.Tensor, n: int) -> Any:
    torch.manual_seed(0)
    model = GPT(config).eval().requires_grad_(False).to(device)
    engine = Engine(model, precision=dtype, batch=len(cond))
    cond = cond.to(device)
    return lambda: engine.generate(cond, n, seed=0, top_k=TOP_K)


# ---- the suites


def _work(case: Case, inputs: tuple) -> str:
    """What one call does, for the notes."""
    if case.measure == "generate":
        return f"{len(inputs[1])} x {inputs[2]} tokens"
    if case.measure == "train_transformer":
        return f"{inputs[1].numel()} tokens"
    return f"batch {len(inputs[1])}"


def _gate(gate: Gate, measure: str, device: str) -> None:
    """RefusedError unless the checks of all its ops pass on every native backend of the device."""
    known = ops.load_all()
    native = ("cuda", "triton") if device.startswith("cuda") else ("cpu",)
    for op in _OPS[measure]:
        for backend in native:
            if op in known and op in _dispatch.OPS and not gate.passes(op, backend, part=True):
                raise RefusedError("; ".join(f"{k}: {v}" for k, v in gate.refused.items()))


def run(
    suite: str, options: Options, say: Callable[[str], None]
) -> Iterator[tuple[list[Row], dict[str, str]]]:
    """As micro.run.

    Raises:
        ValueError: unknown case. RefusedError: an op's checks fail.
    """
    gate = Gate(options.device, options.gate, say)
    todo = [c for c in cases(suite) if options.case in (None, c.id)]
    if not todo:
        known = ", ".join(dict.fromkeys(c.id for c in cases(suite)))
        raise ValueError(f"--case must be one of {known}, got {options.case!r}")
    for case in todo:
        _gate(gate, case.measure, options.device)
        inputs = case.inputs()
        for dtype in options.dtypes:
            say(f"timing {case.measure} {case.id} {dtype}")
            ours = {"vqfast": _ours(case, dtype, inputs, options.device)}
            told = Told(case.id, dtype, options.device)
            peers, missing = baselines.runners(case.measure, told, inputs, options.device)
            times = race(
                {**ours, **peers},
                device=options.device,
                rounds=options.rounds,
                least_s=0.0,
                budget_s=options.budget_s,
            )
            notes = {name: getattr(peer, "note", "") for name, peer in peers.items()}
            notes["vqfast"] = _work(case, inputs) + ("" if options.gate else ", UNVERIFIED")
            key = (case.measure, case.id, dtype)
            yield rows_of(*key, times, {"vqfast"}, None, None, notes), missing
