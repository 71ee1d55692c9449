"""GPT: taming's names and arithmetic, what each row may see, and the training loss."""

import pytest
import torch
import torch.nn.functional as F

from vqfast.models.gpt import GPT, GPTConfig

SHAPE = {"vocab_size": 23, "block_size": 12, "n_layer": 2, "n_head": 3, "n_embd": 24}


def _gpt(**changes) -> GPT:
    gpt = GPT(GPTConfig(**{**SHAPE, **changes})).eval()
    with torch.no_grad():
        for p in gpt.parameters():  # biases and norms too, so that a dropped one shows
            p.normal_(0, 0.3)
    return gpt


def _tokens(B: int, T: int, V: int = 23) -> torch.Tensor:
    return torch.randint(V, (B, T))


def _plain(gpt: GPT, tokens: torch.Tensor) -> torch.Tensor:
    """The formulas of the paper on float64 copies of the weights."""
    w = {k: v.double() for k, v in gpt.state_dict().items()}
    B, S = tokens.shape
    H, E = gpt.config.n_head, gpt.config.n_embd
    x = w["tok_emb.weight"][tokens] + w["pos_emb"][:, :S]
    hidden = torch.full((S, S), -torch.inf, dtype=torch.float64).triu(1)
    for i in range(gpt.config.n_layer):
        b = f"blocks.{i}."
        y = F.layer_norm(x, (E,), w[b + "ln1.weight"], w[b + "ln1.bias"], 1e-5)
        q, k, v = (
            (y @ w[f"{b}attn.{n}.weight"].T + w[f"{b}attn.{n}.bias"])
            .view(B, S, H, E // H)
            .transpose(1, 2)
            for n in ("query", "key", "value")
        )
        p = (q @ k.transpose(2, 3) / (E // H) ** 0.5 + hidden).softmax(-1)
        y = (p @ v).transpose(1, 2).reshape(B, S, E)
        x = x + y @ w[b + "attn.proj.weight"].T + w[b + "attn.proj.bias"]
        y = F.layer_norm(x, (E,), w[b + "ln2.weight"], w[b + "ln2.bias"], 1e-5)
        y = y @ w[b + "mlp.0.weight"].T + w[b + "mlp.0.bias"]
        y = y * 0.5 * (1 + torch.erf(y / 2**0.5))
        x = x + y @ w[b + "mlp.2.weight"].T + w[b + "mlp.2.bias"]
    x = F.layer_norm(x, (E,), w["ln_f.weight"], w["ln_f.bias"], 1e-5)
    return x @ w["head.weight"].T


def test_state_dict_has_tamings_names_and_shapes():
    E, V = 24, 23
    found = {k: tuple(v.shape) for k, v in _gpt(n_layer=1).state_dict().items()}
    linear = {"attn.key": E, "attn.query": E, "attn.value": E, "attn.proj": E}
    expected = {"tok_emb.weight": (V, E), "pos_emb": (1, 12, E), "head.weight": (V, E)}
    for norm in ("ln_f", "blocks.0.ln1", "blocks.0.ln2"):
        expected |= {f"{norm}.weight": (E,), f"{norm}.bias": (E,)}
    for name, out in linear.items():
        expected |= {f"blocks.0.{name}.weight": (out, E), f"blocks.0.{name}.bias": (out,)}
    expected |= {"blocks.0.mlp.0.weight": (4 * E, E), "blocks.0.mlp.0.bias": (4 * E,)}
    expected |= {"blocks.0.mlp.2.weight": (E, 4 * E), "blocks.0.mlp.2.bias": (E,)}
    assert found == expected


def test_fresh_weights_are_normal_and_the_rest_neutral():
    gpt = GPT(GPTConfig(256, 16, n_layer=1, n_head=2, n_embd=128))
    for name, p in gpt.named_parameters():
        if p.dim() == 2:
            assert 0.018 < p.std().item() < 0.022, name
        else:
            neutral = 1.0 if "ln" in name and name.endswith("weight") else 0.0
            assert torch.equal(p, torch.full_like(p, neutral)), name
    assert gpt.head.weight.data_ptr() != gpt.tok_emb.weight.data_ptr()


@pytest.mark.parametrize("Tc", [1, 3])
def test_logits_are_the_formulas(Tc):
    gpt, cond, idx = _gpt(), _tokens(2, Tc), _tokens(2, 8)
    exact = _plain(gpt, torch.cat([cond, idx], 1)[:, :-1])[:, Tc - 1 :]
    with torch.no_grad():
        got = gpt(idx, cond)
    assert got.shape == (2, 8, 23)
    assert (got - exact).abs().max() < 2e-5 * exact.abs().max()


def test_row_t_sees_the_condition_and_the_tokens_before_t():
    gpt, cond, idx = _gpt(), _tokens(1, 2), _tokens(1, 6)
    with torch.no_grad():
        before = gpt(idx, cond)
        for t in range(6):
            other = idx.clone()
            other[0, t] = (idx[0, t] + 1) % 23
            after = gpt(other, cond)
            assert torch.equal(after[:, : t + 1], before[:, : t + 1])
            assert all((after[0, s] != before[0, s]).any() for s in range(t + 1, 6))
        assert (gpt(idx, (cond + 1) % 23) != before).any(-1).all()


def test_unmasked_positions_see_one_another():
    gpt, cond, idx = _gpt(n_unmasked=3), _tokens(1, 1), _tokens(1, 6)
    other = idx.clone()
    other[0, 1] = (idx[0, 1] + 1) % 23  # position 2, inside the unmasked square
    later = idx.clone()
    later[0, 2] = (idx[0, 2] + 1) % 23  # position 3, outside
    with torch.no_grad():
        before = gpt(idx, cond)
        assert (gpt(other, cond)[0, 0] != before[0, 0]).any()
        assert torch.equal(gpt(later, cond)[:, :3], before[:, :3])


def test_the_block_size_is_the_most_that_fits():
    gpt = _gpt()
    assert gpt(_tokens(1, 11), _tokens(1, 2)).shape == (1, 11, 23)
    with pytest.raises(ValueError, match="block_size = 12"):
        gpt(_tokens(1, 12), _tokens(1, 2))


@pytest.mark.parametrize(
    ("idx", "cond", "error", "said"),
    [
        (torch.zeros(1, 3), torch.zeros(1, 1, dtype=torch.long), TypeError, "idx.*float32"),
        (torch.tensor([[1, 23]]), torch.tensor([[0]]), ValueError, "idx.*0..22.*23"),
        (torch.tensor([[1, 2]]), torch.tensor([[-1]]), ValueError, "cond.*-1"),
        (torch.tensor([[1, 2]]), torch.tensor([[0], [1]]), ValueError, "cond.*1 rows.*2"),
        (torch.tensor([[1, 2]]), torch.zeros(1, 0, dtype=torch.long), ValueError, "at least one"),
        (torch.tensor([1, 2]), torch.tensor([[0]]), ValueError, "idx.*2 dimensions"),
    ],
)
def test_wrong_tokens_are_named(idx, cond, error, said):
    with pytest.raises(error, match=said):
        _gpt()(idx, cond)


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"n_head": 5}, ValueError, "n_head"),
        ({"n_layer": 0}, ValueError, "n_layer"),
        ({"vocab_size": "9"}, TypeError, "vocab_size"),
        ({"attn_pdrop": 1.0}, ValueError, "attn_pdrop"),
        ({"n_unmasked": 13}, ValueError, "n_unmasked"),
    ],
)
def test_wrong_configurations_are_named(change, error, said):
    with pytest.raises(error, match=said):
        GPTConfig(**{**SHAPE, **change})


