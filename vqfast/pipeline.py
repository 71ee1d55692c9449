"""Pipeline: tokenizer, transformer and conditioning; from a class or a picture to images.

    classes -> condition tokens -> Engine.generate -> codes [n, h, w] -> tokenizer.decode -> images

Image i of a request is a function of (seed, i) and of its condition alone: codes come from an
engine in which no row sees its batch, and images are decoded one at a time, so that neither
depends on the batch size.
"""

import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vqfast import checkpoints
from vqfast.checkpoints import native
from vqfast.engine import Engine
from vqfast.engine.packing import PackedGPT, choose_precision, describe, load_packed
from vqfast.errors import CheckpointError
from vqfast.images import Image, to_pil
from vqfast.models import conditioning as conditions
from vqfast.models.gpt import GPT, GPTConfig
from vqfast.models.vqgan import VQGAN
from vqfast.sampling import Request, check_request, draw, model_grid

__all__ = ["Pipeline"]


class Pipeline:
    """A model that draws images.

    Args:
        tokenizer: VQGAN; its codes are tokens 0..n_codes - 1 of the transformer.
        transformer: GPT over [condition ; codes in raster order], or one that is packed.
        conditioning: what `models.conditioning.build` gives.
        metadata: plain JSON values that are kept in a saved model.

    Raises:
        TypeError: a part of the wrong kind. ValueError: the transformer's vocabulary has no room
            for the codes or the classes.
    """

    def __init__(
        self,
        tokenizer: VQGAN,
        transformer: GPT | PackedGPT,
        conditioning: conditions.Conditioning,
        metadata: Mapping[str, Any] | None = None,
    ):
        for name, part, kind in (
            ("tokenizer", tokenizer, VQGAN),
            ("transformer", transformer, (GPT, PackedGPT)),
            ("conditioning", conditioning, nn.Module),
        ):
            if not isinstance(part, kind):
                kinds = kind if isinstance(kind, tuple) else (kind,)
                wanted = " or ".join(k.__name__ for k in kinds)
                raise TypeError(f"{name} must be a vqfast {wanted}, got {type(part).__name__}")
        self.tokenizer, self.transformer = tokenizer.eval(), transformer.eval()
        self.conditioning = conditioning.eval()
        self.metadata = dict(metadata or {})
        said, V = conditioning.to_dict(), transformer.config.vocab_size
        highest = {
            "codes": tokenizer.n_codes - 1,
            "classes": max(said.get("n_classes", 1) - 1, said.get("null_class") or 0),
            "start token": said.get("sos_token", 0),
        }
        for what, token in highest.items():
            if token >= V:
                raise ValueError(
                    f"transformer must have vocab_size > {token} to match the {what}, got {V}"
                )
        self._engine: tuple[Any, Engine] | None = None

    # ---- files

    @classmethod
    def from_pretrained(
        cls, path: str | Path, config: str | Path | Mapping[str, Any] | None = None
    ) -> "Pipeline":
        """A pipeline from a native folder, a taming stage-2 checkpoint, or another known format.

        Args:
            path: file or folder; the format is found by content.
            config: for formats that keep it elsewhere: a YAML file or a mapping.

        Returns:
            The pipeline in eval mode, float32, on the CPU. Global random state is left alone. Its
            transformer is a PackedGPT where the file holds packed weights.

        Raises:
            CheckpointError: unreadable, unsafe or damaged file, one that holds no pipeline, or keys
                and shapes that do not fit; the text lists them.
        """
        ckpt = checkpoints.read(path, config, expect="pipeline")
        parts: dict[str, dict[str, Tensor]] = {
            "tokenizer": {},
            "transformer": {},
            "conditioning": {},
        }
        strange = []
        for name, value in ckpt.tensors.items():
            part, _, rest = name.partition(".")
            if part in parts:
                parts[part][rest] = value
            else:
                strange.append(name)
        if strange:
            raise CheckpointError(f"{path}: unexpected {', '.join(sorted(strange))}")
        tokenizer = VQGAN.from_tensors(
            ckpt.config["tokenizer"], parts["tokenizer"], what=f"{path} (tokenizer)"
        )
        try:
            # nothing is drawn and no memory is taken until every shape is known to fit
            with torch.device("meta"):
                shape = GPTConfig.from_dict(ckpt.config["transformer"])
                transformer: GPT | PackedGPT = GPT(shape)
                conditioning = conditions.build(ckpt.config["conditioning"], tokenizer)
        except (ValueError, TypeError, KeyError) as e:
            raise CheckpointError(f"{path}: {e}") from e
        of = f"{path} (transformer)"
        if "packed" in ckpt.config:
            transformer = load_packed(shape, ckpt.config["packed"], parts["transformer"], what=of)
        else:
            checkpoints.load_into(transformer, parts["transformer"], what=of)
        checkpoints.load_into(conditioning, parts["conditioning"], what=f"{path} (conditioning)")
        try:
            return cls(tokenizer, transformer, conditioning, ckpt.metadata)
        except ValueError as e:
            raise CheckpointError(f"{path}: {e}") from e

    def save_pretrained(
        self,
        folder: str | Path,
        metadata: Mapping[str, Any] | None = None,
        dtype: torch.dtype | None = None,
        precision: str | None = None,
    ) -> None:
        """Write the native format (safetensors and config.json), atomically.

        Args:
            folder: created if absent; a model already in it is replaced as a whole.
            metadata: plain JSON values kept beside the weights; None keeps the pipeline's own.
            dtype: stored dtype of the weights, e.g. torch.float16; None keeps theirs.
            precision: "fp32", "bf16", "int8" or "int4" stores the transformer packed, as the engine
                reads it: loading packs nothing, and "auto" then means this precision. Its
                embeddings, biases and norms are stored like the other parts. None: as it is.

        Raises:
            ValueError: unknown precision or dtype, one that packed weights cannot give, or weights
                that are not finite. OSError: the folder cannot be written.
        """
        transformer = self.transformer
        if precision is not None:
            transformer = PackedGPT.of(transformer, precision)
        parts = {
            "tokenizer": self.tokenizer,
            "transformer": transformer,
            "conditioning": self.conditioning,
        }
        config = {
            "tokenizer": self.tokenizer.config.to_dict(),
            "transformer": self.transformer.config.to_dict(),
            "conditioning": self.conditioning.to_dict(),
        }
        if isinstance(transformer, PackedGPT):
            config["packed"] = describe(transformer)
        tensors = {
            f"{part}.{name}": value
            for part, module in parts.items()
            for name, value in module.state_dict().items()
        }
        said = self.metadata if metadata is None else metadata
        native.write(folder, "pipeline", config, tensors, said, dtype=dtype)

    # ---- device

    @property
    def device(self) -> torch.device:
        table = self.transformer.tok_emb  # of a PackedGPT the tensor itself
        return (table if isinstance(table, Tensor) else table.weight).device

    def to(self, device: torch.device | str) -> "Pipeline":
        """Moves all parts; returns self."""
        for part in (self.tokenizer, self.transformer, self.conditioning):
            part.to(device)
        return self

    # ---- sampling

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w) of the codes: the tokenizer's configured resolution over its factor."""
        return model_grid(self.tokenizer)

    def sample(
        self, classes: Any = None, n: int | None = None, **options: Any
    ) -> list[Image.Image]:
        """Draw n images.

        Args: as `sample_codes`.

        Returns:
            PIL images, RGB. A token that is no code of the tokenizer (a vocabulary may be larger)
            is decoded as code 0, with a warning.

        Raises: as `sample_codes`.
        """
        return list(self.iter_images(classes, n, **options))

    def iter_images(
        self, classes: Any = None, n: int | None = None, **options: Any
    ) -> Iterator[Image.Image]:
        """`sample`, one image after another, holding one batch of codes at a time."""
        batches = self.iter_codes(classes, n, **options)
        return (self._picture(codes) for batch in batches for codes in batch)

    def sample_codes(self, classes: Any = None, n: int | None = None, **options: Any) -> Tensor:
        """Draw the codes of n images.

        Args:
            classes: ids or names, for a class-conditional model; image i gets
                classes[i % len(classes)]. None: all classes in turn.
            n: number of images, >= 0. None: one per class given, or per row of cond; else 1.
            seed: 0..2⁶⁴ - 1. Image i depends on (seed, i) and its condition alone.
            temperature, top_k, top_p: as `vqfast.sample_logits`.
            cfg_scale: classifier-free guidance, 1 is off; needs a model with a null class.
            cfg_interval: (begin, end), the positions 0..h·w - 1 of the codes of an image in which
                guidance acts, half-open; None is all. A position outside costs no guidance.
            size: (H, W) or side in pixels, multiples of the tokenizer's factor and at least what
                the model was trained for; None is that. Each code of a larger picture is drawn in a
                sliding window of the trained size.
            window_rule: where a window stands around its code: "make_samples", or "scene", a code
                further down and right. They draw different pictures.
            batch_size: sequences drawn side by side, one for an image or, in a larger picture, for
                each row of codes in flight: ceil(W / trained width). It changes no result.
            precision: of the transformer's weights: "fp32", "bf16", "int8" or "int4"; "auto" is
                "fp32", or the one that they are packed in.
            cond: [m, Tc] int64 condition tokens, from `conditioning.encode`, for models that are
                conditioned on a picture, of `size` too; image i gets cond[i % m].
            prefix: [m, k] int64, the first k codes of an image, which are kept; image i gets
                prefix[i % m].
            first: number of the first image; the request is images first..first + n - 1.
            on_step: called with a `vqfast.engine.Step` after every token of a batch (in windows:
                after a token of every row in flight): numbers of its images, steps done and in all,
                and a copy of its codes [b, h, w], -1 where none is drawn yet. What it raises comes
                out here; the pipeline can be used again.

        Returns:
            [n, h, w] int64.

        Raises:
            TypeError, ValueError: an argument is wrong or does not suit the model.
            NonFiniteError: the transformer's logits are not finite; names sample and position.
        """
        request = self._request(classes, n, options)
        batches = list(draw(request, self._engine_for))
        return torch.cat(batches) if batches else torch.empty(0, *request.grid, dtype=torch.int64)

    def iter_codes(
        self, classes: Any = None, n: int | None = None, **options: Any
    ) -> Iterator[Tensor]:
        """`sample_codes`, a batch [b, h, w] at a time. Arguments are checked before the first."""
        return draw(self._request(classes, n, options), self._engine_for)

    def _request(self, classes: Any, n: int | None, options: Mapping[str, Any]) -> Request:
        request = check_request(self.tokenizer, self.conditioning, classes, n, **options)
        choose_precision(self.transformer, request.precision)
        return request

    @torch.no_grad()
    def _picture(self, codes: Tensor) -> Image.Image:
        """One image from [h, w] codes."""
        strange = codes >= self.tokenizer.n_codes
        if bool(strange.any()):
            warnings.warn(
                f"{int(strange.sum())} of {codes.numel()} tokens are no codes of the tokenizer and "
                "are decoded as code 0; a trained transformer does not draw them",
                RuntimeWarning,
                stacklevel=2,
            )
            codes = codes.masked_fill(strange, 0)
        x = self.tokenizer.decode(codes[None].to(self.device))
        return to_pil(self.tokenizer.to_rgb(x)[0])

    def _engine_for(self, precision: str, batch: int) -> Engine:
        """The last engine, if it has this precision, room for the batch and the present weights."""
        precision = choose_precision(self.transformer, precision)
        # an in-place change of a weight raises its version; load_state_dict and optimizers do that
        weights = tuple(
            (p.data_ptr(), 0 if p.is_inference() else p._version)
            for p in (*self.transformer.parameters(), *self.transformer.buffers())
        )
        key = (precision, weights)
        if self._engine is None or self._engine[0] != key or self._engine[1].batch < batch:
            self._engine = None  # the old one goes first
            self._engine = (key, Engine(self.transformer, precision=precision, batch=batch))
        return self._engine[1]
