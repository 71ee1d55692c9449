"""taming's VQGAN in plain torch, under taming's parameter names: what a user without this package
would write today. The torch_* opponents run it in several ways, and in float64 it is the truth
that every contestant is held against. Nothing here comes from vqfast.
"""

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from baselines import Unsuitable

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
COMPILE_LIMIT_S = 120


class _Norm(nn.GroupNorm):
    def __init__(self, channels: int):
        super().__init__(32, channels, eps=1e-6)


def _conv3(before: int, after: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(before, after, 3, stride, padding=1 if stride == 1 else 0)


class _Residual(nn.Module):
    def __init__(self, before: int, after: int):
        super().__init__()
        self.norm1, self.conv1 = _Norm(before), _conv3(before, after)
        self.norm2, self.conv2 = _Norm(after), _conv3(after, after)
        if before != after:
            self.nin_shortcut = nn.Conv2d(before, after, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y)))
        return (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x) + y


class _Attention(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.norm = _Norm(channels)
        for name in ("q", "k", "v", "proj_out"):
            setattr(self, name, nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        rows = (f(y).flatten(2).mT[:, None] for f in (self.q, self.k, self.v))  # [B, 1, h·w, C]
        y = F.scaled_dot_product_attention(*rows)[:, 0]
        return x + self.proj_out(y.mT.reshape(x.shape))


class _Down(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = _conv3(channels, channels, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class _Up(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = _conv3(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0))


class _Level(nn.Module):
    def __init__(self, before: int, after: int, blocks: int, attends: bool):
        super().__init__()
        self.block = nn.ModuleList(_Residual(after if i else before, after) for i in range(blocks))
        self.attn = nn.ModuleList(_Attention(after) for _ in range(blocks if attends else 0))

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x = block(x)
            x = self.attn[i](x) if len(self.attn) else x
        for name in ("downsample", "upsample"):
            x = getattr(self, name)(x) if hasattr(self, name) else x
        return x


def _middle(channels: int) -> nn.ModuleDict:
    blocks = {f"block_{i}": _Residual(channels, channels) for i in (1, 2)}
    return nn.ModuleDict(
        {"block_1": blocks["block_1"], "attn_1": _Attention(channels), "block_2": blocks["block_2"]}
    )


def _levels(c: Any) -> list[tuple[int, bool]]:
    """Width of each level, finest first, and whether it attends."""
    sides = (c.resolution >> i for i in range(len(c.ch_mult)))
    return [(c.ch * m, side in c.attn_resolutions) for m, side in zip(c.ch_mult, sides)]  # noqa: B905


class Encoder(nn.Module):
    """[B, in_channels, H, W] -> [B, z_channels, h, w]."""

    def __init__(self, c: Any):
        super().__init__()
        self.conv_in, before = _conv3(c.in_channels, c.ch), c.ch
        self.down = nn.ModuleList()
        for i, (width, attends) in enumerate(_levels(c)):
            level = _Level(before, width, c.num_res_blocks, attends)
            if i + 1 < len(c.ch_mult):
                level.downsample = _Down(width)
            self.down.append(level)
            before = width
        self.mid = _middle(before)
        self.norm_out, self.conv_out = _Norm(before), _conv3(before, c.z_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for part in (*self.down, *self.mid.values()):
            x = part(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Decoder(nn.Module):
    """[B, z_channels, h, w] -> [B, out_ch, H, W]; the coarsest level is the last of `up`."""

    def __init__(self, c: Any):
        super().__init__()
        levels = _levels(c)
        before = levels[-1][0]
        self.conv_in, self.mid = _conv3(c.z_channels, before), _middle(before)
        up = []
        for i, (width, attends) in reversed(list(enumerate(levels))):
            level = _Level(before, width, c.num_res_blocks + 1, attends)
            if i:
                level.upsample = _Up(width)
            up.insert(0, level)
            before = width
        self.up = nn.ModuleList(up)
        self.norm_out, self.conv_out = _Norm(before), _conv3(before, c.out_ch)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for part in (*self.mid.values(), *reversed(self.up)):
            x = part(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class PlainVQGAN(nn.Module):
    """Encoder, codebook and decoder for a vqfast.VQGANConfig, whose numbers alone are read.

    Args:
        state: weights under taming's names.
    """

    def __init__(self, config: Any, state: Mapping[str, Tensor]):
        super().__init__()
        c = config
        self.beta = c.beta
        with torch.device("meta"):
            self.encoder, self.decoder = Encoder(c), Decoder(c)
            self.quantize = nn.ModuleDict({"embedding": nn.Embedding(c.n_embed, c.embed_dim)})
            self.quant_conv = nn.Conv2d(c.z_channels, c.embed_dim, 1)
            self.post_quant_conv = nn.Conv2d(c.embed_dim, c.z_channels, 1)
        self.to_empty(device="cpu").load_state_dict(state)

    @property
    def codebook(self) -> Tensor:
        return self.quantize["embedding"].weight

    def latents(self, x: Tensor) -> Tensor:
        return self.quant_conv(self.encoder(x))

    def nearest(self, z: Tensor) -> Tensor:
        """[B, D, h, w] -> codes [B, h, w], in float32 or wider: bfloat16 has no distances."""
        with torch.autocast(z.device.type, enabled=False):
            wide = torch.promote_types(z.dtype, torch.float32)
            rows, codes = z.movedim(1, -1).flatten(0, 2).to(wide), self.codebook.to(wide)
            half = codes.square().sum(1) / 2
            found = torch.addmm(half, rows, codes.T, alpha=-1).argmin(1)
        return found.view(len(z), *z.shape[2:])

    def encode(self, x: Tensor) -> Tensor:
        return self.nearest(self.latents(x))

    def decode(self, codes: Tensor) -> Tensor:
        # a lookup leaves the channels last: eager NCHW has to be asked for
        z = F.embedding(codes, self.codebook).movedim(-1, 1)
        kernel = self.decoder.conv_in.weight
        last = kernel.is_contiguous(memory_format=torch.channels_last)
        form = torch.channels_last if last else torch.contiguous_format
        return self.decoder(self.post_quant_conv(z.contiguous(memory_format=form)))


def contestant(
    measure: str,
    case: Any,
    inputs: tuple,
    *,
    channels_last: bool = True,
    autocast: bool = False,
    compiled: bool = False,
) -> Callable[[], Tensor]:
    """`encode` or `decode` in one of torch's ways.

    Args:
        autocast: weights stay float32; else they have the dtype of the case.
        compiled: encoder and decoder by torch.compile, in the first call.

    Raises:
        Unsuitable: float16 on a CPU; in the first call that it does not compile in time.
    """
    model, data = inputs
    dtype = DTYPES[case.dtype]
    if case.dtype == "fp16" and case.device == "cpu":
        raise Unsuitable("measured in fp32 and bf16 on the CPU")
    net = PlainVQGAN(model.config, model.state_dict()).eval().requires_grad_(False)
    net.to(case.device, torch.float32 if autocast else dtype)
    form = torch.channels_last if channels_last else torch.contiguous_format
    net.to(memory_format=form)
    data = data.to(case.device)
    if data.is_floating_point():
        data = data.to(net.codebook.dtype, memory_format=form)
    if compiled:
        net.encoder.compile(dynamic=False)
        net.decoder.compile(dynamic=False)

    @torch.no_grad()
    def run() -> Tensor:
        with torch.autocast(case.device.partition(":")[0], dtype, enabled=autocast):
            return getattr(net, measure)(data)

    run = first_in_time(run) if compiled else run
    run.note = _note(case.dtype, autocast, compiled)
    return run


def _note(dtype: str, autocast: bool, compiled: bool) -> str:
    ways = ["channels_last"] if compiled else []
    ways += [] if dtype == "fp32" else ["autocast" if autocast else f"{dtype} module"]
    return ", ".join(ways)


def first_in_time(run: Callable[[], Any], limit_s: int = COMPILE_LIMIT_S) -> Callable[[], Any]:
    """`run`, whose first call, the one that compiles, may take `limit_s`.

    Raises:
        Unsuitable: in the first call, when it takes longer. Only the main thread can be stopped.
    """
    done = False

    def call() -> Any:
        nonlocal done
        if done or threading.current_thread() is not threading.main_thread():
            return run()
        with _alarm(limit_s):
            result = run()
        done = True
        return result

    return call


@contextlib.contextmanager
def _alarm(limit_s: int) -> Iterator[None]:
    def late(*_: Any) -> None:
        raise TimeoutError

    before, begin = signal.signal(signal.SIGALRM, late), time.monotonic()
    signal.alarm(limit_s)
    try:
        yield
    except Exception:  # dynamo and inductor wrap what is raised inside of them
        if time.monotonic() - begin >= limit_s:
            # imported here: a second that no other contestant needs
            from torch._inductor.async_compile import shutdown_compile_workers

            shutdown_compile_workers()  # else they go on while others are timed
            raise Unsuitable(f"does not compile within {limit_s} s") from None
        raise
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
