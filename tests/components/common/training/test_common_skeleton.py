"""The sequence that every training stage goes through: what comes before what, and where it ends early."""

import dataclasses
import logging
from pathlib import Path

import pytest

from components.common.core.errors import TERMINATED, UserError
from components.common.stage.config import setting
from components.common.training.clock import Clock
from components.common.training.config import TrainingStageConfig
from components.common.training.skeleton import TrainingStage, run_training
from components.common.training.stop import StoppedError

WHOLE = ["find_checkpoint", "encode", "check_identity", "plan", "prepare_output", "load", "train", "evaluate", "write"]


@dataclasses.dataclass(kw_only=True)
class ToySettings:
    use_cpu: bool = setting(True, "Stay on the CPU.")
    told_to_stop: bool = setting(False, "As if SIGTERM came.")
    other_run: bool = setting(False, "As if the checkpoint were another run's.")


class ToyStage(TrainingStage[TrainingStageConfig, ToySettings]):
    """Notes what it is asked, in order."""

    name = "toy"
    config_classes = (TrainingStageConfig, ToySettings)
    calls: list[str] = []  # noqa: RUF012
    summary: dict[str, float] = {}  # noqa: RUF012

    def find_checkpoint(self) -> Path | None:
        self.calls.append("find_checkpoint")
        return Path("checkpoint-3")

    def encode(self) -> None:
        self.calls.append("encode")

    def check_identity(self, checkpoint: Path | None) -> None:
        self.calls.append("check_identity")
        if self.settings.other_run:
            raise UserError(f"{checkpoint}: is of another run")

    def plan(self, checkpoint: Path | None) -> list[str]:
        self.calls.append("plan")
        return ["rows: 12", f"resumes from {checkpoint}"]

    def prepare_output(self, checkpoint: Path | None) -> None:
        self.calls.append("prepare_output")

    def load(self) -> None:
        self.calls.append("load")

    def train(self, checkpoint: Path | None) -> dict[str, float]:
        self.calls.append("train")
        if self.settings.told_to_stop:
            raise StoppedError("after step 4")
        return {"train_loss": 0.5}

    def evaluate(self) -> dict[str, float]:
        self.calls.append("evaluate")
        return {"eval_loss": 0.25}

    def write(self, summary: dict[str, float]) -> None:
        self.calls.append("write")
        self.summary.update(summary)


@pytest.fixture
def run(monkeypatch, caplog):
    """Runs the stage; returns what it was asked."""

    def go(*more: str) -> list[str]:
        monkeypatch.setattr(ToyStage, "calls", [])
        monkeypatch.setattr(ToyStage, "summary", {})
        with caplog.at_level(logging.INFO):
            run_training(ToyStage, "A toy.", ["--data", "d", "--model", "m", "--output", "o", *more], Clock())
        return ToyStage.calls

    return go


def test_the_whole_sequence(run, caplog):
    assert run() == WHOLE
    assert ToyStage.summary == {"train_loss": 0.5, "eval_loss": 0.25}
    assert [record.message for record in caplog.records] == ["rows: 12", "resumes from checkpoint-3"]


def test_a_dry_run_ends_with_the_plan(run, capsys):
    assert run("--dry_run") == WHOLE[:4]
    assert capsys.readouterr().out == "rows: 12\nresumes from checkpoint-3\n"


def test_help_asks_nothing(run, capsys):
    assert run("--help") == []
    assert capsys.readouterr().out.startswith("A toy.\n\nusage: python -m components.toy")


def test_another_runs_checkpoint_ends_it_before_anything_is_written(run):
    with pytest.raises(UserError, match="is of another run"):
        run("--other_run")
    assert ToyStage.calls == WHOLE[:3]


def test_told_to_stop_it_says_so_once_and_leaves_with_143(run, caplog):
    with pytest.raises(SystemExit) as ended:
        run("--told_to_stop")
    assert ended.value.code == TERMINATED
    assert ToyStage.calls == WHOLE[:7]
    said = [record.message for record in caplog.records]
    assert said[-1] == "stopped after step 4 and saved; the same command goes on from there"
