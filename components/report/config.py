"""Settings of the report stage."""

from dataclasses import dataclass

from components.common.core.identity import Role
from components.common.stage.config import StageConfig, setting


@dataclass(kw_only=True)
class ReportConfig(StageConfig):
    """What to report on, and how."""

    evaluations: list[str] = setting(
        [], "Directories that the evaluation stage wrote, one per row of the table, in order.", role=Role.INPUT
    )
    trainings: list[str] = setting(
        [],
        "Training logs of sft, sapo, ...: the log directory, or the model directory that holds it as `training`.",
        role=Role.INPUT,
    )
    title: str = setting("SAPO: comparison of models", "Heading of the report.")
    baseline_name: str = setting("sft", "Name of the evaluation that deltas are taken against.")
    base_name: str = setting("base", "Name of the evaluation of the model that nothing was trained for.")
    pairs_per_report: int = setting(24, "Sampled pairs to show, shared out evenly among the runs that logged pairs.")
    html_file: str | None = setting(
        None, "Also write the HTML page to this file (KFP's HTML artifact).", role=Role.OUTPUT_FILE
    )
    markdown_file: str | None = setting(
        None, "Also write the Markdown to this file (KFP's Markdown artifact).", role=Role.OUTPUT_FILE
    )

    def __post_init__(self) -> None:
        if not self.evaluations and not self.trainings:
            raise ValueError("evaluations and trainings are both empty: give at least one directory to report on")
        if self.pairs_per_report < 0:
            raise ValueError(f"pairs_per_report = {self.pairs_per_report}: must be 0 or more")
        if not self.baseline_name.strip():
            raise ValueError("baseline_name is empty: give the name of an evaluation, such as sft")
