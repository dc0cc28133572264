"""The stages as KFP container components: image, command and flags of each `python -m components.X`.

A component says where files go; everything else is the stage's own business and reaches it as `recipe` (the name of one
that ships with the stage, or a path) and `settings` (a mapping laid over the recipe). `{{$}}` becomes KFP's executor
input, through which a stage reports its metrics; a `Metrics` output therefore has no flag.
"""

from typing import Any

from kfp import dsl
from kfp.dsl import HTML, Artifact, Dataset, Input, Markdown, Metrics, Model, Output

from pipelines.cluster import SENDING_SECONDS, image


def _machine(gpus: str) -> tuple[Any, ...]:
    """Flags of a training stage about its pod: a process for each GPU, and, where it has time to save (`trainingPods` in the
    chart), what the last checkpoint may take to the store."""
    return ("--num_processes", gpus, "--grace_seconds", str(SENDING_SECONDS))


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


def _list(*artifacts: Artifact) -> str:
    """Paths of artifacts as a YAML list; quoted, because a local path may hold a comma or a space."""
    return "[" + ", ".join(f'"{artifact.path}"' for artifact in artifacts) + "]"


@dsl.container_component
def preflight(
    methods: list,
    data_recipe: str,
    data_settings: dict,
    sft_data_recipe: str,
    sft_data_settings: dict,
    model_recipe: str,
    model_settings: dict,
    evaluation_recipe: str,
    evaluation_settings: dict,
    gpu_type: str,
    gpus: str,
    evaluation_gpus: str,
    checks: Output[Markdown],
) -> dsl.ContainerSpec:
    """Checks what a run needs before any GPU is used: recipes, secrets, hub, buckets, judge, volume, queue and GPU quota.

    Args:
        methods: What the run trains; locations in its settings are checked.
        data_recipe: Recipe of the data stage.
        data_settings: Settings laid over it.
        sft_data_recipe: Recipe of the data for SFT.
        sft_data_settings: Settings laid over it.
        model_recipe: Recipe of the model stage.
        model_settings: Settings laid over it.
        evaluation_recipe: Recipe of the evaluation.
        evaluation_settings: Settings laid over it.
        gpu_type: Kubernetes resource that GPUs are counted in.
        gpus: GPUs of each training stage.
        evaluation_gpus: GPUs of each evaluation.

    Returns:
        checks: What was checked, and how it ended.
    """
    flags = {
        "methods": methods,
        "data_recipe": data_recipe,
        "data_settings": data_settings,
        "sft_data_recipe": sft_data_recipe,
        "sft_data_settings": sft_data_settings,
        "model_recipe": model_recipe,
        "model_settings": model_settings,
        "evaluation_recipe": evaluation_recipe,
        "evaluation_settings": evaluation_settings,
        "gpu_type": gpu_type,
        "gpus": gpus,
        "evaluation_gpus": evaluation_gpus,
    }
    named = [part for flag, value in flags.items() for part in (f"--{flag}", value)]
    return dsl.ContainerSpec(
        image=image("data"),  # small, and the next stage needs it too
        command=["python3", "-m", "components.preflight"],
        args=["--executor_input", "{{$}}", *named, "--report_file", checks.path],
    )


