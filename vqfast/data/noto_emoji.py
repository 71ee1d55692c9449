"""Noto Color Emoji (googlefonts/noto-emoji, Apache-2.0): PNG named by code point, in classes of
Unicode's subgroups.

The classes are in `_noto_classes.py`, which `python -m vqfast.data.noto_emoji emoji-test.txt`
prints from Unicode's list of emoji (unicode.org/Public/emoji; Debian has it in unicode-data).
"""

import itertools
import os
import re
import sys
import tarfile
from collections.abc import Iterable
from pathlib import Path

from vqfast.data import archive, folder
from vqfast.data._noto_classes import CLASSES
from vqfast.data.source import Selection, Source, looks_like_picture
from vqfast.errors import DataError

_NAME = re.compile(rb"emoji_u([0-9a-f]{4,6}(?:_[0-9a-f]{4,6})*)\.png")
_SKIN_TONES = frozenset(["1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff"])
_PRESENTATION = "fe0f"  # "show as a picture": in Unicode's lists, not in the file names

# class -> Unicode subgroups; what looks like nothing else in its subgroup is left out
_SUBGROUPS = {
    "faces": "face-smiling face-affection face-tongue face-hand face-neutral-skeptical "
    "face-sleepy face-unwell face-hat face-glasses face-concerned face-negative",
    "hearts": "heart",
    "hands": "hand-fingers-open hand-fingers-partial hand-single-finger hand-fingers-closed "
    "hands hand-prop",
    "people": "person person-gesture person-role person-fantasy",
    "mammals": "animal-mammal cat-face monkey-face",
    "birds": "animal-bird",
    "sea, reptiles and bugs": "animal-amphibian animal-reptile animal-marine animal-bug",
    "plants": "plant-flower plant-other",
    "fruit and vegetables": "food-fruit food-vegetable",
    "meals and sweets": "food-prepared food-asian food-marine food-sweet",
    "drinks and dishes": "drink dishware",
    "buildings and places": "place-building place-religious place-other place-geographic",
    "land vehicles": "transport-ground",
    "ships and aircraft": "transport-water transport-air",
    "clocks": "time",
    "sky and weather": "sky & weather",
    "sports and games": "sport game award-medal",
    "clothing": "clothing",
    "music and sound": "sound music musical-instrument",
    "devices": "phone computer light & video",
    "paper and office": "book-paper money mail writing office",
    "tools and household": "lock tool science medical household",
    "signs": "transport-sign warning arrow religion zodiac av-symbol math "
    "punctuation other-symbol keycap alphanum",
    "shapes": "geometric",
}


def claims(path: Path) -> int:
    """2, above a plain tar or folder, if the first picture there is named as an emoji."""
    try:
        if path.is_dir():
            with os.scandir(os.fsencode(path)) as entries:
                names = [entry.name for entry in itertools.islice(entries, 100)]
        elif path.is_file() and tarfile.is_tarfile(path):
            with tarfile.open(path) as tar:
                names = [os.fsencode(os.path.basename(m.name)) for m in itertools.islice(tar, 10)]
        else:
            return 0
    except (OSError, EOFError, ValueError, tarfile.TarError):
        return 0
    first = next(filter(looks_like_picture, names), b"")
    return 2 if _NAME.fullmatch(first) else 0


def emoji_source(
    source: Source, *, classes: Iterable[str] | None = None, skin_tones: bool = False
) -> Selection:
    """The emoji of a folder or an archive that belong to a class, labelled.

    Args:
        source: pictures named `emoji_u<code points>.png`.
        classes: names out of `CLASSES`; all by default. Labels count in this order.
        skin_tones: True also takes the five tones of each hand and person, in the class of their
            base.

    Raises:
        DataError: none of the pictures is in a class.
        ValueError: unknown class.
    """
    chosen = list(CLASSES) if classes is None else list(classes)
    for name in chosen:
        if name not in CLASSES:
            raise ValueError(f"classes must be out of {', '.join(CLASSES)}; got {name!r}")
    label_of = {key: i for i, name in enumerate(chosen) for key in CLASSES[name].split()}
    indices, labels = [], []
    for index in range(len(source)):
        match = _NAME.fullmatch(source.name(index).rsplit(b"/", 1)[-1])
        points = match[1].decode().split("_") if match else []
        plain = [p for p in points if p not in _SKIN_TONES] if skin_tones else points
        label = label_of.get("_".join(plain))
        if label is not None:
            indices.append(index)
            labels.append(label)
    if not indices:
        raise DataError(f"{source.root}: 0 pictures are named as an emoji of a known class")
    return Selection(source, indices, labels=labels, class_names=chosen)


def open_source(path: Path, *, subset: str | None = None) -> Selection:
    """The emoji at `path`; `subset` holds class names with semicolons between.

    Raises:
        DataError: as `emoji_source`, or an unknown class in `subset`.
    """
    base: Source = folder.FolderSource(path) if path.is_dir() else archive.TarSource(path)
    classes = None if subset is None else [c.strip() for c in subset.split(";")]
    try:
        return emoji_source(base, classes=classes)
    except ValueError as error:
        raise DataError(str(error)) from None


# ---- the table


def build_classes(emoji_test: str) -> dict[str, list[str]]:
    """Class -> code points in the style of the file names, in Unicode's order, without skin
    tones.
    """
    class_of = {}
    for kind, subgroups in _SUBGROUPS.items():
        for subgroup in subgroups.replace(" & ", "&").split():
            class_of[subgroup.replace("&", " & ")] = kind
    classes: dict[str, list[str]] = {kind: [] for kind in _SUBGROUPS}
    name: str | None = None
    seen: set[str] = set()
    for line in emoji_test.splitlines():
        if line.startswith("# subgroup:"):
            name = class_of.get(line.partition(":")[2].strip())
        elif name and line and not line.startswith("#"):
            points = [p.lower() for p in line.split(";")[0].split()]
            key = "_".join(p.zfill(4) for p in points if p != _PRESENTATION)
            if key not in seen and not _SKIN_TONES.intersection(points):
                seen.add(key)
                classes[name].append(key)
    return classes


def _print_table(emoji_test: str) -> None:
    """The text of `_noto_classes.py`."""
    version = re.search(r"^# Version: (\S+)", emoji_test, re.MULTILINE)
    print('"""Classes of emoji, by code points. `noto_emoji.py` made this file from emoji-test.txt')
    print(f'of Unicode {version[1] if version else "?"}."""\n')
    print("CLASSES = {")
    for name, keys in build_classes(emoji_test).items():
        print(f'    "{name}": """')
        line = ""
        for key in [*keys, None]:
            if key is None or len(line) + len(key) > 98:
                print(line.rstrip())
                line = ""
            line += f"{key} "
        print('    """,')
    print("}")


if __name__ == "__main__":
    _print_table(Path(sys.argv[1]).read_text(encoding="utf-8"))
