"""taming-transformers (and LDM's VQ models): a Lightning `.ckpt` with its YAML.

Weights lie under `state_dict`, in a tokenizer under the names of `VQGAN`, in a Net2NetTransformer
under `first_stage_model.`, `transformer.` and `cond_stage_model.`. What weights do not say (heads,
resolution, the kind of condition) comes from the YAML: `STEM.yaml`, `configs/*project.yaml` or
`configs/model.yaml` beside the file or one folder up, or the caller's `config`. `target:` is
compared with a fixed list of names; `ckpt_path` is never opened.

Source: CompVis/taming-transformers taming/models/{vqgan,cond_transformer}.py.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from vqfast import _files
from vqfast import config as run_config
from vqfast.checkpoints import Checkpoint, Source, clean_tensors
from vqfast.errors import CheckpointError

_PATTERNS = (
    "{stem}.yaml",
    "configs/*project.yaml",
    "configs/model.yaml",
    "../configs/*project.yaml",
    "../configs/model.yaml",
)
_KEYS = (
    "encoder.down.0.block.",
    "encoder.mid.block_",
    "decoder.mid.block_",
    "decoder.up.0.block.",
    "transformer.tok_emb.",
    "transformer.blocks.0.attn.",
)
# the names that `write` puts down; those that `read` knows are in `config.TARGETS`
_VQ, _GUMBEL = "taming.models.vqgan.VQModel", "taming.models.vqgan.GumbelVQ"
_LDM_VQ = "ldm.models.autoencoder.VQModel"
_DUMMY_LOSS = "taming.modules.losses.vqperceptual.DummyLoss"
_NET2NET = "taming.models.cond_transformer.Net2NetTransformer"
_GPT = "taming.modules.transformer.mingpt.GPT"
_LABELATOR = "taming.modules.util.Labelator"
_COORDINATES = "taming.modules.misc.coord.CoordStage"

# ours -> taming's, a pipeline's parts
_PREFIXES = {
    "tokenizer.": "first_stage_model.",
    "transformer.": "transformer.",
    "conditioning.": "cond_stage_model.",
}
_NETWORK = (
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
)
_NETWORK_OPTIONAL = ("double_z", "dropout", "attn_type")
# switches of LDM's network that change nothing at these values
_NETWORK_FIXED = {
    "resamp_with_conv": True,
    "use_linear_attn": False,
    "tanh_out": False,
    "give_pre_end": False,
}
_GPT_OPTIONAL = ("embd_pdrop", "resid_pdrop", "attn_pdrop", "n_unmasked")
_GPT_NEEDED = ("vocab_size", "block_size", "n_layer", "n_head", "n_embd")


def claims(source: Source) -> bool:
    """A file of `torch.save` whose weights have taming's names."""
    return source.pickled and any(key.startswith(_all_prefixed()) for key in source.state)


def _all_prefixed() -> tuple[str, ...]:
    return _KEYS + tuple(f"first_stage_model.{key}" for key in _KEYS)


def read(source: Source) -> Checkpoint:
    """The weights without what only training needs, and the configuration in this package's words.

    Raises:
        CheckpointError: no YAML, an unknown target, an unusable tensor, or weights that contradict
            the YAML.
    """
    tensors, ignored = clean_tensors(
        source.state, source.path, ("first_stage_model.", "cond_stage_model.")
    )
    tree, where = source.settings(_PATTERNS)
    pipeline = any(key.startswith("transformer.") for key in tensors)
    try:
        model = _section(tree, "model", where) if "model" in tree else {"params": tree}
        if pipeline:
            config, tensors = _net2net(model, tensors, where)
        else:
            config = _tokenizer(model, tensors, f"{where}: model")
    except CheckpointError as error:
        raise CheckpointError(f"{source.path}: {error}") from None
    step = source.tree.get("global_step") if isinstance(source.tree, dict) else None
    metadata = {"source": "taming"} | ({"global_step": step} if isinstance(step, int) else {})
    return Checkpoint(
        "taming", "pipeline" if pipeline else "tokenizer", config, tensors, metadata, ignored
    )


