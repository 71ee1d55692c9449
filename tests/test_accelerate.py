"""`accelerate` on the quantizers of taming, diffusers and LlamaGen, and what it does to any module.
vector-quantize-pytorch: test_accelerate_vector_quantize.py."""

import copy
import importlib
import logging
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import vqfast
from vqfast.testing import compare, tolerances

DIFFUSERS = ("diffusers.models.autoencoders.vae", "VectorQuantizer")
TAMING = ("taming.modules.vqvae.quantize", "VectorQuantizer2")
TAMING_1 = ("taming.modules.vqvae.quantize", "VectorQuantizer")
LLAMAGEN = ("tokenizer.tokenizer_image.vq_model", "VectorQuantizer")  # not on PyPI: a stand-in


class LlamaGenStandIn(nn.Module):
    """Interface and formulas of LlamaGen's quantizer, written anew."""

    def __init__(self, n_e, e_dim, beta, entropy_loss_ratio=0.0, l2_norm=True, show_usage=True):
        super().__init__()
        self.n_e, self.e_dim, self.beta = n_e, e_dim, beta
        self.entropy_loss_ratio, self.l2_norm = entropy_loss_ratio, l2_norm
        self.show_usage = show_usage
        self.embedding = nn.Embedding(n_e, e_dim)
        if show_usage:
            self.register_buffer("codebook_used", torch.zeros(40))

    def forward(self, z):
        rows, book = z.movedim(1, -1).contiguous(), self.embedding.weight
        if self.l2_norm:
            rows, book = F.normalize(rows, dim=-1), F.normalize(book, dim=-1)
        flat = rows.view(-1, self.e_dim)
        d = flat.square().sum(1)[:, None] + book.square().sum(1) - 2 * flat @ book.T
        indices = d.argmin(1)
        z_q = book[indices].view(rows.shape)
        losses, usage = [None, None, None], 0
        if self.training:
            if self.show_usage:
                n = len(indices)
                self.codebook_used[:-n] = self.codebook_used[n:].clone()
                self.codebook_used[-n:] = indices
                usage = len(self.codebook_used.unique()) / self.n_e
            p = (-d / 0.01).softmax(1)
            spread = -(p.mean(0) * (p.mean(0) + 1e-5).log()).sum()
            entropy = -(p * (p + 1e-5).log()).sum(1).mean() - spread
            follow = (z_q - rows.detach()).square().mean()
            pull = (z_q.detach() - rows).square().mean()
            losses = [follow, self.beta * pull, self.entropy_loss_ratio * entropy]
        z_q = rows + (z_q - rows).detach()
        return z_q.movedim(-1, 1), (*losses, usage), (None, None, indices)


LlamaGenStandIn.__module__, LlamaGenStandIn.__name__ = LLAMAGEN


@pytest.fixture
def make(foreign):
    """make(where, *arguments): a foreign quantizer in training mode, seeded."""

    def build(where, *arguments, **options):
        torch.manual_seed(1)
        cls = LlamaGenStandIn if where == LLAMAGEN else foreign(*where)
        return cls(*arguments, **options)

    return build


KINDS = pytest.mark.parametrize(
    ("where", "options"),
    [
        (DIFFUSERS, {}),
        (DIFFUSERS, {"legacy": False, "sane_index_shape": True}),
        (TAMING, {}),
        (TAMING, {"legacy": False, "sane_index_shape": True}),
        (TAMING_1, {}),
        (LLAMAGEN, {"l2_norm": False}),
        (LLAMAGEN, {"l2_norm": True}),
        (LLAMAGEN, {"show_usage": False}),
    ],
    ids=lambda v: v[0].partition(".")[0] + v[1][15:] if isinstance(v, tuple) else "-".join(v),
)


def accelerated(module):
    """A copy that `accelerate` has taken."""
    twin = copy.deepcopy(module)
    assert vqfast.accelerate(twin) == 1
    return twin


def leaves(part):
    return [x for p in part for x in leaves(p)] if isinstance(part, (tuple, list)) else [part]


def observe(module, z):
    """Outputs, gradients and state of one call with its backward pass."""
    z = z.detach().clone().requires_grad_()
    out = leaves(module(z))
    upstream = torch.linspace(-1, 1, out[0].numel(), dtype=z.dtype).view(out[0].shape)
    losses = [t for t in out[1:] if isinstance(t, torch.Tensor) and t.requires_grad]
    ((out[0] * upstream).sum() + sum(3.0 * t for t in losses)).backward()
    grads = {f"grad of {n}": p.grad for n, p in module.named_parameters()}
    return {**dict(enumerate(out)), "grad of z": z.grad, **grads, **module.state_dict()}


