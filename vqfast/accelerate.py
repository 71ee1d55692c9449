"""Exact nearest-code search inside the quantizers of other libraries.

`accelerate(module)` finds them by the name of a class and of the module that defines it: nothing
foreign is imported, and the same file inside another root package is found too. Each gets another
`__class__`: a subclass of its own class, of the same name, whose `forward` is theirs but for the
search. So weights, hooks, state-dict keys, other methods and `isinstance` stay as they are.

A name proves little, as forks keep names. So the old and the new forward first run side by side on
a copy of the module, and where outputs, gradients or buffers differ it is left alone. `_KNOWN` is
the table; the classes above it are one forward each.

Source: the interfaces of CompVis/taming-transformers taming/modules/vqvae/quantize.py,
huggingface/diffusers models/autoencoders/vae.py, FoundationVision/LlamaGen
tokenizer/tokenizer_image/vq_model.py and lucidrains/vector-quantize-pytorch.
"""

import contextlib
import copy
import functools
import itertools
import logging
import sys
import types
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqfast._dispatch import backend, forced_backend
from vqfast.ops.code_stats import code_stats
from vqfast.ops.nearest import nearest

_log = logging.getLogger("vqfast")
# what a fork may raise that is not the class which is known by its name
_ERRORS = (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
_Theirs: Any = object  # to a type checker: the foreign class


class _Exact(_Theirs):
    """Base of the classes that are mixed into a foreign class, see `_derived`."""

    _codes = "embedding.weight"  # where the codes lie, [..., K, D]

    def take(self) -> None:
        """What else to do when this class has been mixed in."""

    def obstacle(self) -> str | None:
        """Why the search of a foreign module cannot be replaced; None if it can."""
        return None

    def rehearsal(self) -> Tensor:
        """An input for a copy of a foreign module, after what must not run on a copy is put off."""
        return _normal(2, self.embedding.weight.shape[1], 2, 3)

    def __reduce_ex__(self, protocol: Any) -> tuple:
        # the class was made at run time, so that copies and pickles name the two it was made of
        _, _, *state = super().__reduce_ex__(max(2, int(protocol)))
        return (_blank, type(self).__bases__, *state)


@functools.cache
def _derived(ours: Any, theirs: Any) -> Any:
    """`theirs` with the search of `ours`, under its own name."""
    names = ("__module__", "__qualname__", "__doc__")
    return type(theirs.__name__, (ours, theirs), {n: getattr(theirs, n) for n in names})


def _blank(ours: Any, theirs: Any) -> Any:
    return object.__new__(_derived(ours, theirs))


def _normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float32, device="cpu")


# ---- taming-transformers, latent-diffusion and diffusers: VectorQuantizer2 and its copies


