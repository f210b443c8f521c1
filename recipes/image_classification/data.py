"""The images to learn from: scikit-learn's handwritten digits, or a data set of the Hub; and how they are augmented.

Every source ends as a `datasets.DatasetDict` with the splits `train` and `validation` and the columns `image`, `label`
and `row`, the row's number at the source. Pixels are made when a row is read, and an augmentation is drawn from the
seed, the epoch and the row's number: it is the same whatever the number of processes and workers, and after a resume.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, load_dataset
from PIL import Image as Pictures
from sklearn.datasets import load_digits
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from recipes.recipe_parts.command_line import InputError
from recipes.recipe_parts.splits import held_out_rows

DIGITS_NAME = "scikit-learn's handwritten digits"
VALIDATION_SPLITS = ("validation", "test")
_MODES = {1: "L", 3: "RGB"}
_MOST_STRETCH = 4 / 3  # of a random crop: its width over its height, or the other way


def load_sklearn_digits(fraction: float) -> DatasetDict:
    """Load the 1797 digits of 8 by 8 pixels that scikit-learn has on board.

    Args:
        fraction: Share of each digit that is held out.
    """
    digits = load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)
    rows = {
        "image": [Pictures.fromarray(picture) for picture in pixels],
        "label": digits.target.tolist(),
    }
    features = Features({"image": Image(), "label": ClassLabel(names=[str(name) for name in digits.target_names])})
    return _with_validation(_numbered(DatasetDict(train=Dataset.from_dict(rows, features=features))), fraction)


def load_hub_images(
    name: str, config_name: str | None, image_column: str, label_column: str, fraction: float
) -> DatasetDict:
    """Load a data set of the Hub; `test` stands in for a `validation` split, and without either, rows are held out.

    Args:
        name: Name on the Hub, or path of a local data set folder.
        config_name: Configuration of that data set, if it has several.
        image_column: Column of images.
        label_column: Column of classes, as `ClassLabel` or strings.
        fraction: Share of each class that is held out if there is no split to validate with.

    Raises:
        InputError: There is no `train` split or no such column, or a column has another kind.
    """
    loaded = load_dataset(name, config_name)
    if "train" not in loaded:
        raise InputError(f"--dataset_name {name} has no split 'train'; it has: {', '.join(loaded)}.")
    validation = next((split for split in VALIDATION_SPLITS if split in loaded), None)
    splits = {"train": loaded["train"]} | ({"validation": loaded[validation]} if validation else {})
    chosen = DatasetDict(
        {split: _two_columns(rows, image_column, label_column, name) for split, rows in splits.items()}
    )
    if not isinstance(chosen["train"].features["label"], ClassLabel):
        names = sorted({str(label) for rows in chosen.values() for label in rows.unique("label")})
        chosen = chosen.cast_column("label", ClassLabel(names=names))
    return _with_validation(_numbered(chosen), fraction)


def _two_columns(rows: Dataset, image_column: str, label_column: str, source: str) -> Dataset:
    """Keep the two columns alone and call them `image` and `label`."""
    for flag, column in (("image_column", image_column), ("label_column", label_column)):
        if column not in rows.column_names:
            raise InputError(
                f"--{flag} {column} is not a column of {source}, which has: {', '.join(rows.column_names)}. "
                "Pass one of these."
            )
    if not isinstance(rows.features[image_column], Image):
        raise InputError(f"--image_column {image_column} of {source} holds {rows.features[image_column]}, no images.")
    rows = rows.select_columns([image_column, label_column])
    return rows.rename_columns(
        {old: new for old, new in ((image_column, "image"), (label_column, "label")) if old != new}
    )


def _with_validation(splits: DatasetDict, fraction: float) -> DatasetDict:
    """Hold out rows of `train`, the same share of each class, unless there is a validation split already."""
    if "validation" in splits:
        return splits
    train = splits["train"]
    held_out = held_out_rows(train["label"][:], fraction)
    kept = sorted(set(range(len(train))).difference(held_out))
    if not kept:
        raise InputError(
            f"--validation_fraction {fraction} leaves none of {len(train)} images to train on: give a smaller one."
        )
    return DatasetDict(train=train.select(kept), validation=train.select(held_out))


def _numbered(splits: DatasetDict) -> DatasetDict:
    return DatasetDict({split: rows.add_column("row", list(range(len(rows)))) for split, rows in splits.items()})


@dataclass
class Pixels:
    """Makes a batch of rows into what a model takes; give it to `Dataset.set_transform`.

    Without `augmented` it is the picture's middle, scaled to the model's size. With it, in this order: a random part
    of the picture, scaled to that size; a shift; a flip from left to right.

    Attributes:
        size: Height and width of the model's images.
        channels: 1 (grey) or 3 (colour).
        seed: Of the augmentation.
        augmented: Whether to augment.
        central_share: Without augmentation: side of the middle that is used over the shorter side of the picture.
        least_area: Smallest area of a random part over that of the picture; 1 for none but the middle.
        shift: Most pixels of a shift, up or down and left or right; what comes in is black.
        flip: Whether every other picture is flipped.
        epoch: Number of the epoch, set by `EpochOfPixels`.
    """

    size: int
    channels: int
    seed: int = 0
    augmented: bool = False
    central_share: float = 1.0
    least_area: float = 1.0
    shift: int = 0
    flip: bool = False
    epoch: int = 0

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """Return `pixel_values` (channels, size, size) in [-1, 1], and `labels`."""
        pictures = [picture.convert(_MODES[self.channels]) for picture in batch["image"]]
        if self.augmented:
            values = [self._augment(*pair) for pair in zip(pictures, batch["row"], strict=True)]
        else:
            values = [self._resized(picture, _middle(picture, self.central_share)) for picture in pictures]
        return {"pixel_values": values, "labels": batch["label"]}

    def _augment(self, picture: Pictures.Image, row: int) -> Tensor:
        random = np.random.default_rng([self.seed, self.epoch, row])
        box = _random_part(picture, self.least_area, random) if self.least_area < 1 else _middle(picture, 1.0)
        values = self._resized(picture, box)
        if self.shift:
            values = _shifted(values, *random.integers(-self.shift, self.shift, size=2, endpoint=True).tolist())
        if self.flip and random.random() < 0.5:
            values = values.flip(-1)
        return values

    def _resized(self, picture: Pictures.Image, box: tuple[float, float, float, float]) -> Tensor:
        """Scale the part of a picture to the model's size; left as it is where it has this size."""
        if picture.size != (self.size, self.size) or box != (0, 0, *picture.size):
            picture = picture.resize((self.size, self.size), Pictures.Resampling.BILINEAR, box=box)
        values = torch.from_numpy(np.asarray(picture, dtype=np.float32) / 127.5 - 1)
        return values.reshape(self.size, self.size, self.channels).permute(2, 0, 1).contiguous()


