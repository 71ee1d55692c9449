"""Stage 1: train a VQGAN on images; the objective is `vqfast.losses.Stage1Loss`.

The autoencoder runs once per pass, and perceptual net and discriminator are differentiated once,
down to x̂: the same mathematics as taming's extra backward passes for its adaptive weight. What
differs is a choice, `discriminator_pass`: by default ("shared") the discriminator sees the
reconstructions of the one forward, with "taming" those made after the autoencoder's step, by a
second forward, as taming has it. Before
`disc_start` the discriminator is not run at all and its loss is 0.

Under torchrun the adaptive weight is each rank's own, as in taming; gradients are averaged by
torch's DistributedDataParallel, around the VQGAN and around the discriminator's loss.
Source: arXiv:2012.09841 section 3.1; CompVis/taming-transformers taming/models/vqgan.py.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from vqfast.checkpoints import native
from vqfast.config import ConfigError
from vqfast.errors import CheckpointError
from vqfast.losses import Stage1Loss
from vqfast.metrics import perplexity, psnr, usage
from vqfast.models.vqgan import VQGAN, VQGANConfig
from vqfast.train import runner, schedule
from vqfast.train.adam import Adam
from vqfast.train.distributed import World
from vqfast.train.ema import EMA
from vqfast.train.feed import ImageFeed, held_out_images, open_sources
from vqfast.train.settings import DataSection, LossSection, TokenizerTrain
from vqfast.train.stage import BadStep, Stage, clip
from vqfast.train.taming_yaml import translate_tokenizer

__all__ = ["TokenizerConfig", "TokenizerStage", "run"]

_GRID = 8  # images of a reconstruction grid
_USAGE_STEPS = 100  # a code counts as used if it was chosen within that many steps
_DEFAULT_RATE = 1e-4


@dataclass
class TokenizerConfig:
    """The file of `vqfast train tokenizer`. `model` is a VQGANConfig; its resolution is data.size
    unless given.
    """

    model: VQGANConfig = field(default_factory=VQGANConfig)
    loss: LossSection = field(default_factory=LossSection)
    data: DataSection = field(default_factory=DataSection)
    train: TokenizerTrain = field(default_factory=TokenizerTrain)

    translate = staticmethod(translate_tokenizer)

    def __post_init__(self) -> None:
        kind = self.model.quantizer
        if self.train.revive_after and kind != "vq":
            raise ValueError(f"train.revive_after: must be 0 for quantizer {kind}")
        if self.train.temperature is not None and kind != "gumbel":
            raise ValueError(f"train.temperature: must be null for quantizer {kind}")

    @staticmethod
    def complete(tree: dict) -> dict:
        """model.resolution and data.size default to each other."""
        model, data = tree.get("model"), tree.get("data", {})
        model = {} if model is None else model
        if not isinstance(model, dict) or not isinstance(data, dict):
            return tree
        side = data.get("size") or model.get("resolution") or VQGANConfig.resolution
        model = {"resolution": side, **model}
        return {**tree, "model": model, "data": {**data, "size": data.get("size") or side}}


class _Critic(nn.Module):
    """The discriminator's loss as a module, so that DistributedDataParallel sees one forward per
    backward.
    """

    def __init__(self, loss: Stage1Loss):
        super().__init__()
        self.loss = loss

    def forward(self, x: Tensor, x_hat: Tensor, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        out = self.loss.discriminate(x, x_hat, step)
        return out.total, out.parts


class TokenizerStage(Stage):
    """One VQGAN in training. `model` is the first VQGAN that it builds."""

    kind = "tokenizer"

    def __init__(self, config: TokenizerConfig, world: World, held: Tensor | None):
        super().__init__(world, config.train.precision)
        self.config, self._held = config, held
        train = config.train
        self.model = VQGAN(config.model).to(world.device)
        self._net = world.wrap(self.model)
        self.loss = self._build_loss().to(world.device)
        self.loss.to(memory_format=torch.channels_last)
        self._critic = world.wrap(_Critic(self.loss))
        rate = schedule.base_rate(train, config.data.batch_size, world.size, _DEFAULT_RATE)
        self._rates = {"model": rate, "discriminator": train.disc_learning_rate or rate}
        self._weights: dict[str, list[nn.Parameter]] = {}
        self._add("model", self.model)
        if self.loss.discriminator is not None:
            self._add("discriminator", self.loss.discriminator)
        if train.ema_decay:
            self.ema = EMA(self.model, train.ema_decay)
        # the step at which each code was last chosen; before the first, long ago
        self.extra["last_used"] = torch.full(
            (config.model.n_embed,), -_USAGE_STEPS - 1, dtype=torch.int64, device=world.device
        )
        self._latents = torch.empty(0)
        if train.revive_after:
            self.model.quant_conv.register_forward_hook(self._keep_latents)
        if train.compile:
            # the adaptive weight walks through the decoder's graph before the backward pass does
            torch._functorch.config.donated_buffer = False
            self.model.encoder.compile()
            self.model.decoder.compile()

    def _build_loss(self) -> Stage1Loss:
        model, section = self.config.model, dataclasses.asdict(self.config.loss)
        try:
            return Stage1Loss(in_channels=model.out_ch, image_size=self.config.data.size, **section)
        except ValueError as error:
            raise ConfigError(f"loss.{error}") from None
        except CheckpointError as error:
            raise CheckpointError(
                f"{error}. Pass loss.perceptual_weights=FILE for the trunk and "
                "loss.perceptual_heads=FILE (or none) for the heads, or loss.perceptual_weight=0"
            ) from None

    def _add(self, name: str, module: nn.Module) -> None:
        self.modules[name] = module
        weights = self._weights[name] = [p for p in module.parameters() if p.requires_grad]
        rate, betas = self._rates[name], self.config.train.betas
        self.optimizers[name] = (
            Adam(weights, lr=rate, betas=betas),
            module,
        )

    def _keep_latents(self, _: nn.Module, __: Any, output: Tensor) -> None:
        self._latents = output.detach()

    # ---- one step

    def step(self, step: int, batches: Sequence[Mapping[str, Any]]) -> dict[str, Tensor | float]:
        """One update of both networks. BadStep, with everything put back, if anything is not
        finite.
        """
        train, loss = self.config.train, self.config.loss
        images = [
            b["image"].to(self.world.device, memory_format=torch.channels_last, non_blocking=True)
            for b in batches
        ]
        self._before(step, images[0])
        kept, rows = self.snapshot(), []
        critic_on = "discriminator" in self.modules and step >= loss.disc_start
        shared = train.discriminator_pass == "shared"
        try:
            for i, x in enumerate(images):
                with self._sync(self._net, i + 1 == len(images)):
                    rows.append(self._generator_pass(x, step, len(images)))
            nets = ["model", "discriminator"] if critic_on and shared else ["model"]
            if critic_on and shared:
                self._critic_passes(images, [row["x_hat"] for row in rows], rows, step)
            norm = self._update(nets, rows)["model"]
            if critic_on and not shared:
                kept = self.snapshot()
                self._critic_passes(images, [self._reconstruct(x) for x in images], rows, step)
                self._update(["discriminator"], rows)
        except BadStep as error:
            self.refuse(kept, error)
            raise
        self.scaler.update()
        return self._metrics(step, rows, norm)

    def _before(self, step: int, x: Tensor) -> None:
        """What depends on the step alone: rates, temperature, and the first look of ActNorm."""
        train = self.config.train
        for name, (optimizer, _) in self.optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = schedule.rate(step, self._rates[name], train)
        self.train_mode(True)
        if train.temperature is not None:
            first, last = train.temperature
            done = min(1.0, step / train.temperature_steps)
            quantize: Any = self.model.quantize
            quantize.temperature = first + (last - first) * done
        critic = self.loss.discriminator
        if critic is not None and self.config.loss.disc_norm == "actnorm" and step == 0:
            with torch.no_grad():  # scales from rank 0's first images, on every rank
                critic(x)
                for weight in critic.state_dict().values():
                    self.world.broadcast(weight)

    @staticmethod
    def _sync(net: Any, last: bool) -> contextlib.AbstractContextManager:
        """Gradients are averaged over the ranks in the last pass of a step only."""
        wrapped = isinstance(net, nn.parallel.DistributedDataParallel)
        return net.no_sync() if wrapped and not last else contextlib.nullcontext()

    def _generator_pass(self, x: Tensor, step: int, passes: int) -> dict[str, Tensor]:
        """Forward and backward of the autoencoder; the components of its loss, x̂ and the codes,
        without gradient.
        """
        with self.autocast():
            x_hat, codebook, info = self._net(x)
            out = self.loss.generator(x, x_hat, codebook, self.model.last_layer, step)
        self.scaler.scale(out.total / passes).backward()
        return {
            "rec_loss": out.parts["rec"],
            "p_loss": out.parts["perceptual"],
            "nll_loss": out.nll,
            "g_loss": out.parts["gan"],
            "quant_loss": out.parts["codebook"],
            "d_weight": out.d_weight,
            "loss": out.total.detach(),
            "x_hat": x_hat.detach().float(),
            "indices": info["indices"].reshape(-1),
        }

    @torch.no_grad()
    def _reconstruct(self, x: Tensor) -> Tensor:
        """x̂ of the updated autoencoder. An EMA codebook does not count this second look."""
        frozen = self.config.model.quantizer == "ema"
        self.model.quantize.train(not frozen)
        with self.autocast():
            x_hat = self.model(x)[0].float()
        self.model.quantize.train(True)
        return x_hat

    def _critic_passes(
        self, images: Sequence[Tensor], fakes: Sequence[Tensor], rows: Sequence[dict], step: int
    ) -> None:
        for i, (x, fake, row) in enumerate(zip(images, fakes, rows, strict=True)):
            with self._sync(self._critic, i + 1 == len(images)):
                with self.autocast():
                    value, parts = self._critic(x, fake, step)
                self.scaler.scale(value / len(images)).backward()
            row["disc_loss"] = parts["gan"]
            row |= {name: parts[name] for name in ("logits_real", "logits_fake")}

    def _update(
        self, nets: Sequence[str], rows: Sequence[Mapping[str, Tensor]]
    ) -> dict[str, Tensor]:
        """Guard, clip and step; the gradient norms. BadStep before any weight of `nets` moves."""
        norms = {net: self.unscaled_norm(net) for net in nets}
        parts: dict[str, Tensor] = {}

        def total(name: str) -> Tensor:
            return cast(Tensor, sum(row[name] for row in rows))  # there is one row at least

        if "model" in nets:
            names = ("rec_loss", "p_loss", "quant_loss", "g_loss", "d_weight")
            said = ("rec loss", "perceptual loss", "codebook loss", "gan loss", "gan weight")
            for name, label in zip(names, said, strict=True):
                parts[label] = total(name)
            parts["rec gradient"] = norms["model"]
        if "discriminator" in nets:
            parts["gan discriminator loss"] = total("disc_loss")
            parts["gan discriminator gradient"] = norms["discriminator"]
        self.check(parts)
        for net in nets:
            clip(self._weights[net], norms[net], self.config.train.grad_clip)
            optimizer, _ = self.optimizers[net]
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if "model" in nets and self.ema is not None:
            self.ema.update()
        return norms

    def _metrics(self, step: int, rows: list[dict], norm: Tensor) -> dict[str, Tensor | float]:
        K, last = self.config.model.n_embed, self.extra["last_used"]
        indices = torch.cat([row.pop("indices") for row in rows])
        for row in rows:
            del row["x_hat"]
        counts = self.world.sum(torch.bincount(indices, minlength=K))
        last.masked_fill_(counts > 0, step)
        share = counts / counts.sum()
        names = dict.fromkeys(name for row in rows for name in row)
        out: dict[str, Tensor | float] = {
            name: torch.stack([row[name].float() for row in rows]).mean() for name in names
        }
        out.setdefault("disc_loss", 0.0)
        out["disc_factor"] = self.loss.gan_factor(step)
        out["perplexity"] = torch.exp(-torch.special.xlogy(share, share).sum())
        out["usage"] = (last > step - _USAGE_STEPS).float().mean()
        out["grad_norm"] = norm
        out["lr"] = self.optimizers["model"][0].param_groups[0]["lr"]
        if self.config.train.revive_after:
            out["revived"] = float(self._revive(step))
        return out

    @torch.no_grad()
    def _revive(self, step: int) -> int:
        """Move each code that was not chosen for `revive_after` steps onto a latent of this
        batch.
        """
        last, every = self.extra["last_used"], self.config.train.revive_after
        if (step + 1) % every:
            return 0
        dead = (last <= step - every).nonzero().reshape(-1)
        z = self._latents.movedim(1, -1).reshape(-1, self.config.model.embed_dim).float()
        dead = dead[: z.shape[0]]
        if not len(dead):
            return 0
        rows = z[torch.randperm(z.shape[0])[: len(dead)].to(z.device)]
        quantize: Any = self.model.quantize
        weight = quantize.embedding.weight
        weight[dead] = self.world.broadcast(rows.contiguous()).to(weight.dtype)
        for slot, value in self.optimizers["model"][0].state.get(weight, {}).items():
            if slot != "step":
                value[dead] = 0
        if self.ema is not None:
            self.ema.average["quantize.embedding.weight"][dead] = weight[dead]
        last[dead] = step
        return len(dead)

    # ---- what is written

    def write_model(self, folder: Path, step: int) -> None:
        tensors = self.ema.state() if self.ema is not None else self.model.state_dict()
        native.write(
            folder,
            "tokenizer",
            self.config.model.to_dict(),
            tensors,
            {"step": step, "stage": self.kind},
        )

    @contextlib.contextmanager
    def _for_use(self) -> Iterator[None]:
        self.train_mode(False)
        average = self.ema.applied() if self.ema is not None else contextlib.nullcontext()
        with average, torch.no_grad(), self.autocast():
            yield

    def validate(self) -> dict[str, float]:
        """rec_loss, p_loss, psnr, perplexity and usage over the held-out images."""
        if self._held is None:
            return {}
        size, totals = (
            self.config.data.batch_size,
            dict.fromkeys(("rec_loss", "p_loss", "psnr"), 0.0),
        )
        counts = torch.zeros(self.config.model.n_embed, dtype=torch.int64)
        with self._for_use():
            for x in self._held.split(size):
                x = x.to(self.world.device)
                x_hat, _, info = self.model(x)
                x_hat = x_hat.float()
                totals["rec_loss"] += (x - x_hat).abs().mean().item() * len(x)
                totals["psnr"] += float(psnr(x, x_hat.clamp(-1, 1)).sum())
                if self.loss.perceptual is not None:
                    totals["p_loss"] += self.loss.perceptual(x, x_hat).float().mean().item() * len(
                        x
                    )
                counts += torch.bincount(info["indices"].reshape(-1).cpu(), minlength=len(counts))
        out = {name: value / len(self._held) for name, value in totals.items()}
        return out | {"perplexity": perplexity(counts), "usage": usage(counts)}

    def pictures(self) -> dict[str, Tensor]:
        if self._held is None:
            return {}
        x = self._held[:_GRID].to(self.world.device)
        with self._for_use():
            x_hat = self.model.to_rgb(self.model(x)[0].float())
        return {"inputs": x.cpu(), "reconstructions": x_hat.cpu()}

    def describe(self, batch: Mapping[str, Any]) -> list[str]:
        x = batch["image"].to(self.world.device)
        with self._for_use():
            x_hat, _, info = self.model(x)
        shapes = (
            f"images {list(x.shape)} -> codes {list(info['indices'].shape)} -> {list(x_hat.shape)}"
        )
        parts = [f"{n} {sum(p.numel() for p in m.parameters()):,}" for n, m in self.modules.items()]
        return [shapes, f"parameters: {', '.join(parts)}"]


def _identity(stage: TokenizerStage) -> dict[str, Any]:
    """What a resume may not change: it would no longer be the same run."""
    config = stage.config
    keep: dict[str, Any] = {f"model.{k}": v for k, v in config.model.to_dict().items()}
    for section, names in {
        "data": ("size", "batch_size", "crop", "min_crop", "flip", "val_fraction"),
        "train": ("seed", "accumulate"),
        "loss": ("disc_num_layers", "disc_channels", "disc_norm"),
    }.items():
        keep |= {f"{section}.{n}": getattr(getattr(config, section), n) for n in names}
    return keep | {"processes": stage.world.size}


def _build(
    config: TokenizerConfig, world: World, out: Path | None
) -> tuple[TokenizerStage, ImageFeed]:
    train, data = config.train, config.data
    source, held = open_sources(data)
    assert data.size is not None  # `complete` has set it
    feed = ImageFeed(source, data, data.size, train.seed, world, train.accumulate)
    needed = train.val_images if train.val_every else _GRID if train.images_every else 0
    pictures = held or (source if train.images_every else None)
    shown = held_out_images(pictures, data.size, needed, warn=held is not None)
    return TokenizerStage(config, world, shown), feed


def run(
    config_path: str | Path,
    overrides: Sequence[str] = (),
    *,
    data: str | Path | None = None,
    out: str | Path | None = None,
    resume: str = "auto",
    max_steps: int | None = None,
    device: str = "auto",
    precision: str | None = None,
    dry_run: bool = False,
    print_config: bool = False,
) -> int:
    """Train a tokenizer, as `vqfast train tokenizer` does.

    Args:
        config_path: YAML; overrides: `key=value`; data, precision: as the keys data.path and
            train.precision.
        out: the run folder; needed unless dry_run or print_config.
        resume: "auto", "none" or a path; max_steps: where to stop, train.max_steps by default.
        device: "auto", "cpu", "cuda" or "cuda:N".
        dry_run: build everything, run one batch forward, print sizes, write nothing.
        print_config: print the merged configuration and leave.

    Returns:
        0; 143 or 130 after a signal and a save.

    Raises:
        ConfigError, DataError, CheckpointError, NonFiniteError.
    """
    return runner.run(
        runner.Kind(TokenizerConfig, _build, _identity),
        config_path,
        overrides,
        runner.Options(data, out, resume, max_steps, device, precision, dry_run, print_config),
    )