# ---- the YAML


def _section(tree: Mapping, key: str, where: str) -> dict:
    value = tree.get(key)
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: {key} must be a mapping, got {type(value).__name__}")
    return value


def _kind(node: Mapping, wanted: tuple[str, ...], where: str) -> str:
    """What the `target` of a node stands for; it has to be one of `wanted` (a kind, or its part
    before the colon).
    """
    target = node.get("target")
    try:
        kind = run_config.kind_of(target, f"{where}.target")
    except run_config.ConfigError as error:
        raise CheckpointError(str(error)) from None
    if kind not in wanted and kind.partition(":")[0] not in wanted:
        raise CheckpointError(
            f"{where}.target {target!r} stands for a {kind}, not for a {wanted[0]}"
        )
    return kind


def _number(params: Mapping, key: str, where: str, default: int | None = None) -> int:
    value = params.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int):
        missing = "is missing" if value is None else f"must be an integer, got {value!r}"
        raise CheckpointError(f"{where}.{key} {missing}")
    return value


def _tokenizer(node: Mapping, tensors: Mapping[str, Tensor], where: str) -> dict:
    """Fields of VQGANConfig from a `target` and `params`, or from a tree that holds these fields
    already.
    """
    params = _section(node, "params", where)
    if "target" not in node and "ddconfig" not in params:
        if not params:
            raise CheckpointError(f"{where}: the configuration is empty")
        return dict(params)
    quantizer = _kind(node, ("tokenizer",), where).removeprefix("tokenizer:")
    network = _section(params, "ddconfig", f"{where}.params")
    config: dict[str, Any] = {}
    for key, value in network.items():
        if key in _NETWORK:
            config[key] = value
        elif key not in _NETWORK_FIXED or value != _NETWORK_FIXED[key]:
            raise CheckpointError(f"{where}.params.ddconfig.{key}: {value!r} is not supported")
    for key in _NETWORK:
        if key not in network and key not in _NETWORK_OPTIONAL:
            raise CheckpointError(f"{where}.params.ddconfig.{key} is missing")
    config["quantizer"] = quantizer
    for key in ("n_embed", "embed_dim"):
        config[key] = _number(params, key, f"{where}.params")
    if quantizer == "gumbel":
        config["kl_weight"] = params.get("kl_weight", 1e-8)
    if "quantize.used" in tensors:
        config["remap"] = tensors["quantize.used"].tolist()
    elif params.get("remap"):
        raise CheckpointError(f"{where}.params.remap is set, but the weights hold no quantize.used")
    _agree(config, tensors, where)
    return config


def _agree(config: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str) -> None:
    """Sizes that the weights show, against the YAML, before a model of that size is built."""
    codebook = (
        "quantize.embed.weight" if config["quantizer"] == "gumbel" else "quantize.embedding.weight"
    )
    shown = {
        "n_embed": (codebook, 0),
        "embed_dim": (codebook, 1),
        "ch": ("encoder.conv_in.weight", 0),
        "in_channels": ("encoder.conv_in.weight", 1),
        "z_channels": ("decoder.conv_in.weight", 1),
        "out_ch": ("decoder.conv_out.weight", 0),
    }
    for key, (name, axis) in shown.items():
        weight = tensors.get(name)
        if weight is not None and (weight.dim() <= axis or weight.shape[axis] != config[key]):
            raise CheckpointError(
                f"{where}: {key} is {config[key]}, but {name} has shape {list(weight.shape)}"
            )