def assert_alike(ours, theirs, exact):
    """Equal integers and objects; floats within the budget of theirs against float64."""
    assert ours.keys() == theirs.keys()
    for name, a in ours.items():
        b = theirs[name]
        if not isinstance(b, torch.Tensor):
            assert a == b, name
            continue
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride()), name
        if not b.is_floating_point():
            assert torch.equal(a, b), name
            continue
        factor = tolerances.BACKWARD if "grad" in str(name) else tolerances.FORWARD
        assert compare.budget_ratio(a, b, exact[name], factor) <= 1, name


def spread_codes(module, seed=5):
    """Codes far from one another, so that float32 formulas are right about the nearest."""
    g = torch.Generator().manual_seed(seed)
    weight = module.embedding.weight.data
    weight.copy_(F.normalize(torch.randn(weight.shape, generator=g), dim=1))


@KINDS
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_everything_but_the_search_is_theirs(make, where, options, training):
    theirs = make(where, 37, 6, 0.3, **options).train(training)
    spread_codes(theirs)
    ours, exact = accelerated(theirs), copy.deepcopy(theirs).double()
    z = torch.randn(2, 6, 3, 5)
    for _ in range(2):  # buffers move
        seen = [observe(m, z.to(m.embedding.weight.dtype)) for m in (ours, theirs, exact)]
        assert_alike(*seen)


@KINDS
def test_codes_are_exact_where_theirs_are_not(make, where, options):
    theirs = make(where, 4096, 32, 0.25, **options).eval()
    # as at the start of taming's training, where the float32 formula drowns in |z|²
    theirs.embedding.weight.data.uniform_(-1 / 4096, 1 / 4096)
    metric = "cosine" if getattr(theirs, "l2_norm", False) else "l2"
    if metric == "cosine":
        theirs.embedding.weight.data.add_(1.0)  # and where codes point the same way
    ours, z = accelerated(theirs), torch.randn(4, 32, 32, 16)
    rows = z.movedim(1, -1).reshape(-1, 32)

    def wrong(module):
        with torch.no_grad():
            indices = module(z)[2][2].reshape(-1)
        return compare.nearest_wrong_rows(indices, rows, module.embedding.weight, metric)

    assert wrong(theirs) > 0
    assert wrong(ours) == 0


@pytest.mark.parametrize("where", [DIFFUSERS, TAMING], ids=["diffusers", "taming"])
@pytest.mark.parametrize("unknown", ["random", "extra", 1])
def test_remapping_is_theirs(make, tmp_path, where, unknown):
    import numpy as np

    np.save(tmp_path / "used.npy", np.arange(0, 40, 3))
    theirs = make(where, 40, 4, 0.25, remap=str(tmp_path / "used.npy"), unknown_index=unknown)
    spread_codes(theirs)
    ours, z = accelerated(theirs), torch.randn(2, 4, 5, 5)
    found = []
    for m in (theirs, ours):
        torch.manual_seed(3)
        found.append(m(z)[2][2])
    assert torch.equal(*found) and found[0].shape == (50, 1)
    entry = ours.get_codebook_entry(found[1].reshape(-1), (2, 5, 5, 4))
    assert torch.equal(entry, theirs.get_codebook_entry(found[0].reshape(-1), (2, 5, 5, 4)))


def test_arguments_of_the_gumbel_interface_are_refused_by_them(make):
    ours = accelerated(make(TAMING, 8, 3, 0.25))
    ours(torch.zeros(1, 3, 2, 2), temp=1.0)
    with pytest.raises(AssertionError, match="Gumbel"):
        ours(torch.zeros(1, 3, 2, 2), temp=0.5)


@KINDS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_other_dtypes_and_autocast(make, where, options, dtype):
    theirs = make(where, 19, 5, 0.25, **options)
    spread_codes(theirs)
    ours, z = accelerated(theirs), F.normalize(torch.randn(2, 5, 3, 3), dim=1)
    cast = copy.deepcopy(ours).to(dtype)
    rows, weight = z.to(dtype).movedim(1, -1), cast.embedding.weight
    metric = "cosine" if getattr(theirs, "l2_norm", False) else "l2"
    with torch.no_grad():
        z_q, _, (_, _, indices) = cast(z.to(dtype))
    assert z_q.dtype == dtype
    assert torch.equal(indices.reshape(-1), vqfast.nearest(rows, weight, metric=metric).reshape(-1))
    with torch.autocast("cpu", torch.bfloat16):
        a, b = leaves(ours(z)), leaves(theirs(z))
    assert [getattr(t, "dtype", t) for t in a] == [getattr(t, "dtype", t) for t in b]


