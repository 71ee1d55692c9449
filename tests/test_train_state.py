"""Checkpoints of a run: exact round trips, whole at every moment, damage found."""

import os
import random

import numpy as np
import pytest
import torch
from torch import nn

from vqfast.errors import CheckpointError, NonFiniteError
from vqfast.train import state
from vqfast.train.ema import EMA


def net():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(32, 2))


def trained(optimizer_class=torch.optim.Adam, steps=3):
    model = net()
    optimizer = optimizer_class(model.parameters(), lr=1e-2, fused=True)
    for _ in range(steps):
        model(torch.randn(4, 3, 4, 4)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def one_more(model, optimizer):
    torch.manual_seed(5)
    model(torch.randn(4, 3, 4, 4)).square().mean().backward()
    optimizer.step()
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def test_module_and_optimizer_go_on_with_the_same_bits(tmp_path):
    model, optimizer = trained()
    tensors = state.module_tensors("m", model) | state.optimizer_tensors("o", optimizer, model)
    state.write(tmp_path, tensors, {"step": 3})
    read, meta = state.read(tmp_path)
    fresh, other = trained(steps=0)
    state.load_module("m", fresh, read, "x")
    state.load_optimizer("o", other, fresh, read, "x")
    assert meta == {"step": 3}
    assert torch.equal(one_more(model, optimizer), one_more(fresh, other))


def test_without_the_moments_the_bits_differ(tmp_path):
    """So the test above can fail."""
    model, optimizer = trained()
    fresh, other = trained(steps=0)
    state.load_module("m", fresh, state.module_tensors("m", model), "x")
    assert not torch.equal(one_more(model, optimizer), one_more(fresh, other))


def test_memory_format_of_weights_and_moments_is_kept():
    model = nn.Conv2d(8, 8, 3).to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    model(torch.randn(1, 8, 5, 5)).sum().backward()
    optimizer.step()
    saved = {n: x.contiguous() for n, x in state.optimizer_tensors("o", optimizer, model).items()}
    fresh = nn.Conv2d(8, 8, 3).to(memory_format=torch.channels_last)
    other = torch.optim.Adam(fresh.parameters(), fused=True)
    state.load_optimizer("o", other, fresh, saved, "x")
    moment = other.state[fresh.weight]["exp_avg"]
    assert moment.stride() == fresh.weight.stride()
    assert torch.equal(moment, optimizer.state[model.weight]["exp_avg"])


def test_random_states_come_back():
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    random.gauss(0, 1), np.random.randn()  # leaves a second value in both
    kept = state.rng_tensors(0)
    first = (random.gauss(0, 1), random.random(), np.random.randn(), torch.rand(3).tolist())
    random.seed(9), np.random.seed(9), torch.manual_seed(9)
    state.restore_rng(0, kept)
    assert first == (random.gauss(0, 1), random.random(), np.random.randn(), torch.rand(3).tolist())


def test_random_state_of_another_rank_is_left_alone():
    torch.manual_seed(3)
    kept = state.rng_tensors(1)
    torch.manual_seed(4)
    expected = torch.get_rng_state()
    state.restore_rng(0, kept)
    assert torch.equal(expected, torch.get_rng_state())


def test_what_does_not_fit_is_listed():
    tensors = state.module_tensors("m", net())
    wrong = dict(tensors)
    wrong["m.0.weight"] = torch.zeros(1)
    del wrong["m.3.bias"]
    wrong["m.new"] = torch.zeros(1)
    with pytest.raises(CheckpointError) as error:
        state.load_module("m", net(), wrong, "the file")
    for part in ("the file", r"m.0.weight is [1]", "missing m.3.bias", "unexpected m.new"):
        assert part in str(error.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_non_finite_tensor_is_not_saved(tmp_path, value):
    with pytest.raises(NonFiniteError, match="bad"):
        state.write(tmp_path, {"good": torch.ones(3), "bad": torch.tensor([1.0, value])}, {})
    assert not list(tmp_path.iterdir())


def test_equal_states_give_equal_bytes(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        tensors = {f"t{i}": torch.full((3,), float(i)) for i in range(9)}
        state.write(tmp_path / name, tensors, {"z": 1, "a": [2]})
    files = [(tmp_path / name / state.STATE_FILE).read_bytes() for name in "ab"]
    assert files[0] == files[1]


def test_every_flipped_or_missing_byte_is_found(tmp_path):
    state.write(tmp_path, {"x": torch.arange(20.0)}, {"step": 1})
    path = tmp_path / state.STATE_FILE
    whole = path.read_bytes()
    for at in range(0, len(whole), 7):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 16]) + whole[at + 1 :])
        with pytest.raises(CheckpointError):
            state.read(tmp_path)
        path.write_bytes(whole[:at])
        with pytest.raises(CheckpointError):
            state.read(tmp_path)
    path.write_bytes(whole)
    assert state.read(tmp_path)[1] == {"step": 1}