def _net2net(
    model: Mapping, tensors: dict[str, Tensor], where: str
) -> tuple[dict, dict[str, Tensor]]:
    where = f"{where}: model"
    if "target" not in model:
        raise CheckpointError(
            f"{where}: a transformer needs its YAML: n_head is not in the weights"
        )
    _kind(model, ("transformer",), where)
    params, where = _section(model, "params", where), f"{where}.params"
    permuter = params.get("permuter_config")
    if permuter is not None:
        if not isinstance(permuter, dict):
            raise CheckpointError(f"{where}.permuter_config must be a mapping, got {permuter!r}")
        _kind(permuter, ("permuter:identity",), f"{where}.permuter_config")
    parts = {ours: _part(tensors, theirs) for ours, theirs in _PREFIXES.items()}
    conditioning = _conditioning(params, parts["conditioning."], where)
    if conditioning["kind"] == "first_stage":
        _drop_shared(parts, where)
    first_stage = _section(params, "first_stage_config", where)
    config = {
        "tokenizer": _tokenizer(first_stage, parts["tokenizer."], f"{where}.first_stage_config"),
        "transformer": _gpt(params, parts["transformer."], where),
        "conditioning": conditioning,
    }
    renamed = {ours + key: x for ours, part in parts.items() for key, x in part.items()}
    others = {k: x for k, x in tensors.items() if not k.startswith(tuple(_PREFIXES.values()))}
    return config, renamed | others


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): x for k, x in tensors.items() if k.startswith(prefix)}


def _drop_shared(parts: dict[str, dict[str, Tensor]], where: str) -> None:
    """`__is_first_stage__`: the file may hold the one tokenizer under both names."""
    for key, x in parts["conditioning."].items():
        twin = parts["tokenizer."].get(key)
        if twin is None or not torch.equal(twin, x):
            raise CheckpointError(
                f"{where}.cond_stage_config says __is_first_stage__, but "
                f"cond_stage_model.{key} differs"
            )
    parts["conditioning."] = {}


def _gpt(params: Mapping, tensors: Mapping[str, Tensor], where: str) -> dict:
    node, where = _section(params, "transformer_config", where), f"{where}.transformer_config"
    _kind(node, ("gpt",), where)
    values = _section(node, "params", where)
    unknown = sorted(set(values) - set(_GPT_NEEDED + _GPT_OPTIONAL))
    if unknown:
        raise CheckpointError(f"{where}.params: not supported: {', '.join(unknown)}")
    config: dict[str, Any] = {key: _number(values, key, f"{where}.params") for key in _GPT_NEEDED}
    config |= {key: values[key] for key in _GPT_OPTIONAL if key in values}
    shown = {
        "vocab_size": ("tok_emb.weight", 0),
        "n_embd": ("tok_emb.weight", 1),
        "block_size": ("pos_emb", 1),
    }
    for key, (name, axis) in shown.items():
        weight = tensors.get(name)
        if weight is not None and (weight.dim() <= axis or weight.shape[axis] != config[key]):
            raise CheckpointError(
                f"{where}: {key} is {config[key]}, but transformer.{name} has shape "
                f"{list(weight.shape)}"
            )
    return config


def _conditioning(params: Mapping, tensors: Mapping[str, Tensor], where: str) -> dict:
    node, where = params.get("cond_stage_config"), f"{where}.cond_stage_config"
    if node == "__is_first_stage__":
        return {"kind": "first_stage"}
    if node == "__is_unconditional__":
        return {"kind": "sos", "sos_token": _number(params, "sos_token", where, 0)}
    if not isinstance(node, dict):
        raise CheckpointError(f"{where} must be a mapping or a known word, got {node!r}")
    kind = _kind(node, ("condition", "tokenizer"), where)
    values = _section(node, "params", where)
    if kind == "condition:class":
        return {"kind": "class", "n_classes": _number(values, "n_classes", where)}
    if kind == "condition:unconditional":
        return {"kind": "sos", "sos_token": _number(values, "sos_token", where)}
    if kind == "condition:coordinates":
        return {
            "kind": "coord",
            "n_embed": _number(values, "n_embed", where),
            "down_factor": _number(values, "down_factor", where, 16),
        }
    return {"kind": "tokenizer", "config": _tokenizer(node, tensors, where)}


# ---- writing


