"""Training files written for taming-transformers and latent-diffusion, as this project's sections.

Their layout is `model: {base_learning_rate, target, params: {...}}` and `data: {target, params}`.
Targets are looked up in `config.TARGETS`; no key is dropped in silence: what has a meaning here is
carried over, what has none is on a list below, and anything else is an error that names it.
"""

from collections.abc import Mapping
from typing import Any

from vqfast.config import ConfigError, kind_of

__all__ = ["translate_tokenizer", "translate_transformer"]

# paths of the author's disk, bookkeeping of Lightning, and keys that say how the batch dict is
# spelled
_MEANINGLESS = frozenset(
    [
        "ckpt_path",
        "ignore_keys",
        "image_key",
        "monitor",
        "scheduler_config",
        "colorize_nlabels",
        "lr_g_factor",
        "batch_resize_range",
        "use_ema",
        "sane_index_shape",
        "first_stage_key",
        "cond_stage_key",
        "downsample_cond_size",
        "temperature_scheduler_config",
        "permuter_config",
    ]
)
_DDCONFIG = frozenset(
    [
        "ch",
        "out_ch",
        "in_channels",
        "ch_mult",
        "num_res_blocks",
        "attn_resolutions",
        "resolution",
        "z_channels",
        "double_z",
        "dropout",
        "attn_type",
    ]
)
_LOSS = {
    "disc_start": "disc_start",
    "codebook_weight": "codebook_weight",
    "perceptual_weight": "perceptual_weight",
    "disc_num_layers": "disc_num_layers",
    "disc_ndf": "disc_channels",
    "disc_factor": "disc_factor",
    "disc_weight": "disc_weight",
    "disc_loss": "disc_loss",
}
_GPT = frozenset(
    [
        "vocab_size",
        "block_size",
        "n_layer",
        "n_head",
        "n_embd",
        "embd_pdrop",
        "resid_pdrop",
        "attn_pdrop",
        "n_unmasked",
    ]
)


def _is_foreign(tree: Mapping[str, Any]) -> bool:
    model = tree.get("model")
    return isinstance(model, Mapping) and "target" in model


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError(f"{where} must be a mapping, got {type(value).__name__}")
    return dict(value)


def _unknown(keys: Mapping[str, Any], where: str) -> None:
    left = [name for name in keys if name not in _MEANINGLESS]
    if left:
        raise ConfigError(f"{where}.{left[0]}: unknown key of a file in taming's layout")


def translate_tokenizer(tree: dict) -> dict:
    """The sections of a stage-1 file; one that is not in taming's layout comes back as it is."""
    if not _is_foreign(tree):
        return tree
    model = _mapping(tree["model"], "model")
    kind, _, quantizer = kind_of(model["target"], "model.target").partition(":")
    if kind != "tokenizer":
        raise ConfigError(
            f"model.target: {model['target']} is no tokenizer; see vqfast train transformer"
        )
    params = _mapping(model.get("params"), "model.params")
    dd = _mapping(params.pop("ddconfig", None), "model.params.ddconfig")
    out: dict[str, Any] = {"quantizer": quantizer} | {
        n: dd.pop(n) for n in list(dd) if n in _DDCONFIG
    }
    _unknown(dd, "model.params.ddconfig")
    for name in ("n_embed", "embed_dim", "remap", "kl_weight"):
        if name in params:
            out[name] = params.pop(name)
    loss = _loss(_mapping(params.pop("lossconfig", None), "model.params.lossconfig"))
    _unknown(params, "model.params")
    return _with_rest(tree, model, {"model": out, "loss": loss})


def _loss(section: dict[str, Any]) -> dict[str, Any]:
    if not section:
        return {}
    if kind_of(section.get("target"), "model.params.lossconfig.target") == "loss:none":
        return {}
    where = "model.params.lossconfig.params"
    params, out = _mapping(section.get("params"), where), {}
    for name in list(params):
        if name in _LOSS:
            out[_LOSS[name]] = params.pop(name)
    if params.pop("use_actnorm", False):
        out["disc_norm"] = "actnorm"
    if params.pop("disc_conditional", False):
        raise ConfigError(f"{where}.disc_conditional: true is not supported")
    params.pop("disc_in_channels", None)  # always the image's
    if params.pop("pixelloss_weight", 1.0) != 1.0:
        raise ConfigError(f"{where}.pixelloss_weight: only 1.0 is supported; taming ignores it too")
    _unknown(params, where)
    return out


