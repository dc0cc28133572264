"""The pipeline `comparison`: preflight -> data -> model -> sft -> every method of a list, each evaluated -> report.

The pipeline's function is long by its parameters alone (see `sapo.py`).
"""

from typing import Any

from kfp import dsl
from kfp.dsl.for_loop import LoopArgumentVariable

from pipelines import stages
from pipelines.cluster import Machine, on_cluster, pipeline_config, workspace
from pipelines.methods import methods_of_run

NO_SETTINGS: dict[str, Any] = {}
NO_TOLERATIONS: list[Any] = []
METHODS = methods_of_run("tiny", "methods")
Recipe = tuple[Any, Any]  # the recipe and the settings of a stage, both parameters of the pipeline


def compare(
    methods: Any,
    data: Recipe,
    sft_data: Recipe,
    model: Recipe,
    sft: Recipe,
    evaluation: Recipe,
    report_settings: Any,
    trainer: Machine,
    evaluator: Machine,
) -> None:
    """The graph of `comparison` and `ablation`, called while either is compiled."""
    checked = check_first(methods, data, sft_data, model, evaluation, trainer, evaluator)
    rows = on_cluster(_task("Data", stages.data, data), "data").after(checked)
    sft_rows = on_cluster(_task("Data for SFT", stages.data, sft_data), "data").after(checked)
    base = on_cluster(_task("Base model", stages.model, model, data=rows.outputs["data"]), "model")
    inputs = {"data": sft_rows.outputs["data"], "model": base.outputs["model"], "gpus": trainer.gpus, **workspace()}
    tuned = on_cluster(_task("SFT", stages.sft, sft, **inputs), "sft", trainer)

    def evaluate(trained: Any, name: Any, title: str) -> Any:
        inputs = {"data": rows.outputs["data"], "model": trained, "name": name, **workspace()}
        measured = _task(title, stages.evaluation, evaluation, **inputs)
        return on_cluster(measured, "evaluation", evaluator).outputs["results"]

    base_results = evaluate(base.outputs["model"], "base", "Evaluation of base")
    sft_results = evaluate(tuned.outputs["tuned"], "sft", "Evaluation of sft")

    # A loop rather than dsl.If: only what a loop collects can be used outside of it, and a method that is not in the
    # list is then simply not there. One method at a time, because each takes all the GPUs, or cores, of a machine.
    with dsl.ParallelFor(methods, parallelism=1, name="methods") as entry:
        fields = {key: LoopArgumentVariable(entry, key) for key in ("name", "stage", "start", "recipe", "settings")}
        models = {"base": base.outputs["model"], "sft": tuned.outputs["tuned"]}
        trained = stages.train(data=rows.outputs["data"], **models, **fields, gpus=trainer.gpus, **workspace())
        on_cluster(trained.set_display_name("Training"), "train", trainer)
        results = evaluate(trained.outputs["model"], fields["name"], "Evaluation")

    reported = stages.comparison_report(
        base=base_results,
        sft=sft_results,
        evaluations=dsl.Collected(results),
        sft_training=tuned.outputs["training_log"],
        trainings=dsl.Collected(trained.outputs["training_log"]),
        settings=report_settings,
    )
    on_cluster(reported.set_display_name("Report"), "report")


def check_first(
    methods: Any,
    data: Recipe,
    sft_data: Recipe,
    model: Recipe,
    evaluation: Recipe,
    trainer: Machine,
    evaluator: Machine,
) -> Any:
    """The task that all others wait for."""
    checked = stages.preflight(
        methods=methods,
        data_recipe=data[0],
        data_settings=data[1],
        sft_data_recipe=sft_data[0],
        sft_data_settings=sft_data[1],
        model_recipe=model[0],
        model_settings=model[1],
        evaluation_recipe=evaluation[0],
        evaluation_settings=evaluation[1],
        gpu_type=trainer.gpu_type,
        gpus=trainer.gpus,
        evaluation_gpus=evaluator.gpus,
    )
    return on_cluster(checked.set_display_name("Preflight"), "preflight")


def _task(title: str, stage: Any, recipe: Recipe, **inputs: Any) -> Any:
    return stage(recipe=recipe[0], settings=recipe[1], **inputs).set_display_name(title)


@dsl.pipeline(
    name="comparison", display_name="SAPO compared with SFT, DPO, ORPO and SPIN", pipeline_config=pipeline_config()
)
def comparison(
    methods: list = METHODS,
    data_recipe: str = "chitchat-tiny",
    data_settings: dict = NO_SETTINGS,
    sft_data_recipe: str = "chitchat-tiny",
    sft_data_settings: dict = NO_SETTINGS,
    model_recipe: str = "tiny",
    model_settings: dict = NO_SETTINGS,
    sft_recipe: str = "tiny",
    sft_settings: dict = NO_SETTINGS,
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
    """Aligns a model by SAPO (arXiv 2405.20830) and by the methods it is compared with, and reports all of them.

    A model is fine-tuned (SFT). Each entry of `methods` starts from it, or from the base model, and trains. Base, SFT and
    every method are evaluated on the same held-out conversations, and one report compares them. Leave an entry out and
    the method is not run and not in the report. The defaults are a run of minutes on two CPU cores.

    Args:
        methods: What to train: entries of name, stage (sapo, dpo, orpo, spin, sft), start (base, sft), recipe, settings.
        data_recipe: Recipe of the data stage: a name in components/data/recipes, or a path inside the image.
        data_settings: Settings laid over the data recipe, such as {"source": "hf://owner/name"}.
        sft_data_recipe: Recipe of the data for SFT; the same as data_recipe when one data set serves both.
        sft_data_settings: Settings laid over the recipe of the data for SFT.
        model_recipe: Recipe of the model stage, which fetches or makes the base model.
        model_settings: Settings laid over the model recipe, such as {"source": "hf://owner/name"}.
        sft_recipe: Recipe of the supervised fine-tuning.
        sft_settings: Settings laid over the sft recipe, such as {"max_steps": 100}.
        evaluation_recipe: Recipe of the evaluation, the same for all models.
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
    compare(
        methods=methods,
        data=(data_recipe, data_settings),
        sft_data=(sft_data_recipe, sft_data_settings),
        model=(model_recipe, model_settings),
        sft=(sft_recipe, sft_settings),
        evaluation=(evaluation_recipe, evaluation_settings),
        report_settings=report_settings,
        trainer=Machine(gpus, gpu_type, cpu, memory, node_selector, tolerations),
        evaluator=Machine(evaluation_gpus, gpu_type, evaluation_cpu, evaluation_memory, node_selector, tolerations),
    )