def write(
    path: str | os.PathLike,
    kind: str,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Writes {"state_dict": ...} into `path` and its YAML beside it; bits and names stay.

    Args:
        path: ends in .ckpt; the YAML is STEM.yaml.
        kind, config, tensors: as in `Checkpoint`.
        metadata: of it the format has a place for `global_step` alone.

    Raises:
        ValueError: the configuration has no word in taming's YAML; the text says which.
        OSError: the disk is full or the folder cannot be written.
    """
    path = Path(path)
    if kind == "tokenizer":
        tree, renamed = _tokenizer_yaml(config), dict(tensors)
    else:
        tree = _net2net_yaml(config)
        renamed = {}
        for key, x in tensors.items():
            ours = key.partition(".")[0] + "."
            renamed[_PREFIXES[ours] + key.removeprefix(ours)] = x
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {key: x.detach().cpu().contiguous() for key, x in renamed.items()}
    step = {key: metadata[key] for key in ("global_step",) if metadata and key in metadata}
    with _files.atomic_file(path.with_suffix(".yaml")) as temporary:
        temporary.write_text(yaml.safe_dump({"model": tree}, sort_keys=False), encoding="utf-8")
    with _files.atomic_file(path) as temporary:
        torch.save({"state_dict": state, **step}, temporary)


def _tokenizer_yaml(config: Mapping[str, Any]) -> dict:
    plain = {"metric": "l2", "legacy": True, "beta": 0.25, "remap": None}
    for key, value in plain.items():
        if config.get(key, value) != value:
            raise ValueError(f"{key} must be {value!r} for the taming format, got {config[key]!r}")
    targets = {"vq": _VQ, "gumbel": _GUMBEL}
    quantizer = config.get("quantizer", "vq")
    if quantizer not in targets:
        raise ValueError(f"quantizer {quantizer!r} has no working class in taming")
    network = {key: config[key] for key in _NETWORK if key in config and key != "attn_type"}
    params: dict[str, Any] = {"embed_dim": config["embed_dim"], "n_embed": config["n_embed"]}
    if config.get("attn_type", "vanilla") != "vanilla":  # LDM's network alone has this switch
        if quantizer != "vq":
            raise ValueError("attn_type must be 'vanilla' for the Gumbel tokenizer of taming")
        network["attn_type"] = config["attn_type"]
        targets["vq"] = _LDM_VQ
    if quantizer == "gumbel":
        params["kl_weight"] = config.get("kl_weight", 5e-4)
        params["temperature_scheduler_config"] = {
            "target": "taming.lr_scheduler.LambdaWarmUpCosineScheduler",
            "params": {
                "warm_up_steps": 0,
                "max_decay_steps": 1000001,
                "lr_start": 0.9,
                "lr_max": 0.9,
                "lr_min": 1.0e-06,
            },
        }
    params["ddconfig"] = network
    params["lossconfig"] = {"target": _DUMMY_LOSS}
    return {"target": targets[quantizer], "params": params}


def _net2net_yaml(config: Mapping[str, Any]) -> dict:
    conditioning = config["conditioning"]
    stages: dict[str, Any] = {
        "class": lambda: {"target": _LABELATOR, "params": {"n_classes": conditioning["n_classes"]}},
        "sos": lambda: "__is_unconditional__",
        "first_stage": lambda: "__is_first_stage__",
        "tokenizer": lambda: _tokenizer_yaml(conditioning["config"]),
        "coord": lambda: {
            "target": _COORDINATES,
            "params": {k: conditioning[k] for k in ("n_embed", "down_factor")},
        },
    }
    keys = {"class": "class_label", "sos": "image", "coord": "coord"}
    params = {
        "first_stage_key": "image",
        "cond_stage_key": keys.get(conditioning["kind"], "image"),
        "transformer_config": {"target": _GPT, "params": dict(config["transformer"])},
        "first_stage_config": _tokenizer_yaml(config["tokenizer"]),
        "cond_stage_config": stages[conditioning["kind"]](),
    }
    if conditioning["kind"] == "sos":
        params["sos_token"] = conditioning["sos_token"]
    return {"target": _NET2NET, "params": params}
