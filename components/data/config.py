"""Settings of the data stage."""

import dataclasses
import math
from typing import Literal

from components.common.core.identity import Role
from components.common.stage.config import REQUIRED, StageConfig, setting
from components.common.storage.locations import scheme, split_hub
from components.data.formats import PACKAGES, FormatName, known_layouts

PACKAGE_URIS = ", ".join(PACKAGES)


@dataclasses.dataclass(kw_only=True)
class DataConfig(StageConfig):
    """Settings of the data stage."""

    source: str = setting(
        REQUIRED,
        "Where the conversations come from: a .jsonl, .json or .parquet file, a directory of such files, "
        f"hf://owner/name[@revision], or {PACKAGE_URIS}.",
        paper="hf://argilla/distilabel-capybara-dpo-7k-binarized",
        role=Role.INPUT,
    )
    source_split: str | None = setting(
        None, "For a directory or a hub data set: read only the files named after this split, e.g. train_sft."
    )
    format: FormatName = setting(
        "auto", f"Layout of the rows; auto looks at the fields of the first rows. {known_layouts()}."
    )

    test_rows: int | float = setting(
        500,
        "Rows to hold out, at most; below 1 the share of usable rows; conversations are held out whole. 0 for none.",
    )
    test_source: str | None = setting(
        None, "Take the held-out rows from here instead of from `source`.", role=Role.INPUT
    )
    test_source_split: str | None = setting(None, "`source_split` of `test_source`, e.g. test_sft.")
    seed: int = setting(42, "Another seed is another split and another order.")
    max_rows: int | None = setting(None, "Keep at most this many training rows.")

    min_response_characters: int = setting(1, "Shorter responses are filtered out (characters).")
    max_response_characters: int | None = setting(None, "Longer responses are filtered out (characters).")
    min_prompt_characters: int = setting(1, "Shorter prompts, all messages together, are filtered out (characters).")
    max_prompt_characters: int | None = setting(
        None, "Longer prompts are filtered out (characters); chitchat drops oldest turns to fit first."
    )
    min_turns: int = setting(1, "Prompts of fewer messages are filtered out (the system message does not count).")
    max_turns: int | None = setting(
        None, "Prompts of more messages are filtered out; for chitchat this is the window, rounded down to odd."
    )

    rejected: Literal["none", "other_conversation"] = setting(
        "none",
        "other_conversation gives rows without a `rejected` one: a reply of similar length from another conversation "
        "of the same split. none adds nothing.",
    )
    max_rejected_share: float = setting(0.05, "Stop when more than this share of the rows is broken (0 to 1).")
    report_file: str | None = setting(None, "Also write report.md to this file.", role=Role.OUTPUT_FILE)

    def __post_init__(self) -> None:
        for name in ("source", "test_source"):
            _check_source(name, getattr(self, name), self.format)
        if self.test_source_split and not self.test_source:
            raise ValueError(f"test_source_split = {self.test_source_split!r} needs test_source")
        if not 0 <= self.max_rejected_share <= 1:
            raise ValueError(f"max_rejected_share = {self.max_rejected_share} must be between 0 and 1")
        for name, least in {"test_rows": 0, "max_rows": 1, "min_turns": 1, "max_turns": 1}.items():
            if (value := getattr(self, name)) is not None and value < least:
                raise ValueError(f"{name} = {value} must be {least} or more")
        if self.test_rows != int(self.test_rows) and not (self.test_rows < 1 and self.test_source is None):
            raise ValueError(f"test_rows = {self.test_rows} must be whole, or a share of `source` below 1")
        for what in ("response_characters", "prompt_characters", "turns"):
            self._check_range(f"min_{what}", f"max_{what}")

    def rows_to_hold_out(self, usable: int) -> int:
        """How many of the usable rows may be held out; a share is rounded up."""
        return math.ceil(self.test_rows * usable) if 0 < self.test_rows < 1 else int(self.test_rows)

    def _check_range(self, low: str, high: str) -> None:
        least, most = getattr(self, low), getattr(self, high)
        if least < 0:
            raise ValueError(f"{low} = {least} must be 0 or more")
        if most is not None and most < least:
            raise ValueError(f"{high} = {most} must not be below {low} = {least}")


def _check_source(name: str, uri: str | None, format: str) -> None:
    if uri is None:
        return
    if not uri.strip():
        raise ValueError(f"{name} is empty; give a path, hf://owner/name, or {PACKAGE_URIS}")
    if scheme(uri) not in ("", "hf", "pypi"):
        raise ValueError(
            f"{name} = {uri!r}: {scheme(uri)}:// is not read; give a path, hf://owner/name, or {PACKAGE_URIS}"
        )
    if scheme(uri) == "hf":
        split_hub(uri)
    if scheme(uri) == "pypi" and uri not in PACKAGES:
        raise ValueError(f"{name} = {uri!r}: the only package that can be read is {PACKAGE_URIS}")
    if uri in PACKAGES and format not in ("auto", PACKAGES[uri]):
        raise ValueError(f"format = {format!r} does not fit {name} = {uri!r}; leave it at auto")
