"""The sections of a training file: every key, its default, its meaning and its limits.

`vqfast train tokenizer CONFIG --print-config` prints them with the values in force. A learning rate
is absolute; `base_learning_rate` (per image of the global batch, as taming scales it) is for files
that were written for taming.
"""

from dataclasses import dataclass

from vqfast.config import key

__all__ = [
    "DataSection",
    "LossSection",
    "TokenizerTrain",
    "TrainSection",
    "TransformerModel",
    "TransformerTrain",
]


@dataclass
class DataSection:
    path: str | None = key(
        None,
        "folder, list file or tar of images; stage 2: also a file of `vqfast encode` or a folder "
        "of them; --data sets it too",
    )
    kind: str | None = key(
        None,
        "null: told by the content",
        choices=("folder", "listfile", "archive", "noto_emoji", "codes"),
    )
    subset: str | None = key(None, "part of the source: a subfolder, or noto_emoji's class names")
    val_path: str | None = key(
        None, "images (or codes) for validation; none: hold out `val_fraction` of `path`"
    )
    condition_path: str | None = key(
        None, "stage 2, image: the condition's pictures, of equal names"
    )
    val_fraction: float = key(0.0, "part of `path` held out for validation", low=0, high=0.9)
    size: int | None = key(None, "side in pixels that images are resized and cropped to", low=1)
    batch_size: int = key(8, "images per process and pass", low=1)
    num_workers: int = key(0, "processes that decode images; 0 decodes in this one", low=0)
    max_bad_fraction: float = key(
        0.01, "more unreadable images than this part: DataError", low=0, high=1
    )
    flip: bool = key(False, "mirror each image with probability 1/2")
    crop: str = key("center", "where the square is cut out", choices=("center", "random"))
    min_crop: float = key(
        1.0, "random only: least part of the largest square", low=0, low_open=True, high=1
    )
    cache: bool = key(False, "read all images once and keep them in memory, fitted to `size`")


@dataclass
class LossSection:
    pixel: str = key("l1", "pixel loss", choices=("l1", "l2", "bce"))
    codebook_weight: float = key(1.0, "weight of the quantizer's loss", low=0)
    perceptual_weight: float = key(1.0, "weight of the perceptual loss; 0 needs no weights", low=0)
    perceptual_net: str = key("vgg", "its trunk", choices=("vgg", "alex", "squeeze"))
    perceptual_weights: str = key(
        "auto", "file of the trunk; auto: torch's cache; random: for tests"
    )
    perceptual_heads: str = key(
        "auto", "file of LPIPS heads; auto: torch's cache or the lpips package; none: equal weights"
    )
    disc_start: int = key(10_000, "step from which the discriminator is trained", low=0)
    gan_start: int | None = key(
        None, "step from which the autoencoder sees it; null: disc_start", low=0
    )
    gan_ramp: int = key(0, "steps over which its weight rises from 0 after gan_start", low=0)
    disc_factor: float = key(1.0, "factor of both adversarial losses; 0: no discriminator", low=0)
    disc_weight: float = key(0.8, "weight of the generator's adversarial loss", low=0)
    disc_adaptive: bool = key(True, "scale disc_weight by the ratio of gradients at the last layer")
    disc_weight_max: float = key(1e4, "cap of that ratio", low=0)
    disc_loss: str = key("hinge", "discriminator loss", choices=("hinge", "vanilla"))
    disc_num_layers: int = key(
        3, "layers of the PatchGAN; fewer on images too small", low=1, high=8
    )
    disc_channels: int = key(64, "channels of its first layer", low=1)
    disc_norm: str = key("batch", "its normalisation", choices=("batch", "actnorm"))

    def __post_init__(self) -> None:
        if self.gan_start is not None and self.gan_start < self.disc_start:
            raise ValueError(
                f"gan_start must be >= disc_start = {self.disc_start}, got {self.gan_start}"
            )


