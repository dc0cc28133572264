"""Settings of the preflight stage: what the run is going to use."""

from dataclasses import dataclass
from typing import Any

from components.common.core.identity import Role
from components.common.stage.config import StageConfig, setting
from components.common.stage.recipes import read_recipe


@dataclass(kw_only=True)
class PreflightConfig(StageConfig):
    """What a run will use. Every setting may be left out: what nobody named is not checked."""

    output: str | None = setting(  # type: ignore[assignment]
        None, "Not used: the stage writes its report only.", role=Role.OUTPUT_DIRECTORY
    )
    report_file: str | None = setting(
        None, "Write the table of checks to this file (KFP's Markdown artifact).", role=Role.OUTPUT_FILE
    )
    data_recipe: str | None = setting(None, "Recipe of the data stage.")
    data_settings: dict[str, Any] = setting({}, "Settings laid over it.")
    sft_data_recipe: str | None = setting(None, "Recipe of the data for SFT.")
    sft_data_settings: dict[str, Any] = setting({}, "Settings laid over it.")
    model_recipe: str | None = setting(None, "Recipe of the model stage.")
    model_settings: dict[str, Any] = setting({}, "Settings laid over it.")
    evaluation_recipe: str | None = setting(None, "Recipe of the evaluation.")
    evaluation_settings: dict[str, Any] = setting({}, "Settings laid over it.")
    methods: list[Any] = setting([], "What the run trains, with settings; buckets they name are checked.")
    gpu_type: str = setting("nvidia.com/gpu", "Kubernetes resource that GPUs are counted in.")
    gpus: int = setting(0, "GPUs of each training stage.")
    evaluation_gpus: int = setting(0, "GPUs of each evaluation.")

    def __post_init__(self) -> None:
        for name in ("gpus", "evaluation_gpus"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} = {getattr(self, name)}: must be 0 or more")

    def settings_of(self, stage: str) -> dict[str, Any]:
        """What a stage will read: its recipe with the settings over it; `stage` may be "sft_data".

        Raises:
            UserError: there is no such recipe.
        """
        recipe, settings = getattr(self, f"{stage}_recipe"), getattr(self, f"{stage}_settings")
        if recipe is None:
            return settings
        return read_recipe(stage.removeprefix("sft_"), recipe) | settings