def fill(folder):
    (folder / "a").write_text("x")


def test_last_names_the_newest_and_old_ones_go(tmp_path):
    for step in (1, 2, 3):
        state.publish(tmp_path, step, fill)
        state.prune(tmp_path, 2)
        assert (tmp_path / "last").resolve().name == f"step_{step:08d}"
    assert [s for s, _ in state.candidates(tmp_path)] == [3, 2]
    assert not list(tmp_path.rglob(".tmp*"))


def test_pruning_never_takes_what_last_names(tmp_path):
    state.publish(tmp_path, 5, fill)
    for step in (6, 7):
        (tmp_path / "checkpoints" / f"step_{step:08d}").mkdir()
    state.prune(tmp_path, 1)
    assert [s for s, _ in state.candidates(tmp_path)] == [7, 5]


def test_a_failed_save_leaves_the_old_checkpoint(tmp_path):
    state.publish(tmp_path, 1, fill)

    def broken(folder):
        fill(folder)
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError):
        state.publish(tmp_path, 2, broken)
    assert [s for s, _ in state.candidates(tmp_path)] == [1]
    assert (tmp_path / "last" / "a").read_text() == "x"
    assert not list(tmp_path.rglob(".tmp*"))


def test_a_failed_delete_does_not_stop_training(tmp_path, monkeypatch, capsys):
    for step in (1, 2):
        state.publish(tmp_path, step, fill)

    def refuse(*_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "rename", refuse)
    state.prune(tmp_path, 1)
    assert "could not be removed" in capsys.readouterr().err
    assert len(state.candidates(tmp_path)) == 2


def test_a_copied_folder_named_last_is_a_checkpoint_and_is_kept(tmp_path):
    (tmp_path / "last").mkdir()
    fill(tmp_path / "last")
    assert state.candidates(tmp_path) == [(-1, tmp_path / "last")]
    state.publish(tmp_path, 4, fill)
    assert (tmp_path / "last").is_symlink()
    assert (tmp_path / "last_before_00000004" / "a").exists()


# ---- the average of the weights


def test_average_follows_the_formula():
    model = nn.Linear(2, 2)
    ema, expected = EMA(model, 0.9), {}
    for name, p in model.named_parameters():
        expected[name] = p.detach().clone().double()
    for n in range(1, 30):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p))
        ema.update()
        d = min(0.9, (1 + n) / (10 + n))
        for name, p in model.named_parameters():
            expected[name] = d * expected[name] + (1 - d) * p.detach().double()
    for name in expected:
        assert torch.allclose(ema.average[name].double(), expected[name], atol=1e-5)


def test_average_is_applied_and_taken_back_also_on_an_error():
    model = nn.BatchNorm1d(3)
    ema = EMA(model, 0.5)
    with torch.no_grad():
        model.weight.fill_(7)
    with pytest.raises(KeyError), ema.applied():
        assert model.weight.tolist() == [1, 1, 1]
        raise KeyError
    assert model.weight.tolist() == [7, 7, 7]
    assert ema.state()["weight"].tolist() == [1, 1, 1]
    assert "running_mean" in ema.state()