@dataclass
class TrainSection:
    max_steps: int = key(100_000, "optimizer steps; --max-steps stops earlier", low=1)
    seed: int = key(0, "seed of weights, data order and noise", low=0, high=2**63 - 1)
    learning_rate: float | None = key(
        None,
        "absolute; null: from base_learning_rate, or the default of the stage",
        low=0,
        low_open=True,
    )
    base_learning_rate: float | None = key(
        None, "per image: times processes, batch_size and accumulate", low=0, low_open=True
    )
    schedule: str = key("constant", "after the warm-up", choices=("constant", "cosine"))
    warmup_steps: int = key(0, "steps of linear warm-up", low=0)
    final_lr: float = key(
        0.0, "where cosine ends at max_steps, as a part of the rate", low=0, high=1
    )
    accumulate: int = key(1, "passes per step", low=1)
    grad_clip: float = key(0.0, "largest gradient norm; 0: no clipping", low=0)
    ema_decay: float = key(
        0.0, "moving average of the weights, saved as the model; 0: off", low=0, high=0.999999
    )
    precision: str = key(
        "fp32",
        "arithmetic of the networks; fp16 scales the losses, for GPUs without bf16",
        choices=("fp32", "bf16", "fp16"),
    )
    compile: bool = key(False, "torch.compile the networks")
    max_bad_steps: int = key(10, "non-finite steps in a row before NonFiniteError", low=1)
    save_every: int = key(1000, "steps between checkpoints", low=1)
    keep_last: int = key(2, "checkpoints kept", low=1)
    log_every: int = key(50, "steps between lines of metrics.jsonl", low=1)
    val_every: int = key(0, "steps between validations; 0: none", low=0)
    val_images: int = key(256, "images of one validation", low=1)
    images_every: int = key(1000, "steps between image grids; 0: none", low=0)
    tensorboard: bool = key(True, "write tb/ when TensorBoard is installed")


@dataclass
class TokenizerTrain(TrainSection):
    betas: tuple[float, float] = key(
        (0.5, 0.9), "of both Adam optimizers", low=0, high=1, high_open=True
    )
    disc_learning_rate: float | None = key(None, "null: as learning_rate", low=0, low_open=True)
    discriminator_pass: str = key(
        "shared",
        "shared: it sees the reconstructions of the one forward of a step; taming: those of the "
        "updated autoencoder, by a second forward",
        choices=("taming", "shared"),
    )
    revive_after: int = key(
        0, "steps without use after which a code is moved onto a latent; 0: never", low=0
    )
    temperature: tuple[float, float] | None = key(
        None, "Gumbel only: first and last; null: model.temp_init", low=0, low_open=True
    )
    temperature_steps: int = key(1, "Gumbel only: steps from the first to the last", low=1)


@dataclass
class TransformerModel:
    n_layer: int = key(12, "blocks", low=1)
    n_head: int = key(8, "attention heads", low=1)
    n_embd: int = key(256, "width", low=1)
    embd_pdrop: float = key(0.0, "dropout of the embeddings", low=0, high=1, high_open=True)
    resid_pdrop: float = key(0.0, "dropout of the residual branches", low=0, high=1, high_open=True)
    attn_pdrop: float = key(0.0, "dropout of the attention weights", low=0, high=1, high_open=True)
    n_unmasked: int = key(0, "first positions that all see one another", low=0)
    vocab_size: int | None = key(
        None, "null: codes of the tokenizer, and at least the classes", low=1
    )
    block_size: int | None = key(None, "null: condition and image tokens less one", low=1)
    conditioning: str = key(
        "auto",
        "auto: class when the data have classes",
        choices=("auto", "class", "unconditional", "image"),
    )
    n_classes: int | None = key(None, "null: as the data say", low=1)
    sos_token: int = key(0, "start token of an unconditional model", low=0)
    condition_tokenizer: str | None = key(None, "image only: tokenizer of the condition")

    def __post_init__(self) -> None:
        if self.n_embd % self.n_head:
            raise ValueError(
                f"n_embd must be a multiple of n_head = {self.n_head}, got {self.n_embd}"
            )


@dataclass
class TransformerTrain(TrainSection):
    betas: tuple[float, float] = key((0.9, 0.95), "of AdamW", low=0, high=1, high_open=True)
    weight_decay: float = key(0.01, "of matrices; not of biases, norms and embeddings", low=0)
    pkeep: float = key(1.0, "share of input tokens left; others become random codes", low=0, high=1)
    class_dropout: float = key(0.0, "share of labels replaced by the null class", low=0, high=1)
    samples: int = key(16, "images sampled for each grid", low=0, high=256)
