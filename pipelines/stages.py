"""The stages as KFP container components: image, command and flags of each `python -m components.X`.

A component says where files go; everything else is the stage's own business and reaches it as `recipe` (the name of one
that ships with the stage, or a path) and `settings` (a mapping laid over the recipe). `{{$}}` becomes KFP's executor
input, through which a stage reports its metrics; a `Metrics` output therefore has no flag.

A task is called after its component, so a component that several tasks use is made for each, by `named`.
"""

import copy
from collections.abc import Iterable, Sequence
from typing import Any

from kfp import dsl
from kfp.dsl import HTML, Artifact, Dataset, Input, Markdown, Metrics, Model, Output

from pipelines.cluster import SENDING_SECONDS, image
from pipelines.signatures import Field, with_signature

Component = Any  # kfp's BaseComponent, which its type hints do not name


def named(component: Component, name: str) -> Component:
    """The same component under another name, which its task gets."""
    other = copy.copy(component)
    other.component_spec = copy.deepcopy(component.component_spec)
    other.component_spec.name = name
    return other


def _stage(
    name: str, settings: dict | str, *flags: Any, recipe: str | None = None, image_of: str | None = None
) -> dsl.ContainerSpec:
    # `python3`, because kfp.local knows that word as "the running interpreter".
    config = [] if recipe is None else ["--config", recipe]
    return dsl.ContainerSpec(
        image=image(image_of or name),
        command=["python3", "-m", f"components.{name}"],
        args=["--executor_input", "{{$}}", *config, "--settings", settings, *flags],
    )


def _paths(artifacts: Iterable[Artifact]) -> str:
    """Paths of artifacts as a YAML list; quoted, because a local path may hold a comma or a space."""
    return "[" + ", ".join(f'"{artifact.path}"' for artifact in artifacts) + "]"


def preflight(checked: Sequence[str], methods: Sequence[str]) -> Component:
    """Checks what a run needs before any GPU is used.

    Args:
        checked: names of the inputs that the stage has flags for: recipes, settings, `gpus` and their type.
        methods: names of inputs with the settings of what the run trains.
    """

    def preflight(checks: Artifact, **given: Any) -> dsl.ContainerSpec:
        flags = [part for name in checked for part in (f"--{name}", given[name])]
        # Each placeholder becomes a mapping as JSON.
        flags += ["--methods", "[" + ", ".join(str(given[name]) for name in methods) + "]"]
        return dsl.ContainerSpec(
            image=image("data"),  # small, and the next stage needs it too
            command=["python3", "-m", "components.preflight"],
            args=["--executor_input", "{{$}}", *flags, "--report_file", checks.path],
        )

    about = "Checks recipes, secrets, hub, buckets, judge, volume, queue and GPU quota before any GPU is used."
    inputs = {name: Field(_type_of(name), f"What the run is given as {name}.") for name in (*checked, *methods)}
    outputs = {"checks": Field(Output[Markdown], "What was checked, and how it ended.")}
    return dsl.container_component(with_signature(preflight, "preflight", about, inputs, outputs))


def _type_of(name: str) -> type:
    return dict if name.endswith("_settings") else str


@dsl.container_component
def data(
    use: str, recipe: str, settings: dict, data: Output[Dataset], rejected_rows: Output[Markdown]
) -> dsl.ContainerSpec:
    """Reads any source and writes validated conversations, split into train and test.

    Args:
        use: What the rows are for. KFP's cache then tells two tasks with the same recipe apart, and gives each its own rows.
        recipe: Recipe of the data stage: a name such as `chitchat-tiny`, or a path.
        settings: Settings laid over the recipe, such as {"source": "hf://owner/name"}.

    Returns:
        data: Directory with train.jsonl, test.jsonl and statistics.json.
        rejected_rows: Which rows of the source were left out, and why.
    """
    return _stage("data", settings, "--output", data.path, "--report_file", rejected_rows.path, recipe=recipe)


@dsl.container_component
def model(data: Input[Dataset], recipe: str, settings: dict, model: Output[Model]) -> dsl.ContainerSpec:
    """Turns any source into one Hugging Face directory with its chat template in place.

    Args:
        data: Conversations; a model from scratch trains its tokenizer on them.
        recipe: Recipe of the model stage: a name such as `tiny`, or a path.
        settings: Settings laid over the recipe, such as {"source": "hf://owner/name"}.

    Returns:
        model: Hugging Face directory.
    """
    return _stage("model", settings, "--data", data.path, "--output", model.path, recipe=recipe)


