"""`[data]`: which columns of a table, or which pictures, become a model's rows. Rank 1."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from atoll.sections import Section, Value, nearest

PRINTABLE = "".join(map(chr, range(32, 127))) + "\n"
"""The alphabet of a plan that names none."""


class Columns(Section):
    """`[data]`: which columns of a table become the model's input, and how.

    `columns` names the columns of files without a header. `categories` are coded one-hot, the first
    value of each left out. Rows with a word of `missing` in a used column are left out; with `incomplete =
    "keep"`, for trees, only those without a target are, and what a feature lacks is NaN. `positive` turns
    the target into 1 where it has one of these values and 0 elsewhere. `split` names a column with
    `train` or `test` in each row. `standardise` takes each node's own training mean and deviation.
    `words` and `characters` make numbers of text, by a rule that looks at no data: see `preprocess.text`; a target that is
    itself the feature with `characters` stands for what comes next.
    For folders of pictures, `image` is height, width and channels, and `classes` are the folders' names in
    the order of their labels.
    """

    features: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    target: str | None = None
    columns: tuple[str, ...] | None = None
    positive: tuple[Value, ...] | None = None
    categories: dict[str, Annotated[tuple[Value, ...], Field(min_length=2)]] = Field(default_factory=dict)
    words: dict[str, PositiveInt] = Field(default_factory=dict)
    characters: dict[str, PositiveInt] = Field(default_factory=dict)
    alphabet: Annotated[str, Field(min_length=1)] = PRINTABLE
    missing: tuple[str, ...] = ("",)
    incomplete: Literal["drop", "keep"] = "drop"
    split: str | None = None
    standardise: Literal["no", "node"] = "no"
    image: tuple[PositiveInt, PositiveInt, Literal[1, 3, 4]] | None = None
    classes: Annotated[tuple[str, ...], Field(min_length=2)] | None = None

    @property
    def width(self) -> int | None:
        """How many inputs a row gives, or None where the plan names no features."""
        return None if self.features is None else sum(self.widths.values())

    @property
    def widths(self) -> dict[str, int]:
        """How many inputs each feature gives."""
        coded = {**self.words, **self.characters, **{name: len(kinds) - 1 for name, kinds in self.categories.items()}}
        return {name: coded.get(name, 1) for name in self.features or ()}

    @property
    def foretold(self) -> bool:
        """Whether the target is what comes next in the feature, character by character."""
        return self.target in self.characters

    @model_validator(mode="after")
    def _one_rule_for_text(self) -> Self:
        text = [*self.categories, *self.words, *self.characters]
        if twice := [name for name in text if text.count(name) > 1]:
            raise ValueError(f"'{twice[0]}' is coded twice: it has a place in one of categories, words and characters")
        if len(set(self.alphabet)) < len(self.alphabet):
            raise ValueError("a character is in alphabet twice")
        if self.standardise != "no" and (self.words or self.characters):
            raise ValueError("words and characters have their right size already: leave standardise out")
        if self.foretold and (len(self.features or ()) > 1 or self.positive is not None):
            raise ValueError(
                "a target that is its own feature stands for the next character: leave out positive, and other features"
            )
        return self

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if (self.features is None) != (self.target is None):
            raise ValueError("features and target go together: name both, or neither and give arrays from Python")
        if self.incomplete == "keep" and self.standardise != "no":
            raise ValueError('with incomplete = "keep" rows have gaps, and trees need no scaling: leave standardise out')
        if (self.image is None) != (self.classes is None) or (self.image and self.features):
            raise ValueError("image and classes go together, and without features: rows are pictures, or of columns")
        features = self.features or ()
        for table in ("categories", "words", "characters"):
            for name in getattr(self, table):
                if name not in features:
                    raise ValueError(f"{table}.{name} is no feature{nearest(name, features)}")
        if len(set(features)) != len(features):
            raise ValueError("a feature is named twice")
        for used in (*features, self.target, self.split):
            if self.columns and used and used not in self.columns:
                raise ValueError(f"'{used}' is not among columns{nearest(used, self.columns)}")
        return self
