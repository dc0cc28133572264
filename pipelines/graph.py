"""The graph of every run.

    preflight (before all others)
    data ──> model ───────────┬──> train-A ─> evaluate-A ─┐
                              ├──> train-B ─> evaluate-B ─┼─> report
    sft-data ─> sft ──────────┴──> evaluate-base, -sft ───┘

What differs between two runs is the lists: the methods, and the stages that are run. A method is a task of its own, not an
item of a loop. On a cluster all may run at the same time: requests for GPUs and memory, or Kueue, keep them apart.
"""

from typing import Any

from kfp import dsl

from pipelines import stages
from pipelines.cluster import Machine, on_cluster, pipeline_config, workspace
from pipelines.parameters import python_type
from pipelines.runs import Run
from pipelines.signatures import Field, with_signature

Task = Any  # kfp's PipelineTask
Artifact = Any  # an output of a task, kfp's PipelineChannel


def pipeline_of(run: Run) -> tuple[Any, dict[str, str]]:
    """The pipeline of a run, for kfp's compiler, and the titles of its tasks by name, in the order of the run."""
    fields = {
        name: Field(python_type(parameter), parameter.description, parameter.default)
        for name, parameter in run.parameters.items()
    }
    drawn: dict[str, str] = {}

    def build(**given: Any) -> None:
        drawn.update(_Graph(run, given).draw())

    about = run.description or f"Run {run.name}."
    function = with_signature(build, run.name.replace("-", "_"), about, fields)
    pipeline = dsl.pipeline(name=run.name, display_name=run.title, pipeline_config=pipeline_config())(function)
    return pipeline, drawn


class _Graph:
    """One run's tasks, made while kfp listens.

    Args:
        run: what to do.
        given: the pipeline's parameters, as kfp hands them over: values that only a run has.
    """

    def __init__(self, run: Run, given: dict[str, Any]) -> None:
        self.run = run
        self.given = given
        self.titles: dict[str, str] = {}
        self.results: dict[str, Artifact] = {}  # of each evaluation, by the name of its task
        self.logs: dict[str, Artifact] = {}  # of each training

    def draw(self) -> dict[str, str]:
        """Makes all tasks; returns their titles by name."""
        stages_run = self.run.stages
        checked = self.preflight()

        rows = self.data("data", "Data", checked)
        base = self.base_model(rows)
        models = {"base": base}
        self.evaluate("base", base, rows)

        if "sft" in stages_run:
            sft_rows = self.data("sft_data", "Data for SFT", checked) if "sft_data" in stages_run else rows
            models["sft"] = self.train("sft", "sft", "SFT", "sft", "sft", sft_rows, base)
            self.evaluate("sft", models["sft"], rows)

        for method in self.run.methods:
            task, title = f"train-{method.label}", f"Training of {method.name}"
            start = models[method.start]
            trained = self.train(task, method.use, title, method.stage, method.name, rows, start)
            self.evaluate(method.name, trained, rows, method.label)

        if "report" in stages_run:
            self.report()
        return self.titles

    def preflight(self) -> Task:
        """The task that all others wait for."""
        kinds = ("recipe", "settings")
        checked = [f"{use}_{kind}" for use in ("data", "sft_data", "model", "evaluation") for kind in kinds]
        checked = [name for name in (*checked, "gpu_type", "gpus", "evaluation_gpus") if name in self.given]
        methods = [f"{method.use}_settings" for method in self.run.methods]

        component = stages.preflight(checked, methods)
        task = component(**{name: self.given[name] for name in (*checked, *methods)})
        return self._placed(task, "preflight", "Preflight", "preflight")

    def data(self, use: str, title: str, checked: Task) -> Artifact:
        name = use.replace("_", "-")
        task = stages.named(stages.data, name)(use=name, **self._recipe(use)).after(checked)
        return self._placed(task, name, title, "data").outputs["data"]

    def base_model(self, rows: Artifact) -> Artifact:
        task = stages.model(data=rows, **self._recipe("model"))
        return self._placed(task, "model", "Base model", "model").outputs["model"]

    def train(
        self, task_name: str, use: str, title: str, stage: str, name: str, rows: Artifact, start: Artifact
    ) -> Artifact:
        """One training. Returns the model; its log is kept for the report."""
        component = stages.train(stage, task_name)
        inputs = {"data": rows, "start": start, "gpus": self.given["gpus"], **workspace()}
        task = self._placed(
            component(name=name, **inputs, **self._recipe(use)), task_name, title, "train", self._machine("")
        )
        self.logs[task_name] = task.outputs["training_log"]
        return task.outputs["model"]

    def evaluate(self, name: str, model: Artifact, rows: Artifact, label: str | None = None) -> None:
        """One evaluation, whose results are kept for the report; nothing where the run has none."""
        if "evaluation" not in self.run.stages:
            return
        task_name = f"evaluate-{label or name}"
        component = stages.named(stages.evaluation, task_name)
        task = component(data=rows, model=model, name=name, **workspace(), **self._recipe("evaluation"))
        self._placed(task, task_name, f"Evaluation of {name}", "evaluation", self._machine("evaluation_"))
        self.results[task_name] = task.outputs["results"]

    def report(self) -> None:
        inputs = {_identifier(task): artifact for task, artifact in (self.results | self.logs).items()}
        component = stages.report([_identifier(task) for task in self.results], [_identifier(t) for t in self.logs])
        task = component(**inputs, settings=self.given["report_settings"])
        self._placed(task, "report", "Report", "report")

    def _placed(self, task: Task, name: str, title: str, stage: str, machine: Machine | None = None) -> Task:
        """Notes a task's title, and gives the task what it needs on a cluster."""
        self.titles[name] = title
        return on_cluster(task.set_display_name(title), stage, machine)

    def _recipe(self, use: str) -> dict[str, Any]:
        return {key: self.given[f"{use}_{key}"] for key in ("recipe", "settings")}

    def _machine(self, prefix: str) -> Machine:
        return Machine(
            gpus=self.given[f"{prefix}gpus"],
            gpu_type=self.given["gpu_type"],
            cpu=self.given[f"{prefix}cpu"],
            memory=self.given[f"{prefix}memory"],
            node_selector=self.given["node_selector"],
            tolerations=self.given["tolerations"],
        )


def _identifier(task: str) -> str:
    return task.replace("-", "_")