def train(stage: str, name: str) -> Component:
    """One training: any of the stages sft, sapo, dpo, orpo and spin, in the image that holds them all.

    Args:
        stage: the stage that trains.
        name: of the task, such as `train-sapo-dpo`.
    """

    @dsl.container_component
    def train(
        data: Input[Dataset],
        start: Input[Model],
        name: str,
        recipe: str,
        settings: dict,
        gpus: str,
        model: Output[Model],
        training_log: Output[Artifact],
        metrics: Output[Metrics],
        workspace: str = "",
    ) -> dsl.ContainerSpec:
        """Trains a model.

        Args:
            data: Conversations.
            start: The model to start from.
            name: What the report calls this training.
            recipe: Recipe of the stage: a name such as `tiny-dpo`, or a path.
            settings: Settings laid over the recipe, such as {"max_steps": 100}.
            gpus: GPUs of the pod, each for a process of its own; "0" is one process on the CPU.
            workspace: Directory of the run's volume; naming it mounts it. Empty: there is none.

        Returns:
            model: The trained model, a Hugging Face directory.
            training_log: Summary and history of the training, and the pairs it was trained on.
            metrics: Its last values.
        """
        inputs = ("--data", data.path, "--model", start.path, "--name", name)
        outputs = ("--output", model.path, "--training_log", training_log.path)
        # Where a pod has time to save (`trainingPods` in the chart), what the last checkpoint may take to the store.
        machine = ("--num_processes", gpus, "--grace_seconds", str(SENDING_SECONDS))
        return _stage(stage, settings, *inputs, *outputs, *machine, recipe=recipe, image_of="train")

    return named(train, name)


@dsl.container_component
def evaluation(
    data: Input[Dataset],
    model: Input[Model],
    name: str,
    recipe: str,
    settings: dict,
    results: Output[Artifact],
    metrics: Output[Metrics],
    workspace: str = "",
) -> dsl.ContainerSpec:
    """Measures a model on held-out conversations and on the benchmarks of its recipe.

    Args:
        data: Conversations; the test split is the held-out one.
        model: Model to measure.
        name: What the report calls this model.
        recipe: Recipe of the evaluation stage: a name such as `held-out-tiny`, or a path.
        settings: Settings laid over the recipe, such as {"seed": 1}.
        workspace: Directory of the run's volume; naming it mounts it. Empty: there is none.

    Returns:
        results: Directory with results.json and held_out/samples.jsonl.
        metrics: The same numbers for the UI's comparison of runs.
    """
    inputs = ("--data", data.path, "--model", model.path, "--name", name)
    return _stage("evaluation", settings, *inputs, "--output", results.path, recipe=recipe)


def report(evaluations: Sequence[str], trainings: Sequence[str]) -> Component:
    """Compares models in one self-contained page.

    Args:
        evaluations: names of the inputs with results of an evaluation, in the order of the report.
        trainings: names of the inputs with a training log, in the same order.
    """

    def report(settings: Any, report: Any, html: Any, markdown: Any, metrics: Any, **given: Any) -> dsl.ContainerSpec:
        results, logs = (_paths(given[name] for name in names) for names in (evaluations, trainings))
        inputs = ("--evaluations", results, "--trainings", logs)
        outputs = ("--output", report.path, "--html_file", html.path, "--markdown_file", markdown.path)
        return _stage("report", settings, *inputs, *outputs)

    inputs = {name: Field(Input[Artifact], f"Results of {name}.") for name in evaluations}
    inputs |= {name: Field(Input[Artifact], f"Training log of {name}.") for name in trainings}
    inputs["settings"] = Field(dict, 'Settings of the report stage, such as {"title": "..."}.')
    outputs = {
        "report": Field(Output[Artifact], "Directory with report.html and report.md."),
        "html": Field(Output[HTML], "The page, shown by the UI."),
        "markdown": Field(Output[Markdown], "The tables, shown by the UI."),
        "metrics": Field(Output[Metrics], "The main numbers of every model."),
    }
    about = "Compares all models in one self-contained page."
    return dsl.container_component(with_signature(report, "report", about, inputs, outputs))
