"""Run configurations: YAML plus `key=value` overrides, merged by OmegaConf and checked against
dataclasses.

A file is data and nothing else. It is read by a safe YAML loader (a Python tag is refused), its
aliases may not expand beyond `_MAX_NODES` nodes, `${...}` is refused, and a `target:` is a name
that is looked up in `TARGETS`: a string that stands for a kind of thing. Nothing is imported or run
because a file says so.

    settings = load("run.yaml", ["model.n_embed=48", "train.max_steps=100"], Schema)

`Schema` is a dataclass of dataclasses. Its field types and the metadata that `key()` puts on them
are the rules; what breaks one raises `ConfigError`, which names the full path of the key, such as
`model.n_embedd`.
"""

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar, Union

import yaml

from vqfast import _check

__all__ = ["TARGETS", "ConfigError", "build", "dump", "key", "kind_of", "load", "read", "to_dict"]

T = TypeVar("T")

_MAX_BYTES = 1 << 20  # a run configuration is a few KB
_MAX_NODES = 20_000  # after the expansion of aliases

# Every `target:` that a file may name, and what it stands for here.
TARGETS: dict[str, str] = {
    "taming.models.vqgan.VQModel": "tokenizer:vq",
    "taming.models.vqgan.VQNoDiscModel": "tokenizer:vq",
    "taming.models.vqgan.GumbelVQ": "tokenizer:gumbel",
    "taming.models.vqgan.EMAVQ": "tokenizer:ema",
    "ldm.models.autoencoder.VQModel": "tokenizer:vq",
    "ldm.models.autoencoder.VQModelInterface": "tokenizer:vq",
    "taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator": "loss:gan",
    "taming.modules.losses.vqperceptual.DummyLoss": "loss:none",
    "taming.modules.losses.DummyLoss": "loss:none",
    "ldm.modules.losses.vqperceptual.VQLPIPSWithDiscriminator": "loss:gan",
    "taming.models.cond_transformer.Net2NetTransformer": "transformer",
    "taming.modules.transformer.mingpt.GPT": "gpt",
    "taming.modules.transformer.permuter.Identity": "permuter:identity",
    "taming.modules.util.SOSProvider": "condition:unconditional",
    "taming.modules.util.Labelator": "condition:class",
    "taming.modules.misc.coord.CoordStage": "condition:coordinates",
    "main.DataModuleFromConfig": "data",
    "taming.data.custom.CustomTrain": "images",
    "taming.data.custom.CustomTest": "images",
    "taming.data.faceshq.FacesHQTrain": "images",
    "taming.data.faceshq.FacesHQValidation": "images",
    "taming.data.faceshq.FFHQTrain": "images",
    "taming.data.faceshq.FFHQValidation": "images",
    "taming.data.faceshq.CelebAHQTrain": "images",
    "taming.data.faceshq.CelebAHQValidation": "images",
    "taming.data.imagenet.ImageNetTrain": "images",
    "taming.data.imagenet.ImageNetValidation": "images",
    "ldm.data.openimages.FullOpenImagesTrain": "images",
    "ldm.data.openimages.FullOpenImagesValidation": "images",
}


class ConfigError(ValueError):
    """A configuration that cannot be used; the text names the file or the full path of the key."""


def key(default: Any, doc: str, **rules: Any) -> Any:
    """A dataclass field with its explanation and its rules: `low`, `high`, `low_open`,
    `choices`.
    """
    metadata = {"doc": doc, **rules}
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def kind_of(target: Any, where: str = "target") -> str:
    """What a `target:` name stands for. ConfigError lists the known names."""
    if not isinstance(target, str) or target not in TARGETS:
        known = ", ".join(sorted(TARGETS))
        raise ConfigError(f"{where}: unknown target {target!r}; known names: {known}")
    return TARGETS[target]


# ---- reading


