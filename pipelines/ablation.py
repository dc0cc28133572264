"""The pipeline `ablation`: variants of SAPO, the graph of `comparison` over another list.

The function is long by its parameters alone (see `sapo.py`).
"""

from kfp import dsl

from pipelines.cluster import Machine, pipeline_config
from pipelines.comparison import NO_SETTINGS, NO_TOLERATIONS, compare
from pipelines.methods import methods_of_run

VARIANTS = methods_of_run("ablation-tiny", "variants")


@dsl.pipeline(name="ablation", display_name="SAPO: ablations", pipeline_config=pipeline_config())
def ablation(
    variants: list = VARIANTS,
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
    """Trains variants of SAPO (arXiv 2405.20830), as in the ablations of its Tables 3 to 5 and Figure 2, and more.

    Each variant starts from the fine-tuned model, or from the base model, and changes one thing. The report puts the
    paper's figures beside those of the variants it has. The defaults are a few steps each, on two CPU cores.

    Args:
        variants: What to train, by name, stage (sapo, dpo, orpo, spin, sft), start (base, sft), recipe, settings, group.
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
        methods=variants,
        data=(data_recipe, data_settings),
        sft_data=(sft_data_recipe, sft_data_settings),
        model=(model_recipe, model_settings),
        sft=(sft_recipe, sft_settings),
        evaluation=(evaluation_recipe, evaluation_settings),
        report_settings=report_settings,
        trainer=Machine(gpus, gpu_type, cpu, memory, node_selector, tolerations),
        evaluator=Machine(evaluation_gpus, gpu_type, evaluation_cpu, evaluation_memory, node_selector, tolerations),
    )
