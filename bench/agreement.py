"""Is a contestant of a network right? Held against plain torch before it is timed, so that nobody
is beaten, or beats us, who computes something else.

    encode, decode     the first image against the same network in float64: codes that differ, or
                       the largest error, by what plain torch at the same dtype has (tolerances.py)
    train_tokenizer    the losses of the first two steps against those of plain torch in float32:
                       the second are those after one update of both networks
    train_transformer  the first loss against ours, of those marked `same_weights`

The plain network is baselines/_plain_vqgan.py; its step _plain_training.py.
"""

from collections.abc import Callable, Mapping
from typing import Any

from baselines import Told, _plain_training, _plain_vqgan
from torch import Tensor

from vqfast.testing import compare, tolerances

STEPS = 2


class WrongResultError(RuntimeError):
    """A contestant computes something else; the text says how far it is off."""


class Judge:
    """Knows what one case should give; `require` runs a contestant of it."""

    def __init__(self, measure: str, inputs: tuple, device: str):
        self.measure, self.device = measure, device
        self._plain: dict[str, Any] = {}
        if measure in ("encode", "decode"):
            model, data = inputs
            self.batch, self.inputs = len(data), (model, data[:1])
            self.truth = self._exact()
        elif measure == "train_tokenizer":
            self.inputs = inputs

    def _exact(self) -> Tensor:
        model, data = self.inputs
        net = _plain_vqgan.PlainVQGAN(model.config, model.state_dict())
        net = net.to(self.device).double().requires_grad_(False)
        data = data.to(self.device)
        return getattr(net, self.measure)(data.double() if data.is_floating_point() else data)

    def require(self, run: Callable[[], Any], dtype: str) -> None:
        """WrongResultError unless `run` is right. A training step is run twice, all else once."""
        if self.measure == "train_tokenizer":
            again = getattr(run, "looks_again", False)
            self._same_losses(_losses(run, again, dtype), self._right_losses(again, dtype), dtype)
        elif self.measure in ("encode", "decode"):
            self._same_result(run(), dtype)
        else:
            self._same_loss(run, dtype)

    def _same_loss(self, run: Callable[[], Any], dtype: str) -> None:
        loss = float(run())
        # ours runs first
        right = self._plain.setdefault(f"first loss {dtype}", loss)
        if not getattr(run, "same_weights", False):
            return
        if not abs(loss - right) <= tolerances.SAME_LOSS[_plain_vqgan.DTYPES[dtype]] * abs(right):
            raise WrongResultError(f"has a first loss of {loss:.6f}, ours {right:.6f}")

    def _same_result(self, out: Tensor, dtype: str) -> None:
        if dtype not in self._plain:
            told = Told("", dtype, self.device)
            self._plain[dtype] = _plain_vqgan.contestant(self.measure, told, self.inputs)()
        plain, exact = self._plain[dtype], self.truth
        shape = (self.batch, *exact.shape[1:])
        if out.numel() != self.batch * exact[0].numel():
            raise WrongResultError(f"gives {list(out.shape)}, not {list(shape)}")
        first = out.reshape(shape)[:1]  # taming's codes are flat
        if self.measure == "decode":
            ratio = compare.budget_ratio(first, plain, exact, tolerances.FORWARD)
            if ratio > 1:
                raise WrongResultError(f"is off by {ratio:.2g} times what is allowed")
            return
        theirs, allowed = ((x != exact).double().mean().item() for x in (first, plain))
        allowed = tolerances.FORWARD * allowed + tolerances.NETWORK_CODES
        if theirs > allowed:
            raise WrongResultError(f"{theirs:.1%} of its codes are others, allowed {allowed:.1%}")

    def _right_losses(self, looks_again: bool, dtype: str) -> list[dict[str, float]]:
        """taming's discriminator looks at what the updated autoencoder makes."""
        key = f"again {looks_again} {dtype}"
        if key not in self._plain:
            told = Told("", "fp32", self.device)
            run = _plain_training.contestant(told, *self.inputs, looks_again=looks_again)
            self._plain[key] = _losses(run, looks_again, dtype)
        return self._plain[key]

    @staticmethod
    def _same_losses(found: list[dict], right: list[dict], dtype: str) -> None:
        limit = tolerances.FIRST_LOSSES[_plain_vqgan.DTYPES[dtype]]
        for step, (mine, plain) in enumerate(zip(found, right, strict=True)):
            for name, value in plain.items():
                # rounding to bfloat16 moves the few logits of one small image: plain torch's own
                # value by up to 16 % over eight seeds, the generator's loss by 2 %
                if name == "disc_loss" and dtype != "fp32":
                    continue
                if not abs(mine[name] - value) <= limit * abs(value):
                    raise WrongResultError(
                        f"has {name} {mine[name]:.6g} in step {step}, plain torch {value:.6g}"
                    )


def _losses(
    run: Callable[[], Mapping[str, Any]], looks_again: bool, dtype: str
) -> list[dict[str, float]]:
    """What the first steps say. Once a first update has been made, a discriminator of a few logits
    swings with any rounding: then the generator's loss alone counts, and in bfloat16 its part
    without the discriminator, as the adaptive weight carries the swing into the rest (one image of
    256 px: 9 % of taming's loss, 1 % of this part).
    """
    steps = [run() for _ in range(STEPS)]
    first = {"loss"} if looks_again else {"loss", "disc_loss"}
    said = (first, {"loss" if dtype == "fp32" else "nll_loss"})
    return [{n: float(step[n]) for n in names} for step, names in zip(steps, said, strict=True)]