def test_config_dict_round_trip_is_strict():
    config = GPTConfig(**SHAPE, n_unmasked=2, attn_pdrop=0.1)
    assert GPTConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match="n_heads"):
        GPTConfig.from_dict({**SHAPE, "n_heads": 2})
    with pytest.raises(ValueError, match="block_size"):
        GPTConfig.from_dict({"vocab_size": 3})


def test_loss_is_the_mean_over_image_tokens():
    gpt, cond, idx = _gpt(), _tokens(3, 4), _tokens(3, 7)
    expected = F.cross_entropy(gpt(idx, cond).reshape(-1, 23), idx.reshape(-1))
    torch.testing.assert_close(gpt.loss(idx, cond), expected)
    torch.testing.assert_close(gpt.loss(idx, cond, pkeep=0.0), expected)  # evaluation keeps all


@pytest.mark.parametrize("pkeep", [0.0, 0.5])
def test_pkeep_replaces_inputs_and_never_targets_or_condition(pkeep, monkeypatch):
    gpt, cond, idx = _gpt().train(), _tokens(2, 2), _tokens(2, 9)
    read = []
    features = gpt.features
    monkeypatch.setattr(gpt, "features", lambda i, c: read.append((i, c)) or features(i, c))
    draw = torch.Generator().manual_seed(3)
    loss = gpt.loss(idx, cond, pkeep=pkeep, generator=draw)
    ((seen, seen_cond),) = read
    assert torch.equal(seen_cond, cond)
    kept = (seen == idx).float().mean().item()
    assert abs(kept - (pkeep + (1 - pkeep) / 23)) < 0.35 and kept < 1
    expected = F.cross_entropy(gpt(seen, cond).reshape(-1, 23), idx.reshape(-1))
    torch.testing.assert_close(loss, expected)
    again = gpt.loss(idx, cond, pkeep=pkeep, generator=torch.Generator().manual_seed(3))
    assert torch.equal(loss, again)


def test_pkeep_outside_0_to_1_is_refused():
    with pytest.raises(ValueError, match="pkeep"):
        _gpt().loss(_tokens(1, 3), _tokens(1, 1), pkeep=1.5)


def test_gradients_reach_every_weight():
    gpt = _gpt()
    gpt.loss(_tokens(2, 11), _tokens(2, 2)).backward()
    for name, p in gpt.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.any(), name


def test_dropout_works_in_training_only():
    plain, dropping = _gpt(), _gpt(attn_pdrop=0.5, resid_pdrop=0.1, embd_pdrop=0.1)
    dropping.load_state_dict(plain.state_dict())
    idx, cond = _tokens(2, 5), _tokens(2, 1)
    with torch.no_grad():
        torch.testing.assert_close(dropping(idx, cond), plain(idx, cond))
        assert not torch.allclose(dropping.train()(idx, cond), plain(idx, cond), atol=1e-3)


def test_only_linear_weights_decay():
    gpt = _gpt()
    decayed, free = gpt.decay_groups(0.02)
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.02, 0.0)
    names = {id(p): n for n, p in gpt.named_parameters()}
    found = {names[id(p)] for p in decayed["params"]}
    assert found == {
        n
        for n in names.values()
        if n == "head.weight" or (n.endswith("weight") and (".attn." in n or ".mlp." in n))
    }
    assert len(decayed["params"]) + len(free["params"]) == len(names)