@pytest.mark.parametrize("where", [DIFFUSERS, TAMING], ids=["diffusers", "taming"])
def test_no_tensor_of_all_distances(make, where):
    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes = [t.numel() for t in leaves(out) if isinstance(t, torch.Tensor)]
            self.numel = max([self.numel, *sizes])
            return out

    theirs = make(where, 700, 3, 0.25)
    z, largest = torch.randn(1, 3, 20, 20, requires_grad=True), {}
    for name, m in (("ours", accelerated(theirs)), ("theirs", theirs)):
        with Largest() as seen:
            m(z)[1].backward()
        largest[name] = seen.numel
    assert largest["theirs"] >= 400 * 700 and largest["ours"] <= 700 * 3


def test_a_whole_model_keeps_its_reconstructions(foreign):
    model = foreign("diffusers", "VQModel")(num_vq_embeddings=64, latent_channels=3).eval()
    spread_codes(model.quantize)
    x = torch.randn(1, 3, 16, 16)
    ours = accelerated(model)
    with torch.no_grad():
        assert torch.equal(ours(x).sample, model(x).sample)
    compiled = torch.compile(ours.quantize, fullgraph=True, backend="aot_eager")
    z = torch.randn(1, 3, 4, 4)
    assert torch.equal(compiled(z)[2][2], model.quantize(z)[2][2])


# ---- what is taken, and what is left alone


def test_counts_each_module_once_and_none_again(make):
    one = make(LLAMAGEN, 8, 3, 0.25)
    tree = nn.Sequential(nn.Linear(3, 3), one, nn.Sequential(make(LLAMAGEN, 9, 2, 0.25), one))
    assert vqfast.accelerate(tree) == 2
    assert vqfast.accelerate(tree) == 0
    assert vqfast.accelerate(copy.deepcopy(tree)) == 0


def test_other_modules_are_untouched(foreign):
    ours = vqfast.nn.VectorQuantizer(8, 3, 0.25)
    tree = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Embedding(4, 3), ours)
    types = [type(m) for m in tree.modules()]
    assert vqfast.accelerate(tree) == 0 and [type(m) for m in tree.modules()] == types
    with pytest.raises(TypeError, match="module.*list"):
        vqfast.accelerate([ours])


def test_gumbel_has_no_search(foreign):
    assert vqfast.accelerate(foreign(TAMING[0], "GumbelQuantize")(4, 3, 8)) == 0


def fork(name=LLAMAGEN[1], module=LLAMAGEN[0], **changes):
    """A class of its own that a fork might have under the same name."""
    body = {**vars(LlamaGenStandIn), "__module__": module, **changes}
    return type(name, (nn.Module,), {k: v for k, v in body.items() if k != "__dict__"})


def _plus_one(self, z):
    z_q, losses, (_, _, indices) = LlamaGenStandIn.forward(self, z)
    return z_q, (losses[0], losses[1] and losses[1] + 1, *losses[2:]), (None, None, indices)


FORKS = {
    "another loss": {"forward": _plus_one},
    "another return": {"forward": lambda self, z: LlamaGenStandIn.forward(self, z)[0]},
    "a dict": {"forward": lambda self, z: {"z_q": LlamaGenStandIn.forward(self, z)[0]}},
    "more arguments": {"forward": lambda self, z, mask: LlamaGenStandIn.forward(self, z)},
    "no gradient": {"forward": torch.no_grad()(LlamaGenStandIn.forward)},
    "another module": {"module": "quantizers"},
    "another name": {"name": "Quantizer"},
}


def _stand_in_like(cls):
    def init(self, *args, **options):
        nn.Module.__init__(self)
        self.__dict__.update(LlamaGenStandIn(*args, **options).__dict__)

    cls.__init__ = init
    return cls


@pytest.mark.parametrize("changes", FORKS.values(), ids=FORKS)
def test_forks_that_do_something_else_are_left_alone(changes):
    other = _stand_in_like(fork(**changes))(16, 3, 0.25)
    kind = type(other)
    assert vqfast.accelerate(other) == 0 and type(other) is kind


def test_the_same_file_in_another_package_is_taken():
    assert vqfast.accelerate(_stand_in_like(fork(module="my." + LLAMAGEN[0]))(16, 3, 0.25)) == 1
    assert vqfast.accelerate(_stand_in_like(fork(module="my" + LLAMAGEN[0]))(16, 3, 0.25)) == 0