@dsl.container_component
def data(recipe: str, settings: dict, data: Output[Dataset], rejected_rows: Output[Markdown]) -> dsl.ContainerSpec:
    """Reads any source and writes validated conversations, split into train and test.

    Args:
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


@dsl.container_component
def sft(
    data: Input[Dataset],
    model: Input[Model],
    recipe: str,
    settings: dict,
    gpus: str,
    tuned: Output[Model],
    training_log: Output[Artifact],
    metrics: Output[Metrics],
    workspace: str = "",
) -> dsl.ContainerSpec:
    """Supervised fine-tuning on the chosen responses.

    Args:
        data: Conversations.
        model: Model to start from.
        recipe: Recipe of the sft stage: a name such as `tiny`, or a path.
        settings: Settings laid over the recipe, such as {"max_steps": 100}.
        gpus: GPUs of the pod, each for a process of its own; "0" is one process on the CPU.
        workspace: Directory of the run's volume; naming it mounts it. Empty: there is none.

    Returns:
        tuned: The fine-tuned model, a Hugging Face directory.
        training_log: Summary and history of the training.
        metrics: Its last values.
    """
    inputs = ("--data", data.path, "--model", model.path)
    outputs = ("--output", tuned.path, "--training_log", training_log.path)
    return _stage("sft", settings, *inputs, *outputs, *_machine(gpus), recipe=recipe)


@dsl.container_component
def sapo(
    data: Input[Dataset],
    model: Input[Model],
    name: str,
    recipe: str,
    settings: dict,
    gpus: str,
    aligned: Output[Model],
    training_log: Output[Artifact],
    metrics: Output[Metrics],
    workspace: str = "",
) -> dsl.ContainerSpec:
    """Self-Augmented Preference Optimization: the model makes its own rejected segments while it trains.

    Args:
        data: Conversations; only the chosen responses are used.
        model: Model to start from.
        name: What the report calls this run.
        recipe: Recipe of the sapo stage: a name such as `tiny-dpo`, or a path.
        settings: Settings laid over the recipe, such as {"segment_length": 128}.
        gpus: GPUs of the pod, each for a process of its own; "0" is one process on the CPU.
        workspace: Directory of the run's volume; naming it mounts it. Empty: there is none.

    Returns:
        aligned: The aligned model, a Hugging Face directory.
        training_log: Summary and history of the training, and the pairs it was trained on.
        metrics: Its last values.
    """
    inputs = ("--data", data.path, "--model", model.path, "--name", name)
    outputs = ("--output", aligned.path, "--training_log", training_log.path)
    return _stage("sapo", settings, *inputs, *outputs, *_machine(gpus), recipe=recipe)


@dsl.container_component
def train(
    data: Input[Dataset],
    base: Input[Model],
    sft: Input[Model],
    name: str,
    stage: str,
    start: str,
    recipe: str,
    settings: str,
    gpus: str,
    model: Output[Model],
    training_log: Output[Artifact],
    metrics: Output[Metrics],
    workspace: str = "",
) -> dsl.ContainerSpec:
    """One method of a comparison: any training stage, from the base or the fine-tuned model.

    Args:
        data: Conversations.
        base: The untrained model.
        sft: The fine-tuned model.
        name: What the report calls this method.
        stage: The stage that trains: sapo, dpo, orpo, spin or sft.
        start: The model to start from: base or sft.
        recipe: Recipe of that stage: a name such as `tiny-dpo`, or a path.
        settings: Settings laid over the recipe, a mapping as JSON.
        gpus: GPUs of the pod, each for a process of its own; "0" is one process on the CPU.
        workspace: Directory of the run's volume; naming it mounts it. Empty: there is none.

    Returns:
        model: The trained model, a Hugging Face directory.
        training_log: Summary and history of the training, and the pairs it was trained on.
        metrics: Its last values.
    """
    # `settings` is text, because a field of a loop's item has no other type; KFP writes a mapping as JSON there.
    starts = f'{{"base": "{base.path}", "sft": "{sft.path}"}}'
    inputs = ("--data", data.path, "--model", starts, "--start", start, "--name", name)
    outputs = ("--output", model.path, "--training_log", training_log.path)
    return _stage(stage, settings, *inputs, *outputs, *_machine(gpus), recipe=recipe, image_of="train")


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


@dsl.container_component
def report(
    base: Input[Artifact],
    sft: Input[Artifact],
    sapo_dpo: Input[Artifact],
    sapo_orpo: Input[Artifact],
    sft_training: Input[Artifact],
    sapo_dpo_training: Input[Artifact],
    sapo_orpo_training: Input[Artifact],
    settings: dict,
    report: Output[Artifact],
    html: Output[HTML],
    markdown: Output[Markdown],
    metrics: Output[Metrics],
) -> dsl.ContainerSpec:
    """Compares the models in one self-contained page.

    Args:
        base: Results of the untrained model.
        sft: Results of the fine-tuned model.
        sapo_dpo: Results of SAPO with the DPO loss.
        sapo_orpo: Results of SAPO with the ORPO loss.
        sft_training: Training log of the fine-tuning.
        sapo_dpo_training: Training log of SAPO with the DPO loss.
        sapo_orpo_training: Training log of SAPO with the ORPO loss.
        settings: Settings of the report stage, such as {"title": "..."}.

    Returns:
        report: Directory with report.html and report.md.
        html: The page, shown by the UI.
        markdown: The tables, shown by the UI.
        metrics: The main numbers of every model.
    """
    evaluations = _list(base, sft, sapo_dpo, sapo_orpo)
    trainings = _list(sft_training, sapo_dpo_training, sapo_orpo_training)
    outputs = ("--output", report.path, "--html_file", html.path, "--markdown_file", markdown.path)
    return _stage("report", settings, "--evaluations", evaluations, "--trainings", trainings, *outputs)


@dsl.container_component
def comparison_report(
    base: Input[Artifact],
    sft: Input[Artifact],
    evaluations: Input[list[Artifact]],
    sft_training: Input[Artifact],
    trainings: Input[list[Artifact]],
    settings: dict,
    report: Output[Artifact],
    html: Output[HTML],
    markdown: Output[Markdown],
    metrics: Output[Metrics],
) -> dsl.ContainerSpec:
    """Compares the base model, the fine-tuned model and any number of methods in one self-contained page.

    Args:
        base: Results of the untrained model.
        sft: Results of the fine-tuned model.
        evaluations: Results of every method, in order.
        sft_training: Training log of the fine-tuning.
        trainings: Training log of every method, in order.
        settings: Settings of the report stage, such as {"title": "..."}.

    Returns:
        report: Directory with report.html and report.md.
        html: The page, shown by the UI.
        markdown: The tables, shown by the UI.
        metrics: The main numbers of every model.
    """
    # A list of artifacts has no placeholder that a cluster replaces: the stage finds it in the executor input.
    collected = ("--collected_evaluations", "evaluations", "--collected_trainings", "trainings")
    inputs = ("--evaluations", _list(base, sft), "--trainings", _list(sft_training), *collected)
    outputs = ("--output", report.path, "--html_file", html.path, "--markdown_file", markdown.path)
    return _stage("report", settings, *inputs, *outputs)
