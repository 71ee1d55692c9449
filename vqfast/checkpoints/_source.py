"""What the format files look at: one path, opened safely and read once."""

import functools
import os
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vqfast import config as run_config
from vqfast.checkpoints import _unpickle
from vqfast.errors import CheckpointError


class Source:
    """A checkpoint on disk and the configuration that the caller gave with it.

    Attributes:
        path: an existing regular file or folder.
        config: YAML path, tree of dicts and lists, or None.
        folder: True for a folder.
        head: the first bytes of a file, b"" for a folder.

    Raises (from the constructor):
        CheckpointError: the path is missing, unreadable, empty, or neither a regular file nor a
            folder (a FIFO is never opened).
    """

    def __init__(self, path: str | os.PathLike, config: Any = None):
        self.path = Path(path)
        self.config = _plain(config) if isinstance(config, Mapping) else config
        try:
            mode = os.stat(self.path).st_mode
            self.folder = stat.S_ISDIR(mode)
            if not self.folder and not stat.S_ISREG(mode):
                raise CheckpointError(f"{path}: neither a regular file nor a folder")
            self.head = b"" if self.folder else self._read_head()
        except OSError as error:
            raise CheckpointError(f"{path}: {error.strerror or error}") from None
        except ValueError as error:  # a null byte or a lone surrogate in the name
            raise CheckpointError(f"{str(path)!r}: {error}") from None
        if not self.folder and not self.head:
            raise CheckpointError(f"{path}: the file is empty")

    def _read_head(self) -> bytes:
        with open(self.path, "rb") as file:
            return file.read(64)

    @property
    def pickled(self) -> bool:
        """True when the content is not safetensors: then it has to be a file of `torch.save`."""
        return not self.folder and self.head[8:9] != b"{"

    @functools.cached_property
    def tree(self) -> Any:
        """What `torch.save` wrote. CheckpointError when it is anything else."""
        return _unpickle.load(self.path)

    @functools.cached_property
    def state(self) -> dict[str, Any]:
        """The state dict inside `tree`: under `state_dict`, or the tree itself. {} when there is
        none.
        """
        tree = self.tree
        inner = tree.get("state_dict", tree) if isinstance(tree, dict) else {}
        return inner if isinstance(inner, dict) and all(isinstance(k, str) for k in inner) else {}

    def settings(self, patterns: tuple[str, ...]) -> tuple[dict, str]:
        """The configuration tree and where it comes from: `config` if given, else the first YAML
        that a pattern finds.

        Args:
            patterns: globs below the file's folder; `{stem}` is the file's name without its suffix.

        Raises:
            CheckpointError: no file is found (the text lists where it was looked for), or it is
                unsafe or malformed.
        """
        if isinstance(self.config, dict):
            return self.config, "config"
        found = [Path(self.config)] if self.config is not None else []
        for pattern in patterns:
            if not found:
                literal = pattern.replace("{stem}", _escape(self.path.stem))
                found = sorted(self.path.parent.glob(literal))
        if not found:
            where = ", ".join(p.replace("{stem}", self.path.stem) for p in patterns)
            raise CheckpointError(
                f"{self.path}: no configuration found; n_head, resolution and the like cannot be "
                "read from weights. "
                f"Put its YAML beside it (looked for {where}) or give config="
            )
        try:
            return run_config.read(found[-1]), str(found[-1])
        except run_config.ConfigError as error:
            raise CheckpointError(str(error)) from None


def _plain(tree: Any) -> Any:
    """The tree of dicts and lists that a mapping stands for: OmegaConf's containers are neither."""
    if isinstance(tree, Mapping):
        return {key: _plain(value) for key, value in tree.items()}
    nested = isinstance(tree, Sequence) and not isinstance(tree, (str, bytes))
    return [_plain(value) for value in tree] if nested else tree


def _escape(text: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in text)
