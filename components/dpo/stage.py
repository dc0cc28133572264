"""What of the training stage is dpo's own: its settings, and the start model as the reference."""

from collections.abc import Sequence
from typing import ClassVar

from transformers import PreTrainedModel

from components.common.models.loading import load_model
from components.common.training.preference import DPOSettings, Loss
from components.common.training.preference_stage import PreferenceStage
from components.common.training.resume import ResumableStageConfig


class DPOStage(PreferenceStage[DPOSettings]):
    """Direct Preference Optimization."""

    name: ClassVar[str] = "dpo"
    loss: ClassVar[Loss] = "dpo"
    config_classes: ClassVar[Sequence[type]] = (ResumableStageConfig, DPOSettings)

    def load_reference(self) -> PreTrainedModel:
        return load_model(self.config.start_model, "float32")