def translate_transformer(tree: dict) -> dict:
    """The sections of a stage-2 file; the first stage is given with --tokenizer, not by the path
    in the file.
    """
    if not _is_foreign(tree):
        return tree
    model = _mapping(tree["model"], "model")
    if kind_of(model["target"], "model.target") != "transformer":
        raise ConfigError(
            f"model.target: {model['target']} is no transformer; see vqfast train tokenizer"
        )
    params = _mapping(model.get("params"), "model.params")
    gpt = _mapping(params.pop("transformer_config", None), "model.params.transformer_config")
    kind_of(gpt.get("target"), "model.params.transformer_config.target")
    inner = _mapping(gpt.get("params"), "model.params.transformer_config.params")
    out = {name: inner.pop(name) for name in list(inner) if name in _GPT}
    _unknown(inner, "model.params.transformer_config.params")
    params.pop("first_stage_config", None)
    out |= _condition(params)
    train = {"pkeep": params.pop("pkeep")} if "pkeep" in params else {}
    _unknown(params, "model.params")
    return _with_rest(tree, model, {"model": out, "train": train})


def _condition(params: dict[str, Any]) -> dict[str, Any]:
    section = params.pop("cond_stage_config", None)
    if section == "__is_unconditional__":
        return {"conditioning": "unconditional", "sos_token": params.pop("sos_token", 0)}
    where = "model.params.cond_stage_config"
    if section in (None, "__is_first_stage__"):
        raise ConfigError(f"{where}: {section!r} is not supported for training")
    section = _mapping(section, where)
    kind = kind_of(section.get("target"), f"{where}.target")
    inner = _mapping(section.get("params"), f"{where}.params")
    if kind == "condition:class":
        return {"conditioning": "class", "n_classes": inner.get("n_classes")}
    if kind == "condition:unconditional":
        return {"conditioning": "unconditional", "sos_token": inner.get("sos_token", 0)}
    return {"conditioning": "image"}


def _with_rest(tree: Mapping[str, Any], model: Mapping[str, Any], made: dict[str, Any]) -> dict:
    """`made` with the learning rate and the data; sections of our own layout may stand beside and
    win.
    """
    train = dict(made.pop("train", {}))
    if "base_learning_rate" in model:
        train["base_learning_rate"] = model["base_learning_rate"]
    data = _data(_mapping(tree.get("data"), "data"))
    left = set(tree) - {"model", "data", "loss", "train", "lightning"}
    if left:
        raise ConfigError(f"{min(left)}: unknown section of a file in taming's layout")
    for name, section in (("data", data), ("train", train), ("loss", made.get("loss", {}))):
        own = {} if name == "data" else _mapping(tree.get(name), name)
        made[name] = {**section, **own}
    if not made["loss"]:
        del made["loss"]
    return made


def _data(section: dict[str, Any]) -> dict[str, Any]:
    if "target" not in section:
        return section
    kind_of(section["target"], "data.target")
    params = _mapping(section.get("params"), "data.params")
    out: dict[str, Any] = {n: params[n] for n in ("batch_size", "num_workers") if n in params}
    for part, key in (("train", "path"), ("validation", "val_path")):
        where = f"data.params.{part}"
        inner = _mapping(params.get(part), where)
        if "target" in inner:
            kind_of(inner["target"], f"{where}.target")
        for source in (inner, _mapping(inner.get("params"), f"{where}.params")):
            for listed in ("training_images_list_file", "test_images_list_file"):
                if listed in source:
                    out[key] = source[listed]
            if "size" in source and part == "train":
                out["size"] = source["size"]
            nested = source.get("config")
            if isinstance(nested, Mapping) and "size" in nested and part == "train":
                out["size"] = nested["size"]
    return out