def test_a_forward_of_their_own_is_left_alone_and_an_inherited_one_taken():
    class Inherits(LlamaGenStandIn):
        def extra(self):
            return "kept"

    class Overrides(LlamaGenStandIn):
        def forward(self, z):
            return super().forward(2 * z)

    patched = LlamaGenStandIn(8, 3, 0.25)
    patched.forward = lambda z: z
    assert vqfast.accelerate(Overrides(8, 3, 0.25)) == vqfast.accelerate(patched) == 0
    inherits = accelerated(Inherits(8, 3, 0.25))
    assert isinstance(inherits, Inherits) and inherits.extra() == "kept"


def test_an_entropy_loss_keeps_their_search_and_the_log_says_so(caplog):
    with caplog.at_level(logging.INFO, "vqfast"):
        assert vqfast.accelerate(nn.Sequential(LlamaGenStandIn(8, 3, 0.25, 0.1))) == 0
    assert "leaves 0" in caplog.text and "entropy" in caplog.text
    later = accelerated(LlamaGenStandIn(8, 3, 0.25))
    z = torch.randn(1, 3, 2, 2)
    assert later(z)[1][2] == 0
    later.entropy_loss_ratio = 0.1
    assert later(z)[1][2] != 0


def test_a_module_on_the_meta_device_is_left_alone():
    with torch.device("meta"):
        empty = LlamaGenStandIn(8, 3, 0.25)
    assert vqfast.accelerate(empty) == 0


def test_a_buffer_with_a_graph_is_no_obstacle():
    # LlamaGen registers a Parameter as its buffer; .to(device) makes it the result of an operation
    module = LlamaGenStandIn(8, 3, 0.25)
    module.codebook_used = 1.0 * nn.Parameter(module.codebook_used)
    assert vqfast.accelerate(module) == 1
    assert module(torch.randn(1, 3, 5, 8))[1][3] > 0.125  # the share of the codes in use
    assert module.codebook_used.any()


@pytest.mark.parametrize("forced", ["cuda", "reference"])
def test_a_forced_backend_is_for_calls_alone(forced):
    with vqfast.backend(forced):
        assert vqfast.accelerate(LlamaGenStandIn(8, 3, 0.25)) == 1


# ---- what stays


def test_nothing_else_of_the_module_or_the_process_changes(make):
    theirs = make(LLAMAGEN, 30, 4, 0.25).eval()
    calls = []
    theirs.register_forward_hook(lambda *a: calls.append(1))
    state = {k: v.clone() for k, v in theirs.state_dict().items()}
    pointers = [t.data_ptr() for t in theirs.state_dict().values()]
    random = torch.get_rng_state()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert vqfast.accelerate(theirs) == 1
    assert torch.equal(torch.get_rng_state(), random) and not calls
    assert theirs.state_dict().keys() == state.keys() and not theirs.training
    assert all(torch.equal(v, state[k]) for k, v in theirs.state_dict().items())
    assert [t.data_ptr() for t in theirs.state_dict().values()] == pointers
    assert all(p.grad is None and p.requires_grad for p in theirs.parameters())
    assert isinstance(theirs, LlamaGenStandIn) and repr(theirs).startswith("VectorQuantizer(")
    theirs(torch.randn(1, 4, 2, 2))
    assert calls == [1]
    make(LLAMAGEN, 30, 4, 0.25).load_state_dict(theirs.state_dict())


@pytest.mark.parametrize("where", [DIFFUSERS, TAMING, TAMING_1], ids=lambda w: w[0][:6] + w[1][15:])
def test_copies_and_pickles_are_accelerated_and_independent(make, where):
    ours, z = accelerated(make(where, 30, 4, 0.25)), torch.randn(1, 4, 3, 3)
    for twin in (copy.deepcopy(ours), copy.copy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(twin) is type(ours) and vqfast.accelerate(twin) == 0
        assert torch.equal(twin(z)[2][2], ours(z)[2][2])
    twin = copy.deepcopy(ours)
    twin.embedding.weight.data.zero_()
    assert not twin(z)[2][2].any() and ours(z)[2][2].any()


def test_the_module_of_this_name_can_be_called_too():
    # unpickling imports vqfast.accelerate, which puts the module in the place of the function
    module = importlib.import_module("vqfast.accelerate")
    assert module(LlamaGenStandIn(8, 3, 0.25)) == 1
