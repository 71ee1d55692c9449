"""Requests as a pipeline hands them to its engine: guidance in an interval, callbacks, prefixes."""

import pytest
import torch

from vqfast import Engine, Pipeline
from vqfast.engine import Step
from vqfast.models import conditioning
from vqfast.models.gpt import GPT, GPTConfig
from vqfast.models.vqgan import VQGAN, VQGANConfig

CONFIG = VQGANConfig(
    ch=32, ch_mult=(1, 1), num_res_blocks=1, attn_resolutions=(), resolution=8,
    z_channels=8, n_embed=20, embed_dim=4,
)  # fmt: skip
T = 16


@pytest.fixture(scope="module")
def pipe():
    torch.manual_seed(0)
    tokenizer = VQGAN(CONFIG)
    gpt = GPT(GPTConfig(20, T, 2, 2, 16))
    with torch.no_grad():
        for p in gpt.parameters():
            p.normal_(0, 0.5)
    classes = {"kind": "class", "n_classes": 3, "null_class": 3}
    return Pipeline(tokenizer, gpt, conditioning.build(classes, tokenizer))


def test_guidance_counts_the_codes_of_the_image(pipe):
    options = {"classes": [1], "temperature": 0.0, "cfg_scale": 4.0}
    codes = pipe.sample_codes(**options, cfg_interval=(5, 9)).flatten(1)
    with torch.no_grad():
        c, u = (pipe.transformer(codes, torch.tensor([[k]])) for k in (1, 3))
    logits = c.clone()
    logits[:, 5:9] = (u + 4.0 * (c - u))[:, 5:9]
    assert torch.equal(logits.argmax(-1), codes)
    assert torch.equal(
        pipe.sample_codes(**options, cfg_interval=(0, T)), pipe.sample_codes(**options)
    )
    plain = pipe.sample_codes([1], temperature=0.0)
    assert torch.equal(pipe.sample_codes(**options, cfg_interval=(7, 7)), plain)
    given = pipe.sample_codes(**options, cfg_interval=(5, 9), prefix=codes[:, :7])
    assert torch.equal(given.flatten(1), codes)


def test_guidance_in_an_interval_knows_no_batch(pipe):
    options = {"n": 5, "seed": 1, "temperature": 2.0, "cfg_scale": 2.0, "cfg_interval": (3, 10)}
    whole = pipe.sample_codes(**options)
    assert torch.equal(pipe.sample_codes(**options, batch_size=2), whole)
    assert not torch.equal(pipe.sample_codes(**{**options, "cfg_interval": None}), whole)


@pytest.mark.parametrize("interval", [(T, T + 1), (3, 2), (0, 1, 2), "0:3", (0.5, 2)])
def test_an_interval_outside_the_image_is_refused(pipe, interval):
    with pytest.raises((ValueError, TypeError), match="cfg_interval"):
        pipe.sample_codes(n=0, cfg_scale=2.0, cfg_interval=interval)


@pytest.mark.parametrize("k", [0, 6])
def test_on_step_sees_images_batch_after_batch(pipe, k):
    seen: list[Step] = []
    options = {"n": 5, "first": 2, "seed": 4, "batch_size": 3, "temperature": 2.0}
    prefix = torch.arange(2 * k).view(2, k)
    codes = pipe.sample_codes(**options, prefix=prefix, on_step=seen.append)
    assert [s.images for s in seen] == [(2, 3, 4)] * (T - k) + [(5, 6)] * (T - k)
    assert [s.step for s in seen] == [*range(1, T - k + 1)] * 2
    for s in seen:
        assert s.steps == T - k and s.codes.shape == (len(s.images), 4, 4)
        drawn = k + s.step
        want = codes.flatten(1)[[i - 2 for i in s.images]]
        assert torch.equal(s.codes.flatten(1)[:, :drawn], want[:, :drawn])
        assert (s.codes.flatten(1)[:, drawn:] == -1).all()
    assert torch.equal(pipe.sample_codes(**options, prefix=prefix), codes)


@pytest.mark.parametrize("method", ["sample", "sample_codes"])
def test_what_on_step_raises_comes_out(pipe, method):
    def stop(step):
        raise LookupError("enough")

    with pytest.raises(LookupError, match="enough"):
        getattr(pipe, method)(n=2, on_step=stop)
    assert len(pipe.sample(n=2)) == 2
    with pytest.raises(TypeError, match="on_step"):
        pipe.sample_codes(n=0, on_step=3)


def test_a_prefix_goes_in_one_prefill_of_the_engine(pipe, monkeypatch):
    lengths, feed = [], Engine._feed

    def spy(self, tokens, *args, **options):
        lengths.append(tokens.shape[1])
        return feed(self, tokens, *args, **options)

    monkeypatch.setattr(Engine, "_feed", spy)
    pipe.sample_codes(n=2, prefix=torch.zeros(1, 12, dtype=torch.int64))
    assert lengths == [13, 1, 1, 1]
