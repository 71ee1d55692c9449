"""Stage 2: train a GPT on the codes of a frozen tokenizer.

    L = mean over image tokens of −log p(code_t | condition, codes before t)

The condition is a class, a start token, or the codes of another picture. With `pkeep` < 1 some
input codes are replaced by random ones, targets stay clean; with `class_dropout` some labels become
the null class, which classifier-free guidance needs. `OUT/last` is a whole pipeline: tokenizer,
transformer and conditioning.

Source: arXiv:2012.09841 section 3.2; CompVis/taming-transformers taming/models/cond_transformer.py.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vqfast.checkpoints import native
from vqfast.config import ConfigError
from vqfast.data.codes import CodesDataset
from vqfast.engine import Engine
from vqfast.models import conditioning as conditions
from vqfast.models.gpt import GPT, GPTConfig
from vqfast.models.vqgan import VQGAN
from vqfast.train import codes, runner, schedule
from vqfast.train.distributed import World
from vqfast.train.ema import EMA
from vqfast.train.feed import ImageFeed, open_sources
from vqfast.train.loop import Feed
from vqfast.train.settings import DataSection, TransformerModel, TransformerTrain
from vqfast.train.stage import BadStep, Stage, clip
from vqfast.train.taming_yaml import translate_transformer

__all__ = ["TransformerConfig", "TransformerStage", "run"]

_DEFAULT_RATE = 3e-4


@dataclass
class TransformerConfig:
    """The file of `vqfast train transformer`; `tokenizer` is also the flag --tokenizer."""

    model: TransformerModel = field(default_factory=TransformerModel)
    data: DataSection = field(default_factory=DataSection)
    train: TransformerTrain = field(default_factory=TransformerTrain)
    tokenizer: str | None = None

    translate = staticmethod(translate_transformer)


class _Objective(nn.Module):
    """The loss as a module, so that DistributedDataParallel sees one forward per backward."""

    def __init__(self, gpt: GPT, pkeep: float):
        super().__init__()
        self.gpt, self.pkeep = gpt, pkeep

    def forward(self, idx: Tensor, cond: Tensor) -> Tensor:
        return self.gpt.loss(idx, cond, pkeep=self.pkeep)


class TransformerStage(Stage):
    """One GPT in training on the codes of `encoder.tokenizer`."""

    kind = "transformer"

    def __init__(
        self,
        config: TransformerConfig,
        world: World,
        encoder: codes.Encoder,
        conditioning: Any,
        held: CodesDataset | None,
    ):
        super().__init__(world, config.train.precision)
        self.config, self._encoder, self._held = config, encoder, held
        self.tokenizer, self.conditioning = encoder.tokenizer, conditioning
        train = config.train
        assert config.data.size is not None
        side = config.data.size // self.tokenizer.config.factor
        self._grid = (side, side)
        self.tokens_per_image = side * side
        self.model = GPT(self._gpt_config()).to(world.device)
        self._net = world.wrap(_Objective(self.model, train.pkeep))
        if train.compile:
            self.model.blocks.compile()
        self.modules["model"] = self.model
        self._weights = list(self.model.parameters())
        self._rate = schedule.base_rate(train, config.data.batch_size, world.size, _DEFAULT_RATE)
        optimizer = torch.optim.AdamW(
            self.model.decay_groups(train.weight_decay),
            lr=self._rate,
            betas=train.betas,
            fused=True,
        )
        self.optimizers["model"] = (optimizer, self.model)
        if train.ema_decay:
            self.ema = EMA(self.model, train.ema_decay)

    def _gpt_config(self) -> GPTConfig:
        """vocab_size and block_size follow from tokenizer, condition and grid unless the file
        gives them.
        """
        model, condition = asdict(self.config.model), self.conditioning.to_dict()
        tokens = self._grid[0] * self._grid[1]
        tokens += self.conditioning.length(self._grid) - 1
        highest = (
            condition.get("null_class")
            or condition.get("sos_token")
            or condition.get("n_classes", 1) - 1
        )
        if condition["kind"] == "tokenizer":
            highest = condition["config"]["n_embed"] - 1
        needed = {"vocab_size": max(self.tokenizer.n_codes, highest + 1), "block_size": tokens}
        for name, least in needed.items():
            if model[name] is None:
                model[name] = least
            elif model[name] < least:
                raise ConfigError(f"model.{name}: must be at least {least} here, got {model[name]}")
        names = GPTConfig.__dataclass_fields__
        return GPTConfig(**{name: value for name, value in model.items() if name in names})

    # ---- one step

    def _tokens(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Image codes [B, T] and condition tokens [B, Tc] of a batch, on the device."""
        device = self.world.device
        if "codes" in batch:
            image = batch["codes"]
        else:
            image = self._encoder.codes(batch["image"]).flatten(1)
        if "condition" in batch:
            condition = batch["condition"]
        elif self.conditioning.kind == "class":
            condition = self.conditioning.encode(batch["label"])
            null = self.conditioning.null(len(condition))
            if self.model.training and null is not None:
                drop = torch.rand(len(condition), 1) < self.config.train.class_dropout
                condition = torch.where(drop, null, condition)
        else:
            condition = self.conditioning.encode(len(image))
        return image.to(device), condition.to(device)

    def step(self, step: int, batches: Sequence[Mapping[str, Any]]) -> dict[str, Tensor | float]:
        """One update. BadStep, with everything put back, if loss or gradient is not finite."""
        train, (optimizer, _) = self.config.train, self.optimizers["model"]
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate(step, self._rate, train)
        self.train_mode(True)
        kept, total = self.snapshot(), torch.zeros((), device=self.world.device)
        try:
            for i, batch in enumerate(batches):
                image, condition = self._tokens(batch)
                last = i + 1 == len(batches)
                net: Any = self._net
                wrapped = isinstance(net, nn.parallel.DistributedDataParallel)
                sync = contextlib.nullcontext() if last or not wrapped else net.no_sync()
                with sync:
                    with self.autocast():
                        value = self._net(image, condition) / len(batches)
                    self.scaler.scale(value).backward()
                total += value.detach()
            norm = self.unscaled_norm("model")
            self.check({"cross-entropy loss": total, "cross-entropy gradient": norm})
        except BadStep as error:
            self.refuse(kept, error)
            raise
        clip(self._weights, norm, train.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        self.scaler.update()
        if self.ema is not None:
            self.ema.update()
        rate = optimizer.param_groups[0]["lr"]
        return {"loss": total, "grad_norm": norm, "lr": rate}

    # ---- what is written

    def write_model(self, folder: Path, step: int) -> None:
        gpt = self.ema.state() if self.ema is not None else self.model.state_dict()
        parts = {
            "tokenizer": self.tokenizer.state_dict(),
            "transformer": gpt,
            "conditioning": self.conditioning.state_dict(),
        }
        tensors = {f"{p}.{name}": x for p, values in parts.items() for name, x in values.items()}
        config = {
            "tokenizer": self.tokenizer.config.to_dict(),
            "transformer": self.model.config.to_dict(),
            "conditioning": self.conditioning.to_dict(),
        }
        native.write(folder, "pipeline", config, tensors, {"step": step, "stage": self.kind})

    @contextlib.contextmanager
    def _for_use(self) -> Iterator[None]:
        self.train_mode(False)
        average = self.ema.applied() if self.ema is not None else contextlib.nullcontext()
        with average, torch.no_grad():
            yield

    def validate(self) -> dict[str, float]:
        """The loss over the held-out images, without pkeep and label dropout."""
        if self._held is None:
            return {}
        total, size = 0.0, self.config.data.batch_size
        n = min(len(self._held), self.config.train.val_images)
        with self._for_use(), self.autocast():
            for rows in torch.arange(n).split(size):
                image, condition = self._tokens(self._held.rows(rows))
                total += self.model.loss(image, condition).item() * len(image)
        return {"loss": total / n}

    def pictures(self) -> dict[str, Tensor]:
        """`samples`: the same noise each time, classes in turn."""
        n = self.config.train.samples
        if n == 0 or self.conditioning.kind not in ("class", "sos"):
            return {}
        if self.conditioning.kind == "class":
            condition = self.conditioning.encode(torch.arange(n) % self.conditioning.n_classes)
        else:
            condition = self.conditioning.encode(n)
        h, w = self._grid
        with self._for_use():
            engine = Engine(self.model, precision="fp32", batch=n)
            found = engine.generate(condition.to(self.world.device), h * w, seed=0)
            found = found.clamp(max=self.tokenizer.n_codes - 1).reshape(n, h, w)
            images = self.tokenizer.to_rgb(self.tokenizer.decode(found).float())
        return {"samples": images.cpu()}

    def describe(self, batch: Mapping[str, Any]) -> list[str]:
        image, condition = self._tokens(batch)
        with self._for_use():
            logits = self.model(image, condition)
        return [
            f"codes {list(image.shape)}, condition {list(condition.shape)} -> {list(logits.shape)}",
            f"parameters: transformer {sum(p.numel() for p in self._weights):,}, "
            f"tokenizer {sum(p.numel() for p in self.tokenizer.parameters()):,} (frozen)",
        ]


def _conditioning(config: TransformerConfig, tokenizer: VQGAN, names: list[str] | None) -> Any:
    """What the file and the data ask for. ConfigError when the data cannot give it."""
    model, kind = config.model, config.model.conditioning
    if kind == "auto":
        kind = "class" if names else "unconditional"
    if kind == "class":
        n = model.n_classes or (len(names) if names else 0)
        if not n:
            raise ConfigError("model.conditioning: class, but the data have no class folders")
        if names and len(names) > n:
            raise ConfigError(f"model.n_classes: the data have {len(names)} classes, got {n}")
        null = n if config.train.class_dropout > 0 else None
        kept = names if names and len(names) == n else None
        return conditions.ClassCondition(n, kept, null)
    if kind == "unconditional":
        return conditions.StartCondition(model.sos_token)
    if config.data.condition_path is None:
        raise ConfigError("data.condition_path: needed for model.conditioning=image")
    if model.condition_tokenizer is None:
        return conditions.FirstStageCondition(tokenizer)
    other = VQGAN.from_pretrained(model.condition_tokenizer)
    stage = conditions.TokenizerCondition(other.config)
    stage.load_state_dict(other.state_dict())
    return stage


def _build(
    config: TransformerConfig, world: World, out: Path | None
) -> tuple[TransformerStage, Feed]:
    if not config.tokenizer:
        raise ConfigError("tokenizer: not given; --tokenizer names the model of stage 1")
    tokenizer = VQGAN.from_pretrained(config.tokenizer).to(world.device)
    tokenizer.requires_grad_(False)
    if codes.are_codes(config.data):
        return _from_codes(config, world, tokenizer)
    return _from_pictures(config, world, out, tokenizer)


def _from_codes(
    config: TransformerConfig, world: World, tokenizer: VQGAN
) -> tuple[TransformerStage, Feed]:
    """Stage and feed on files of codes. The tokenizer is part of the pipeline, and makes the
    samples.
    """
    data, train = config.data, config.train
    if config.model.conditioning == "image":
        raise ConfigError("model.conditioning: image needs pictures, the data are codes")
    dataset, held = codes.given_codes(data, tokenizer)
    held = held if train.val_every else None
    condition = _conditioning(config, tokenizer, dataset.class_names).to(world.device)
    if condition.kind == "class":
        codes.check_labels([dataset, held], condition.n_classes)
    manifest = dataset.manifest()
    feed = codes.CodeFeed(dataset, manifest, data, train.seed, world, train.accumulate)
    encoder = codes.Encoder(tokenizer, None, world)
    return TransformerStage(config, world, encoder, condition, held), feed


def _from_pictures(
    config: TransformerConfig, world: World, out: Path | None, tokenizer: VQGAN
) -> tuple[TransformerStage, Feed]:
    """Stage and feed on pictures: encoded once where that is possible, else in each step."""
    data, train = config.data, config.train
    data.size = data.size or tokenizer.config.resolution
    if data.size % tokenizer.config.factor:
        raise ConfigError(
            f"data.size: must be a multiple of {tokenizer.config.factor}, got {data.size}"
        )
    source, held_source = open_sources(data)
    held_source = held_source if train.val_every else None
    stage_c = _conditioning(config, tokenizer, source.class_names)
    stage_c = stage_c.to(world.device).eval().requires_grad_(False)
    if stage_c.kind == "class":
        codes.check_labels([source, held_source], stage_c.n_classes)
    own = stage_c if stage_c.kind == "tokenizer" else tokenizer
    encoder = codes.Encoder(tokenizer, own if config.model.conditioning == "image" else None, world)
    feed: Feed
    if data.crop == "random" or (out is None and encoder.condition is None):
        if encoder.condition is not None:
            raise ConfigError("data.crop: must be center for model.conditioning=image")
        feed = ImageFeed(source, data, data.size, train.seed, world, train.accumulate)
    else:
        # one rank computes, the others read what it stored
        if not world.main:
            world.barrier()
        made = codes.encode_pictures(source, data, encoder, out)
        if world.main:
            world.barrier()
        feed = codes.CodeFeed(made, source.manifest(), data, train.seed, world, train.accumulate)
    held = None
    if held_source is not None:
        held = codes.encode_pictures(held_source, data, encoder, None)
    return TransformerStage(config, world, encoder, stage_c, held), feed


def _identity(stage: TransformerStage) -> dict[str, Any]:
    """What a resume may not change."""
    config = stage.config
    keep: dict[str, Any] = {f"model.{k}": v for k, v in stage.model.config.to_dict().items()}
    keep["tokenizer"] = codes.tokenizer_digest(stage.tokenizer)
    keep["model.conditioning"] = stage.conditioning.kind
    for name in ("size", "batch_size", "crop", "flip", "val_fraction"):
        keep[f"data.{name}"] = getattr(config.data, name)
    for name in ("seed", "accumulate"):
        keep[f"train.{name}"] = getattr(config.train, name)
    return keep | {"processes": stage.world.size}


def run(
    config_path: str | Path,
    overrides: Sequence[str] = (),
    *,
    tokenizer: str | Path | None = None,
    data: str | Path | None = None,
    out: str | Path | None = None,
    resume: str = "auto",
    max_steps: int | None = None,
    device: str = "auto",
    precision: str | None = None,
    dry_run: bool = False,
    print_config: bool = False,
) -> int:
    """Train a transformer, as `vqfast train transformer` does.

    Args:
        tokenizer: model of stage 1, any format that `VQGAN.from_pretrained` reads.
        The others as `vqfast.train.tokenizer.run`.

    Returns, Raises: as there.
    """
    extra = [] if tokenizer is None else [f"tokenizer={runner.quoted(str(tokenizer))}"]
    return runner.run(
        runner.Kind(TransformerConfig, _build, _identity),
        config_path,
        overrides,
        runner.Options(
            data, out, resume, max_steps, device, precision, dry_run, print_config, extra
        ),
    )
