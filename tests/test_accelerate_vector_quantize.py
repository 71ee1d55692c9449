"""`accelerate` on vector-quantize-pytorch, against the installed package."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import vqfast
from vqfast.testing import compare, tolerances

SGD = {"in_place_codebook_optimizer": lambda p: torch.optim.SGD(p, lr=0.5)}
LEARNABLE = {"learnable_codebook": True, "ema_update": False}
TAKEN = {
    "plain": {},
    "cosine": {"use_cosine_sim": True},
    "projection": {"codebook_dim": 5},
    "heads": {"heads": 2, "codebook_dim": 5},
    "codebook per head": {"heads": 2, "codebook_dim": 5, "separate_codebook_per_head": True},
    "cosine per head": {"heads": 2, "separate_codebook_per_head": True, "use_cosine_sim": True},
    "images": {"accept_image_fmap": True},
    "volumes": {"accept_3d_fmap": True},
    "channels first": {"channel_last": False},
    "k-means": {"kmeans_init": True, "kmeans_iters": 2},
    "revival": {"threshold_ema_dead_code": 2},
    "revival without EMA": {"threshold_ema_dead_code": 2, **LEARNABLE},
    "frozen": {"freeze_codebook": True},
    "learnable": LEARNABLE,
    "learnable in place": {**LEARNABLE, **SGD},
    "optimistic": {"sync_update_v": 0.2, "rotation_trick": False, **LEARNABLE},
    "straight": {"rotation_trick": False},
    "directional": {"directional_reparam": True, "threshold_ema_dead_code": 2},
    "orthogonal": {"orthogonal_reg_weight": 1.0, "ema_update": False},
    "manual EMA": {"manual_ema_update": True},
    "custom gradients": {"route_gradients_to_input": False},
}
LEFT = {
    "sampling": {"stochastic_sample_codes": True},
    "gumbel": {"straight_through": True, "rotation_trick": False},
    "affine": {"affine_param": True},
    "diversity loss": {"codebook_diversity_loss_weight": 0.1},
    "cross entropy": {"commitment_use_cross_entropy_loss": True},
    "bridge": {"vq_bridge": torch.nn.Linear(8, 8)},
}


@pytest.fixture
def make(foreign):
    """make(**options): a seeded VectorQuantize in training mode, 24 codes well apart, dim 8."""

    def build(kind="VectorQuantize", dim=8, codebook_size=24, **options):
        torch.manual_seed(1)
        module = foreign("vector_quantize_pytorch", kind)(
            dim=dim, codebook_size=codebook_size, **options
        )
        for m in module.modules():
            if hasattr(m, "embed_avg"):
                m.embed.data.copy_(F.normalize(torch.randn(m.embed.shape), dim=-1))
                m.embed_avg.copy_(m.embed.data)
        return module

    return build


def latents(module, n=20):
    x = torch.randn(2, n, 8)
    if module.accept_image_fmap:
        return x.mT.reshape(2, 8, 4, n // 4)
    if module.accept_3d_fmap:
        return x.mT.reshape(2, 8, 2, 2, n // 4)
    return x if module.channel_last else x.mT


def accelerated(module):
    twin = copy.deepcopy(module)
    assert vqfast.accelerate(twin) == 1
    return twin


def observe(module, x, **call):
    """Outputs, gradients and state of one seeded call with its backward pass."""
    torch.manual_seed(7)
    x = x.detach().clone().requires_grad_()
    outputs = [
        t for part in module(x, **call) for t in (part if isinstance(part, tuple) else [part])
    ]
    upstream = torch.linspace(-1, 1, outputs[0].numel()).view(outputs[0].shape)
    total = (outputs[0] * upstream).sum()
    total = total + sum(3.0 * t.sum() for t in outputs[1:] if t.requires_grad)
    if total.requires_grad:
        total.backward()
    grads = {f"grad of {name}": p.grad for name, p in module.named_parameters()}
    state = {name: b.clone() for name, b in module.state_dict().items()}
    return {**dict(enumerate(outputs)), "grad of x": x.grad, **grads, **state}


def assert_alike(ours, theirs):
    """Equal integers; floats within the budget, theirs taken for exact (it is float32 only)."""
    assert ours.keys() == theirs.keys()
    for name, a in ours.items():
        b = theirs[name]
        if b is None or not b.is_floating_point():
            assert a is b or (a.dtype == b.dtype and torch.equal(a, b)), name
            continue
        factor = tolerances.BACKWARD if "grad" in str(name) else tolerances.FORWARD
        assert a.dtype == b.dtype and compare.budget_ratio(a, b, b, factor) <= 1, name


@pytest.mark.parametrize("options", TAKEN.values(), ids=TAKEN)
def test_everything_but_the_search_is_theirs(make, options):
    theirs = make(**options)
    ours = accelerated(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    x = latents(theirs)
    for training in (True, True, False):
        seen = [observe(m.train(training), x) for m in (ours, theirs)]
        assert_alike(*seen)


@pytest.mark.parametrize("options", LEFT.values(), ids=LEFT)
def test_what_is_no_search_is_left_alone(make, options):
    if "vq_bridge" in options:
        options = {**options, **LEARNABLE}
    module = make(**options)
    kinds = [type(m) for m in module.modules()]
    assert vqfast.accelerate(module) == 0 and [type(m) for m in module.modules()] == kinds


def test_a_sampler_of_the_user_is_left_alone_and_is_asked_when_set_later(make):
    def always_three(logits, dim=-1, **_):
        indices = torch.full(logits.shape[:-1], 3)
        return indices, F.one_hot(indices, logits.shape[-1]).type(logits.dtype)

    module = make()
    module._codebook.gumbel_sample = always_three
    assert vqfast.accelerate(module) == 0
    later = accelerated(make())
    later._codebook.gumbel_sample = always_three
    assert (later(latents(later))[1] == 3).all()


CALLS = {
    "mask": {"mask": torch.arange(20) < torch.tensor([[13], [20]])},
    "lengths": {"lens": torch.tensor([5, 20])},
    "frozen": {"freeze_codebook": True},
    "three best": {"topk": 3},
    "weighted update": {"ema_update_weight": torch.linspace(0, 1, 24)},
    "function of the update": {"ema_update_weight": lambda sums, counts: counts / 20},
    "no update": {"ema_update": False},
    "gathered update": {"accum_ema_update": True},
    "temperature": {"sample_codebook_temp": 0.5},
    "breakdown": {"return_loss_breakdown": True},
    "transform": {"codebook_transform_fn": lambda c: c[:, None, None].expand(1, 2, 20, -1, -1) * 2},
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("options", [{}, {"use_cosine_sim": True}], ids=["euclid", "cosine"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_arguments_of_a_call_mean_the_same(make, call, options, training):
    theirs = make(threshold_ema_dead_code=1, **options).train(training)
    ours, x = accelerated(theirs), latents(theirs)
    for step in (call, {}):  # the second one uses what the first has gathered
        flat = [
            {k: v for k, v in observe(m, x, **step).items() if isinstance(v, torch.Tensor)}
            for m in (ours, theirs)
        ]
        assert_alike(*flat)


def test_mask_with_heads(make):
    # with a commitment loss their own shapes do not fit
    theirs = make(heads=2, codebook_dim=5, commitment_weight=0.0)
    ours, x = accelerated(theirs), latents(theirs)
    assert_alike(*(observe(m, x, mask=CALLS["mask"]["mask"]) for m in (ours, theirs)))


def test_the_loss_on_given_codes_is_theirs(make):
    theirs = make()
    ours, x = accelerated(theirs), latents(theirs)
    given = torch.randint(24, (2, 20))
    assert_alike(*(observe(m, x, indices=given) for m in (ours, theirs)))
    assert_alike(*(observe(m, x) for m in (ours, theirs)))


def test_one_vector_per_item(make):
    theirs = make()
    ours, x = accelerated(theirs), torch.randn(6, 8)
    assert_alike(*(observe(m, x) for m in (ours, theirs)))
    assert ours(x)[1].shape == (6,)


@pytest.mark.parametrize("shared", [False, True], ids=["own codebooks", "shared codebook"])
def test_each_layer_of_a_residual_quantizer_counts(make, shared):
    theirs = make("ResidualVQ", num_quantizers=3, shared_codebook=shared)
    ours, x = copy.deepcopy(theirs), torch.randn(2, 20, 8)
    assert vqfast.accelerate(ours) == 3 and vqfast.accelerate(ours) == 0
    for training in (True, False):
        seen = [observe(m.train(training), x) for m in (ours, theirs)]
        assert_alike(*seen)


def test_moving_averages_are_summed_over_ranks(make):
    theirs = make()
    ours, x = accelerated(theirs), latents(theirs)
    for m in (ours, theirs):
        m._codebook.all_reduce_fn = lambda t: t.mul_(2)  # as if another rank had the same batch
    assert_alike(*(observe(m, x) for m in (ours, theirs)))


@pytest.mark.parametrize("options", [{}, {"use_cosine_sim": True}], ids=["euclid", "cosine"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_codes_are_exact_where_theirs_are_not(make, options, training):
    theirs = make(dim=32, codebook_size=4096, **options).train(training)
    book = theirs._codebook.embed
    book.copy_(1.0 + torch.rand(book.shape) * 1e-3)
    if options:
        book.copy_(F.normalize(book, dim=-1))
    ours, x = accelerated(theirs), torch.randn(2, 1024, 32)
    codes, rows = book[0].clone(), x.reshape(-1, 32)
    if options:
        rows = theirs._codebook.transform_input(rows)

    def wrong(module):
        with torch.no_grad():
            indices = module(x)[1].reshape(-1)
        return compare.nearest_wrong_rows(indices, rows, codes, "dot" if options else "l2")

    assert wrong(theirs) > 0
    assert wrong(ours) == 0


@pytest.mark.parametrize("options", [{}, LEARNABLE], ids=["EMA", "learnable"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_no_tensor_of_all_distances(make, options, training):
    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else [out]:
                self.numel = max(self.numel, t.numel() if isinstance(t, torch.Tensor) else 0)
            return out

    theirs, largest = make(codebook_size=700, **options).train(training), {}
    for name, m in (("ours", accelerated(theirs)), ("theirs", theirs)):
        with Largest() as seen:
            z_q, _, loss = m(torch.randn(1, 400, 8, requires_grad=True))
            if training:
                (z_q.sum() + loss).sum().backward()
        largest[name] = seen.numel
    assert largest["theirs"] >= 400 * 700
    # rotation trick: one D x D matrix per row
    assert largest["ours"] <= max(700 * 8, 400 * 8 * 8)


def test_copies_and_pickles_are_accelerated_and_independent(make):
    ours = accelerated(make())
    x, kept = latents(ours), ours._codebook.embed.clone()
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(twin) is type(ours) and type(twin._codebook) is type(ours._codebook)
        assert vqfast.accelerate(twin) == 0
        twin(x)
        assert torch.equal(ours._codebook.embed, kept)
        assert not torch.equal(twin._codebook.embed, kept)


def test_threads_may_share_a_module(make):
    ours = accelerated(make(codebook_size=500)).eval()
    xs = [torch.randn(2, 300, 8) for _ in range(40)]
    with torch.no_grad(), ThreadPoolExecutor(4) as pool:
        expected = [ours(x)[1] for x in xs]
        found = list(pool.map(lambda x: ours(x)[1], xs))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_the_codebook_alone_still_gives_distances(make):
    theirs = make().eval()
    ours, x = accelerated(theirs), torch.randn(1, 5, 8)
    assert torch.equal(ours._codebook(x)[2], theirs._codebook(x)[2])
