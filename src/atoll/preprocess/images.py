"""Pictures in a folder for each class as blocks: decoded, brought to the plan's size, as numbers from 0 to 1."""

from __future__ import annotations

import difflib
from collections.abc import Generator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from atoll.columns import Columns
from atoll.errors import DataError
from atoll.plan import Plan
from atoll.preprocess.batch import Block, Source, rows_for

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_SIDES = ("train", "test")


class _Picture(NamedTuple):
    path: Path
    label: int
    test: bool


def source(folder: Path, plan: Plan) -> Source:
    """Return the pictures of `folder/class/*`, or of `folder/train/class/*` and `folder/test/class/*`.

    Args:
        folder: where they are; names that start with a dot are passed over.
        plan: whose `data.image` is height, width and channels, and whose `data.classes` are the folders' names in the order
            of their labels.

    Raises:
        DataError: a folder that is no class, no picture at all, or one that can't be decoded.
    """
    height, width, channels = plan.data.image or (0, 0, 0)
    numbers = height * width * channels
    if plan.inputs not in (None, numbers):
        raise DataError(f"{folder}: a picture has {height} × {width} × {channels} numbers, the plan's model takes {plan.inputs}")
    pictures = _found(folder, plan.data)
    if not pictures:
        raise DataError(f"{folder}: there are no pictures in it; they belong in a folder for each of {_words(plan.data)}")

    def blocks() -> Generator[Block, None, None]:
        step = rows_for(numbers)
        for lo in range(0, len(pictures), step):
            part = pictures[lo : lo + step]
            x = np.stack([_decoded(picture.path, height, width, channels) for picture in part])
            labels, test = np.array([picture.label for picture in part]), np.array([picture.test for picture in part])
            yield Block(x if plan.inputs is None else x.reshape(len(x), -1), labels, test, len(part))

    return Source(str(folder), blocks, len(pictures))


def _found(folder: Path, columns: Columns) -> list[_Picture]:
    classes = columns.classes or ()
    try:
        names = [path.name for path in _inside(folder)]
        split = bool(names) and all(name in _SIDES and name not in classes for name in names)
        sides = [(folder / name, name == "test") for name in _SIDES if name in names] if split else [(folder, False)]
        found = []
        for side, test in sides:
            for place in _inside(side):
                if place.name not in classes:
                    close = difflib.get_close_matches(place.name, classes, 1, 0.5)
                    hint = f"; did you mean '{close[0]}'?" if close else ""
                    raise DataError(f"{place}: '{place.name}' is not in the plan's data.classes = {_words(columns)}{hint}")
                found += [_Picture(path, classes.index(place.name), test) for path in _inside(place)]
    except OSError as error:
        raise DataError(f"{folder}: can't be read ({error.strerror}); name a folder with a folder for each class") from error
    return found


def _inside(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _words(columns: Columns) -> list[str]:
    return list(columns.classes or ())


def _decoded(path: Path, height: int, width: int, channels: int) -> NDArray[np.float32]:
    """Return a picture `[height, width, channels]`, turned the way its camera says."""
    try:
        with Image.open(path) as file:
            if file.mode.startswith(("I", "F")):
                raise DataError(f"{path}: has more than 8 bits a channel, which would be cut off; save it with 8")
            picture = ImageOps.exif_transpose(file).convert(_MODES[channels])
            if picture.size != (width, height):
                picture = picture.resize((width, height), Image.Resampling.BILINEAR)
            pixels = np.asarray(picture, np.float32).reshape(height, width, channels)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        said = " ".join(str(error).split()).removesuffix(f" {str(path)!r}")
        raise DataError(f"{path}: can't be decoded as a picture ({said}); mend it or take it out") from error
    return pixels / np.float32(255)
