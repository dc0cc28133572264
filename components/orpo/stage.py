"""What of the training stage is orpo's own: its settings. There is no reference model."""

from collections.abc import Sequence
from typing import ClassVar

from components.common.training.preference import Loss, ORPOSettings
from components.common.training.preference_stage import PreferenceStage
from components.common.training.resume import ResumableStageConfig


class ORPOStage(PreferenceStage[ORPOSettings]):
    """Odds Ratio Preference Optimization."""

    name: ClassVar[str] = "orpo"
    loss: ClassVar[Loss] = "orpo"
    config_classes: ClassVar[Sequence[type]] = (ResumableStageConfig, ORPOSettings)