def _middle(picture: Pictures.Image, share: float) -> tuple[float, float, float, float]:
    """Return the box (left, top, right, bottom) of a square in the middle."""
    side = share * min(picture.size)
    left, top = (picture.width - side) / 2, (picture.height - side) / 2
    return left, top, left + side, top + side


def _random_part(
    picture: Pictures.Image, least_area: float, random: np.random.Generator
) -> tuple[float, float, float, float]:
    """Draw a box of random area, shape and place."""
    area = random.uniform(least_area, 1) * picture.width * picture.height
    stretch = np.exp(random.uniform(-np.log(_MOST_STRETCH), np.log(_MOST_STRETCH)))
    width, height = min(np.sqrt(area * stretch), picture.width), min(np.sqrt(area / stretch), picture.height)
    left, top = random.uniform(0, picture.width - width), random.uniform(0, picture.height - height)
    return left, top, left + width, top + height


def _shifted(values: Tensor, down: int, right: int) -> Tensor:
    """Move (channels, h, w) by whole pixels; what comes in is black, -1."""
    moved = torch.full_like(values, -1)
    height, width = values.shape[-2:]
    source = values[:, max(0, -down) : height - max(0, down), max(0, -right) : width - max(0, right)]
    moved[:, max(0, down) : height - max(0, -down), max(0, right) : width - max(0, -right)] = source
    return moved


class EpochOfPixels(TrainerCallback):
    """Tells the augmentation which epoch it is, also after a resume in the middle of one."""

    def __init__(self, pixels: Pixels) -> None:
        self._pixels = pixels

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set it."""
        self._pixels.epoch = int(state.epoch or 0)


def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Stack rows to `pixel_values` (B, channels, size, size) and `labels` (B,)."""
    return {
        "pixel_values": torch.stack([row["pixel_values"] for row in rows]),
        "labels": torch.tensor([row["labels"] for row in rows]),
    }
