"""What a run of SPIN works with from its beginning to its end."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from components.common.models.chat_templates import EncodedRow
from components.common.training.preference import EncodedPair
from components.spin import generation
from components.spin.config import SPINSettings
from components.spin.files import RunFiles


@dataclass(frozen=True)
class SPINInputs:
    """All that a run is given, none of which changes while it is under way.

    Attributes:
        model: directory of the start model.
        tokenizer: its tokenizer.
        train_rows: chosen responses with their prompts, as tokens.
        held_out_rows: the same of held-out rows; may be empty.
        settings: of the method.
        files: places of what the run leaves on disk.
        log_directory: where curves and sampled pairs go.
    """

    model: str
    tokenizer: PreTrainedTokenizerBase
    train_rows: Sequence[EncodedRow]
    held_out_rows: Sequence[EncodedRow]
    settings: SPINSettings
    files: RunFiles
    log_directory: Path

    def start_model(self, index: int) -> str:
        """The model that an iteration generates with, starts from and, with DPO, references."""
        return self.model if index == 0 else str(self.files.model(index - 1))

    def pairs(self, index: int) -> list[EncodedPair]:
        """The pairs that an iteration has generated."""
        return generation.read_pairs(self.files.generated(index), self.train_rows)

    def held_out_pairs(self, index: int) -> list[EncodedPair] | None:
        """The same of held-out rows; None where there are none."""
        if not self.held_out_rows:
            return None
        return generation.read_pairs(self.files.held_out(index), self.held_out_rows)