def _pull_and_follow(z_q: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """The two terms of the VQ loss: gradient to z alone, and to the codes alone."""
    return ((z_q.detach() - z) ** 2).mean(), ((z_q - z.detach()) ** 2).mean()


class _VectorQuantizer2(_Exact):
    def forward(
        self, z: Tensor, temp: Any = None, rescale_logits: Any = False, return_logits: Any = False
    ) -> tuple:
        if temp not in (None, 1.0) or rescale_logits or return_logits:
            return super().forward(z, temp, rescale_logits, return_logits)  # refuses
        z = z.permute(0, 2, 3, 1).contiguous()  # [B, h, w, D]
        weight = self.embedding.weight
        indices = nearest(z.view(-1, weight.shape[1]), weight)  # [B·h·w]
        z_q = self.embedding(indices).view(z.shape)
        pull, follow = _pull_and_follow(z_q, z)
        loss = pull + self.beta * follow if self.legacy else self.beta * pull + follow
        z_q = (z + (z_q - z).detach()).permute(0, 3, 1, 2).contiguous()
        if self.remap is not None:
            indices = self.remap_to_used(indices.reshape(len(z), -1)).reshape(-1, 1)
        if self.sane_index_shape:
            indices = indices.reshape(len(z), *z_q.shape[2:])
        return z_q, loss, (None, None, indices)


class _VectorQuantizer1(_Exact):
    """taming's first class: it returns the one-hot matrix, so that one stays."""

    def forward(self, z: Tensor) -> tuple:
        z = z.permute(0, 2, 3, 1).contiguous()  # [B, h, w, D]
        weight = self.embedding.weight
        indices = nearest(z.view(-1, weight.shape[1]), weight)[:, None]  # [B·h·w, 1]
        one_hot = torch.zeros(len(indices), self.n_e).to(z).scatter_(1, indices, 1)
        z_q = self.embedding(indices).view(z.shape)
        if torch.is_autocast_enabled(z.device.type):  # theirs is a matrix product
            z_q = z_q.to(torch.get_autocast_dtype(z.device.type))
        pull, follow = _pull_and_follow(z_q, z)
        share = one_hot.mean(dim=0)
        perplexity = torch.exp(-torch.sum(share * torch.log(share + 1e-10)))
        z_q = (z + (z_q - z).detach()).permute(0, 3, 1, 2).contiguous()
        return z_q, pull + self.beta * follow, (perplexity, one_hot, indices)


# ---- LlamaGen


class _LlamaGen(_Exact):
    def obstacle(self) -> str | None:
        needs = "its entropy loss needs the distances to all codes"
        return needs if self.entropy_loss_ratio else None

    def forward(self, z: Tensor) -> tuple:
        if self.obstacle():
            return super().forward(z)
        z = z.permute(0, 2, 3, 1).contiguous()  # [B, h, w, D]
        codes = self.embedding.weight
        metric = "cosine" if self.l2_norm else "l2"
        indices = nearest(z.view(-1, codes.shape[1]), codes, metric=metric)  # [B·h·w]
        if self.l2_norm:
            z, codes = F.normalize(z, dim=-1), F.normalize(codes, dim=-1)
        z_q = codes[indices].view(z.shape)
        losses: tuple = (None, None, None)
        usage = self._usage(indices) if self.training and self.show_usage else 0
        if self.training:
            pull, follow = _pull_and_follow(z_q, z)
            losses = (follow, self.beta * pull, self.entropy_loss_ratio * follow)  # the last is 0
        z_q = (z + (z_q - z).detach()).permute(0, 3, 1, 2)
        return z_q, (*losses, usage), (None, None, indices)

    def _usage(self, indices: Tensor) -> float:
        """Share of the codes among the last ones seen, which `codebook_used` holds, newest last."""
        seen, n = self.codebook_used.detach(), len(indices)
        seen.copy_(torch.cat([seen[n:], indices.to(seen)])[-len(seen) :])
        return len(torch.unique(seen)) / self.n_e


# ---- vector-quantize-pytorch


def _no_distances(codes: Any) -> Any:
    """What `_VectorQuantize` hands through theirs, as codebook_transform_fn, to `_Codebook`."""
    raise AssertionError("a mark, not a function")


class _Codebook(_Exact):
    """The codebook inside a VectorQuantize. Its search stays theirs but for calls with the mark."""

    _UPDATE = ("ema_update_weight", "accum_ema_update", "ema_update")
    _MEANT_HERE = {*_UPDATE, "sample_codebook_temp", "mask", "freeze_codebook", "update_usage"}

    def forward(self, x: Tensor, **options: Any) -> tuple:
        marked = options.get("codebook_transform_fn") is _no_distances
        options |= {"codebook_transform_fn": None} if marked else {}
        special = [v for name, v in options.items() if name not in self._MEANT_HERE]
        if not marked or any(v is not None and v is not False for v in special):
            return super().forward(x, **options)
        whole = x.float() if x.dim() == 4 else x.float()[None]  # [h, b, n, D]: h codebooks
        flat = whole.flatten(1, -2)  # [h, b·n, D]
        mask = options.get("mask")  # [b, n]
        if mask is not None:  # theirs has the heads between b and n
            times = flat.shape[1] // mask.numel()
            mask = mask[None, :, None].expand(len(flat), -1, times, -1).flatten(1)  # [h, b·n]
        self.init_embed_(flat, mask=mask)
        codes = (self.embed if self.learnable_codebook else self.embed.detach()).to(flat.dtype)
        metric = "dot" if self.use_cosine_sim else "l2"  # cosine: both sides come normalised
        pairs = zip(flat, codes, strict=True)
        chosen = torch.stack([nearest(rows, book, metric=metric) for rows, book in pairs])
        z_q = torch.stack([F.embedding(i, book) for i, book in zip(chosen, codes, strict=True)])
        frozen = options.get("freeze_codebook") or not options.get("update_usage", True)
        if self.training and not frozen:
            update = {name: options[name] for name in self._UPDATE if name in options}
            self.update_codebook(flat, chosen, mask=mask, **update)
        z_q, indices = z_q.view(whole.shape), chosen.view(whole.shape[:-1])
        return (z_q, indices, None) if x.dim() == 4 else (z_q[0], indices[0], None)

    def track_cluster_size_and_embed_avg(
        self,
        flatten: Tensor,
        chosen: Tensor,
        mask: Tensor | None = None,
        ema_update_weight: Any = None,
        accum_ema_update: bool = False,
    ) -> None:
        """chosen: indices [h, N] from our forward, or their one-hot matrix [h, N, K]."""
        if chosen.dim() == 2 and (ema_update_weight is not None or accum_ema_update):
            chosen = F.one_hot(chosen, self.codebook_size).to(flatten)
        if chosen.dim() == 3:
            options = mask, ema_update_weight, accum_ema_update
            return super().track_cluster_size_and_embed_avg(flatten, chosen, *options)
        kept = torch.ones_like(chosen, dtype=torch.bool) if mask is None else mask
        heads = zip(chosen, flatten, kept, strict=True)
        stats = [code_stats(i[m], rows[m], self.codebook_size) for i, rows, m in heads]
        counts, sums = (torch.stack(part) for part in zip(*stats, strict=True))
        for average, new in ((self.cluster_size, counts), (self.embed_avg, sums)):
            new = new.to(average)
            self.all_reduce_fn(new)
            if average.grad is not None:  # what calls with accum_ema_update have gathered
                new, average.grad = new + average.grad, None
            average.data.lerp_(new, 1.0 - self.decay)
        return None


class _VectorQuantize(_Exact):
    _codes = "_codebook.embed"

    def take(self) -> None:
        if not isinstance(self._codebook, _Codebook):  # it may be shared
            self._codebook.__class__ = _derived(_Codebook, self._codebook.__class__)

    def obstacle(self) -> str | None:
        book = self._codebook
        if not hasattr(book, "track_cluster_size_and_embed_avg"):
            return "it is older than vector-quantize-pytorch 1.28.3"
        sampler = book.gumbel_sample  # a partial of their function
        options = getattr(sampler, "keywords", None)
        if options is None or sampler.func.__module__ != type(book).__module__:
            return "it chooses codes by a function of its own"
        if options.get("stochastic") or options.get("straight_through"):
            return "it samples codes"
        if self.has_codebook_diversity_loss or self.commitment_use_cross_entropy_loss:
            return "its loss needs the distances to all codes"
        if book.affine_param or getattr(book, "vq_bridge", None) is not None:
            return "it moves the codes before the search"
        return None

    def rehearsal(self) -> Tensor:
        book = self._codebook
        book.initted.fill_(True)
        # no talk to other ranks, no revival of codes
        book.use_ddp, book.all_reduce_fn = False, lambda x: None
        book.threshold_ema_dead_code, book.has_dead_code_replacement = 0, False
        x = _normal(1, self.dim, 6)
        if self.accept_image_fmap or self.accept_3d_fmap:
            return x.view(1, self.dim, 2, 3) if self.accept_image_fmap else x.view(1, -1, 1, 2, 3)
        return x.mT if self.channel_last else x

    def forward(self, x: Tensor, *args: Any, **options: Any) -> Any:
        asks = [*args, options.get("indices"), options.get("codebook_transform_fn")]
        if all(a is None for a in asks) and self.obstacle() is None:
            options["codebook_transform_fn"] = _no_distances
            return super().forward(x, **options)
        return super().forward(x, *args, **options)


# ---- which is which

_KNOWN: dict[tuple[str, str], type[_Exact]] = {  # (module that defines it, class): what it becomes
    ("taming.modules.vqvae.quantize", "VectorQuantizer"): _VectorQuantizer1,
    ("taming.modules.vqvae.quantize", "VectorQuantizer2"): _VectorQuantizer2,  # LDM's too
    ("diffusers.models.autoencoders.vae", "VectorQuantizer"): _VectorQuantizer2,
    ("diffusers.models.vae", "VectorQuantizer"): _VectorQuantizer2,  # until 0.25
    ("tokenizer.tokenizer_image.vq_model", "VectorQuantizer"): _LlamaGen,
    ("vector_quantize_pytorch.vector_quantize_pytorch", "VectorQuantize"): _VectorQuantize,
}


def _entry(cls: type) -> Any:
    """What a class becomes, going by the class that defines the `forward` it has."""
    owner = next(c for c in cls.__mro__ if "forward" in vars(c))
    for (module, name), ours in _KNOWN.items():
        # a leading dot: the same file inside another root package
        if owner.__name__ == name and f".{owner.__module__}".endswith(f".{module}"):
            return ours
    return None


def _plain_copy(module: nn.Module, ours: Any) -> Any:
    """In float32 on the CPU, with the codes u, -u, 0, 0, ...: no float32 formula fails on these."""
    memo: dict[int, Any] = {}  # what deepcopy takes for a tensor
    for t in itertools.chain(module.parameters(), module.buffers()):
        dtype = torch.float32 if t.is_floating_point() else t.dtype
        memo[id(t)] = t.detach().to("cpu", dtype, copy=True)
    for p in module.parameters():
        memo[id(p)] = nn.Parameter(memo[id(p)], requires_grad=p.requires_grad)
    twin: Any = copy.deepcopy(module, memo)
    codes = functools.reduce(getattr, ours._codes.split("."), twin).data
    u = F.normalize(_normal(codes.shape[-1]), dim=0)
    codes.zero_()
    codes[..., :1, :], codes[..., 1:2, :] = u, -u
    return twin


def _leaves(part: Any) -> list[Any]:
    """What nested tuples and lists hold."""
    nested = isinstance(part, (tuple, list))
    return [leaf for p in part for leaf in _leaves(p)] if nested else [part]


def _observe(module: nn.Module, x: Tensor) -> list[Any]:
    """All that a call and its backward pass give: outputs, gradients, parameters, buffers."""
    torch.default_generator.manual_seed(0)
    x = x.clone().requires_grad_()
    outputs = _leaves(module.forward(x))  # not a call: no hooks
    total = [t.square().sum() for t in outputs if isinstance(t, Tensor) and t.requires_grad]
    if total:
        torch.stack(total).sum().backward()
    state = [*module.parameters(), *module.buffers()]
    return [*outputs, x.grad, *(t.grad for t in state), *state]


def _same(a: Any, b: Any) -> bool:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return type(a) is type(b) and a == b
    alike = (a.shape, a.dtype, a.requires_grad) == (b.shape, b.dtype, b.requires_grad)
    return alike and torch.allclose(a, b, rtol=1e-4, atol=1e-5, equal_nan=True)


@torch.inference_mode(False)
@torch.enable_grad()
@torch.autocast("cpu", enabled=False)
def _reason(module: Any, ours: Any) -> str | None:
    """Why a module of a known name is left alone; None if the new forward may take its place."""
    # as above: the state of the caller does not matter here, nor does it change
    forced = backend("reference") if forced_backend() else contextlib.nullcontext()
    with torch.random.fork_rng(devices=[]), forced:
        torch.default_generator.manual_seed(0)
        try:
            if reason := ours.obstacle(module):
                return reason
            old = _plain_copy(module, ours)
            x = ours.rehearsal(old)
            new = copy.deepcopy(old)
            _swap(new, ours)
            for mode in (False, True):
                pair = [_observe(m.train(mode), x) for m in (old, new)]
                if len(pair[0]) != len(pair[1]) or not all(map(_same, *pair)):
                    return "it does something else than the class that has this name"
        except _ERRORS as error:
            return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return None


def _swap(module: Any, ours: Any) -> None:
    module.__class__ = _derived(ours, module.__class__)
    ours.take(module)


def accelerate(module: nn.Module) -> int:
    """Replace the nearest-code search of known quantizers inside a module by `vqfast.nearest`.

    In place and recursively. Known by name: `VectorQuantizer` and `VectorQuantizer2` of taming
    (latent-diffusion uses the latter), `VectorQuantizer` of diffusers' `VQModel` and of LlamaGen,
    `VectorQuantize` of vector-quantize-pytorch 1.28.3 or later, so also inside `ResidualVQ`. Codes
    become the exact ones; losses, gradients, moving averages and return values stay theirs. N×K
    remains only where they return it: the one-hot matrix of taming's first class.

    Left alone: subclasses with a `forward` of their own, forks that do something else than the
    class of that name, and quantizers that sample codes, move them before the search or need all
    distances for their loss; the logger `vqfast` says which and why at level INFO. Calls with
    `indices`, `topk` or `codebook_transform_fn`, or with an option by position, run their search.

    State dict, `isinstance` and type name stay; copies and pickles are accelerated too (loading
    such a pickle needs vqfast). Call it when the module has left the meta device.

    Returns:
        How many quantizers this call replaced, so 0 the second time. A module in two places counts
        once; the layers of a `ResidualVQ` count each, also with a shared codebook.

    Raises:
        TypeError: module is not an nn.Module.

    Numerics: the rule of `nearest`. LlamaGen's l2_norm is `metric="cosine"`; use_cosine_sim of
        vector-quantize-pytorch is `metric="dot"` on the vectors that it normalised. Sums for moving
        averages are accumulated in float64.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
    count = 0
    for name, part in module.named_modules():
        ours = None if "forward" in vars(part) else _entry(type(part))
        if ours is None:
            continue
        reason = _reason(part, ours)
        if reason is None:
            _swap(part, ours)
            count += 1
        else:
            _log.info("accelerate leaves %s (%s) alone: %s", name or "it", type(part), reason)
    return count


class _Callable(types.ModuleType):
    """Importing this file, as a pickle does, makes the module `vqfast.accelerate`."""

    __call__ = staticmethod(accelerate)


sys.modules[__name__].__class__ = _Callable
