"""The pipeline `sapo`: preflight -> data -> model -> sft -> SAPO with two losses -> evaluation of all four -> report.

The function is as long as its parameters: Kubeflow Pipelines reads them, and the meanings its form shows, from its signature
and docstring, so that the three pipelines cannot share theirs. What they do is the last third.
"""

from kfp import dsl

from pipelines import stages
from pipelines.cluster import Machine, on_cluster, pipeline_config, workspace
from pipelines.comparison import NO_SETTINGS, NO_TOLERATIONS, check_first


@dsl.pipeline(
    name="sapo", display_name="SAPO: self-augmented preference optimization", pipeline_config=pipeline_config()
)
def sapo(
    data_recipe: str = "chitchat-tiny",
    data_settings: dict = NO_SETTINGS,
    model_recipe: str = "tiny",
    model_settings: dict = NO_SETTINGS,
    sft_recipe: str = "tiny",
    sft_settings: dict = NO_SETTINGS,
    sapo_dpo_recipe: str = "tiny-dpo",
    sapo_dpo_settings: dict = NO_SETTINGS,
    sapo_orpo_recipe: str = "tiny-orpo",
    sapo_orpo_settings: dict = NO_SETTINGS,
    evaluation_recipe: str = "held-out-tiny",
    evaluation_settings: dict = NO_SETTINGS,
    report_settings: dict = NO_SETTINGS,
    gpus: str = "0",
    gpu_type: str = "nvidia.com/gpu",
    cpu: str = "2",
    memory: str = "8Gi",
    evaluation_gpus: str = "0",
    evaluation_cpu: str = "2",
    evaluation_memory: str = "8Gi",
    node_selector: dict = NO_SETTINGS,
    tolerations: list = NO_TOLERATIONS,
) -> None:
    """Aligns a model by SAPO (arXiv 2405.20830) and compares it with where it came from.

    A model is fine-tuned (SFT); from there SAPO trains it once with the DPO loss and once with the ORPO loss; base, SFT
    and both SAPO models are evaluated on the same held-out conversations, and one report compares them. The paper's
    ORPO runs start from the base model; here both start from the SFT model, so that they differ by the loss alone.
    The defaults are a run of minutes on two CPU cores.

    Args:
        data_recipe: Recipe of the data stage: a name in components/data/recipes, or a path inside the image.
        data_settings: Settings laid over the data recipe, such as {"source": "hf://owner/name"}.
        model_recipe: Recipe of the model stage, which fetches or makes the base model.
        model_settings: Settings laid over the model recipe, such as {"source": "hf://owner/name"}.
        sft_recipe: Recipe of the supervised fine-tuning.
        sft_settings: Settings laid over the sft recipe, such as {"max_steps": 100}.
        sapo_dpo_recipe: Recipe of the SAPO run with the DPO loss.
        sapo_dpo_settings: Settings laid over its recipe, such as {"beta": 0.1}.
        sapo_orpo_recipe: Recipe of the SAPO run with the ORPO loss.
        sapo_orpo_settings: Settings laid over its recipe.
        evaluation_recipe: Recipe of the evaluation, the same for all four models.
        evaluation_settings: Settings laid over the evaluation recipe.
        report_settings: Settings of the report, such as {"title": "My run"}.
        gpus: GPUs of each training stage, one process on each, as text; "0" trains on the CPU. They run one at a time.
        gpu_type: Kubernetes resource that GPUs are counted in, such as nvidia.com/gpu or amd.com/gpu.
        cpu: CPUs of each training stage, as text, such as "64".
        memory: Memory of each training stage, /dev/shm included, such as "800Gi".
        evaluation_gpus: GPUs of each evaluation, as text; "0" evaluates on the CPU.
        evaluation_cpu: CPUs of each evaluation, as text.
        evaluation_memory: Memory of each evaluation.
        node_selector: Nodes that train and evaluate, such as {"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"}.
        tolerations: Tolerations of the pods that do, such as [{"key": "nvidia.com/gpu", "operator": "Exists"}].
    """
    trainer = Machine(gpus, gpu_type, cpu, memory, node_selector, tolerations)
    evaluator = Machine(evaluation_gpus, gpu_type, evaluation_cpu, evaluation_memory, node_selector, tolerations)
    data = (data_recipe, data_settings)
    evaluation = (evaluation_recipe, evaluation_settings)
    checked = check_first([], data, data, (model_recipe, model_settings), evaluation, trainer, evaluator)
    rows = stages.data(recipe=data_recipe, settings=data_settings).after(checked)
    on_cluster(rows.set_display_name("Data"), "data")
    conversations = rows.outputs["data"]

    base = stages.model(data=conversations, recipe=model_recipe, settings=model_settings)
    on_cluster(base.set_display_name("Base model"), "model")
    inputs = {"data": conversations, "model": base.outputs["model"], "gpus": gpus, **workspace()}
    tuned = stages.sft(**inputs, recipe=sft_recipe, settings=sft_settings)
    on_cluster(tuned.set_display_name("SFT"), "sft", trainer)

    aligned = {}
    for loss, recipe, settings in (
        ("dpo", sapo_dpo_recipe, sapo_dpo_settings),
        ("orpo", sapo_orpo_recipe, sapo_orpo_settings),
    ):
        inputs = {"data": conversations, "model": tuned.outputs["tuned"], "gpus": gpus, **workspace()}
        aligned[loss] = stages.sapo(**inputs, name=f"sapo-{loss}", recipe=recipe, settings=settings)
        on_cluster(aligned[loss].set_display_name(f"SAPO ({loss.upper()} loss)"), "sapo", trainer)

    models = {
        "base": base.outputs["model"],
        "sft": tuned.outputs["tuned"],
        "sapo-dpo": aligned["dpo"].outputs["aligned"],
        "sapo-orpo": aligned["orpo"].outputs["aligned"],
    }
    results = {}
    for name, model in models.items():
        measured = stages.evaluation(
            data=conversations,
            model=model,
            name=name,
            recipe=evaluation_recipe,
            settings=evaluation_settings,
            **workspace(),
        )
        on_cluster(measured.set_display_name(f"Evaluation of {name}"), "evaluation", evaluator)
        results[name] = measured.outputs["results"]

    reported = stages.report(
        base=results["base"],
        sft=results["sft"],
        sapo_dpo=results["sapo-dpo"],
        sapo_orpo=results["sapo-orpo"],
        sft_training=tuned.outputs["training_log"],
        sapo_dpo_training=aligned["dpo"].outputs["training_log"],
        sapo_orpo_training=aligned["orpo"].outputs["training_log"],
        settings=report_settings,
    )
    on_cluster(reported.set_display_name("Report"), "report")