class _Loader(yaml.SafeLoader):
    """Safe YAML that reads 1e-4 as a number, as OmegaConf does, and refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for name, _ in node.value:
            if not isinstance(name, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(
                    None, None, "a key must be a plain name", name.start_mark
                )
            if name.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {name.value!r} is given twice", name.start_mark
                )
            seen.add(name.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def _expanded_size(node: yaml.Node, sizes: dict[int, int], open_nodes: set[int]) -> int:
    """Nodes below `node` with every alias written out; ConfigError for a loop."""
    if id(node) in open_nodes:
        raise ConfigError("an alias refers to a block that holds it")
    if id(node) not in sizes:
        open_nodes.add(id(node))
        children: Iterable[yaml.Node] = ()
        if isinstance(node, yaml.SequenceNode):
            children = node.value
        elif isinstance(node, yaml.MappingNode):
            children = [child for pair in node.value for child in pair]
        sizes[id(node)] = 1 + sum(_expanded_size(child, sizes, open_nodes) for child in children)
        open_nodes.discard(id(node))
    return sizes[id(node)]


def _parse(text: str) -> dict:
    try:
        loader = _Loader(text)
    except yaml.YAMLError as error:  # a character that no text file holds
        raise ConfigError(" ".join(str(error).split())) from None
    try:
        node = loader.get_single_node()
        if node is None:
            return {}
        if _expanded_size(node, {}, set()) > _MAX_NODES:
            raise ConfigError(f"its aliases expand to more than {_MAX_NODES} nodes")
        tree = loader.construct_document(node)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(" ".join(str(error).split()) or type(error).__name__) from None
    finally:
        loader.dispose()
    if not isinstance(tree, dict):
        raise ConfigError(f"must be a mapping of sections, got {type(tree).__name__}")
    return tree


def _refuse_interpolation(tree: Any, where: str) -> None:
    if isinstance(tree, dict):
        for name, value in tree.items():
            _refuse_interpolation(value, f"{where}.{name}" if where else str(name))
    elif isinstance(tree, list):
        for i, value in enumerate(tree):
            _refuse_interpolation(value, f"{where}[{i}]")
    elif isinstance(tree, str) and "${" in tree:
        raise ConfigError(f"{where}: ${{...}} is not expanded here; write the value itself")


def read(path: str | Path) -> dict:
    """The plain tree of a YAML file. ConfigError names the file when it is absent, too big, unsafe
    or malformed.
    """
    path = Path(path)
    try:
        if not path.is_file():
            raise ConfigError(f"{path}: no such file")
        if path.stat().st_size > _MAX_BYTES:
            raise ConfigError(f"{path}: larger than {_MAX_BYTES} bytes, not a configuration")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not UTF-8 text") from None
    try:
        tree = _parse(text)
        _refuse_interpolation(tree, "")
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return tree


def _read_overrides(overrides: Iterable[str]) -> list[tuple[str, Any]]:
    pairs = []
    for item in overrides:
        name, sign, text = item.partition("=")
        if not sign or not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", name):
            raise ConfigError(f"{item}: an override is written section.key=value")
        try:
            value = _parse(f"value: {text}" if text else "value: ''")["value"]
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from None
        _refuse_interpolation(value, name)
        pairs.append((name, value))
    return pairs


def _merge(tree: dict, pairs: list[tuple[str, Any]]) -> dict:
    """`tree` with each (dotted name, value) put into it; a later pair wins."""
    # here: a third of the time that loading a native model's code takes, which reads no YAML
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        merged = OmegaConf.create(tree)
        for name, value in pairs:
            OmegaConf.update(merged, name, value, merge=False, force_add=True)
        return typing.cast(dict, OmegaConf.to_container(merged, resolve=False))
    except OmegaConfBaseException as error:
        names = ", ".join(name for name, _ in pairs)
        raise ConfigError(f"{names or 'configuration'}: {str(error).splitlines()[0]}") from None


# ---- checking


def _type_name(value: Any) -> str:
    return f"{type(value).__name__} {value!r}" if value is not None else "null"


def _scalar(kind: Any, value: Any, where: str, rules: Mapping[str, Any]) -> Any:
    if kind is bool:
        if not isinstance(value, bool):
            raise ConfigError(f"{where} must be true or false, got {_type_name(value)}")
        return value
    if kind is str:
        if not isinstance(value, str):
            raise ConfigError(f"{where} must be text, got {_type_name(value)}")
        choices = rules.get("choices")
        if choices and value not in choices:
            raise ConfigError(f"{where} must be one of {', '.join(choices)}, got {value!r}")
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        wanted = "an integer" if kind is int else "a number"
        raise ConfigError(f"{where} must be {wanted}, got {_type_name(value)}")
    bounds = {
        name: rules[name] for name in ("low", "high", "low_open", "high_open") if name in rules
    }
    try:
        _check.number(where, value, **bounds)
    except (ValueError, OverflowError) as error:
        raise ConfigError(str(error)) from None
    if kind is int:
        if value != math.floor(value):
            raise ConfigError(f"{where} must be an integer, got {value}")
        return int(value)
    return float(value)


def _convert(kind: Any, value: Any, where: str, rules: Mapping[str, Any]) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        options = [a for a in arguments if a is not type(None)]
        for option in options[:-1]:
            try:
                return _convert(option, value, where, rules)
            except ConfigError:
                continue
        return _convert(options[-1], value, where, rules)
    if dataclasses.is_dataclass(kind):
        return build(typing.cast(type, kind), value, where)
    if origin in (tuple, list):
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{where} must be a list, got {_type_name(value)}")
        if Ellipsis not in arguments and origin is tuple and len(value) != len(arguments):
            raise ConfigError(f"{where} must hold {len(arguments)} values, got {list(value)}")
        items = [_convert(arguments[0], v, f"{where}[{i}]", rules) for i, v in enumerate(value)]
        return origin(items)
    if origin is dict or kind is dict:
        if not isinstance(value, dict):
            raise ConfigError(f"{where} must be a mapping, got {_type_name(value)}")
        return value
    if kind in (bool, int, float, str):
        return _scalar(kind, value, where, rules)
    return value


def build(schema: type[T], tree: Any, where: str = "") -> T:
    """An instance of the dataclass `schema` from a plain tree; ConfigError names the path of what
    does not fit.
    """
    if not isinstance(tree, dict):
        raise ConfigError(f"{where or 'configuration'} must be a mapping, got {_type_name(tree)}")
    listed = dataclasses.fields(schema)  # type: ignore[arg-type]  # no bound of T is "dataclass"
    fields = {f.name: f for f in listed if f.init}
    hints = typing.get_type_hints(schema)
    values = {}
    for name, value in tree.items():
        path = f"{where}.{name}" if where else str(name)
        if name not in fields:
            near = difflib.get_close_matches(str(name), fields, 1)
            hint = f"; did you mean {near[0]}?" if near else f"; known keys: {', '.join(fields)}"
            raise ConfigError(f"{path}: unknown key{hint}")
        values[name] = _convert(hints[name], value, path, fields[name].metadata)
    try:
        return schema(**values)
    except (TypeError, ValueError) as error:
        text = str(error)
        named = re.match(r"\w+", text)
        joint = "." if named and named.group() in fields else ": "
        raise ConfigError(f"{where}{joint}{text}" if where else text) from None


def load(path: str | Path, overrides: Iterable[str], schema: type[T]) -> T:
    """A file and overrides as an instance of `schema`.

    Args:
        path: YAML in this project's layout (sections `model`, `loss`, `data`, `train`) or in
            taming's (`target`, `params`).
        overrides: `section.key=value`, the value in YAML; `model.params.…` reaches into a file in
            taming's layout.
        schema: dataclass of dataclasses. It may have two static methods from tree to tree:
            `translate`, which turns a foreign layout into its own, and `complete`, which fills in
            keys that follow from others.

    Raises:
        ConfigError: names the file, or the full path of the key that is unknown, of the wrong type
            or out of range.
    """
    tree, pairs = read(path), _read_overrides(overrides)
    foreign = [pair for pair in pairs if ".params." in pair[0]]
    tree = _merge(tree, foreign)
    tree = getattr(schema, "translate", _unchanged)(tree)
    tree = _merge(tree, [pair for pair in pairs if pair not in foreign])
    return build(schema, getattr(schema, "complete", _unchanged)(tree))


def _unchanged(tree: dict) -> dict:
    return tree


def to_dict(settings: Any) -> dict:
    """The plain tree of a dataclass instance: tuples become lists."""
    plain = dataclasses.asdict(settings)

    def walk(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: walk(v) for name, v in value.items()}
        return [walk(v) for v in value] if isinstance(value, (list, tuple)) else value

    return walk(plain)


def dump(settings: Any, *, explain: bool = False) -> str:
    """YAML of the merged settings; `load` of this text gives them back.

    Args:
        explain: each key of ours stands under a comment that says what it means and may be.
    """
    if not explain:
        return _yaml(to_dict(settings))
    return "".join(_explained(settings, ""))


def _yaml(tree: dict) -> str:
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def _explained(settings: Any, indent: str) -> Iterable[str]:
    for f in dataclasses.fields(settings):
        value, doc = getattr(settings, f.name), f.metadata.get("doc")
        if dataclasses.is_dataclass(value):
            yield f"{indent}{f.name}:\n"
            yield from _explained(value, indent + "  ")
            continue
        if doc:
            choices = f.metadata.get("choices")
            one_of = f" ({', '.join(choices)})" if choices else ""
            yield f"{indent}# {doc}{one_of}\n"
        plain = list(value) if isinstance(value, tuple) else value
        yield from (f"{indent}{line}\n" for line in _yaml({f.name: plain}).splitlines())
