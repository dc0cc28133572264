"""What a run can be told: the parameters of a pipeline, with KFP's type, meaning and default of each. Needs no kfp.

Every stage and every method has two: `<use>_recipe`, the name of a recipe that ships with the stage or a path, and
`<use>_settings`, a mapping laid over it. A method's `<use>` is `train_<name>`. The machines of the stages that compute follow.
"""

import difflib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from components.common.core.errors import UserError

# KFP's parameter types: the Python types that fit, and what to call them in a message.
_TYPES: dict[str, tuple[tuple[type, ...], str]] = {
    "STRING": ((str,), "text"),
    "STRUCT": ((dict,), "a mapping"),
    "LIST": ((list,), "a list"),
    "NUMBER_INTEGER": ((int,), "a whole number"),
    "NUMBER_DOUBLE": ((int, float), "a number"),
    "BOOLEAN": ((bool,), "true or false"),
}


@dataclass(frozen=True)
class Parameter:
    """One parameter of a pipeline, as its package declares it."""

    type: str
    description: str
    default: Any = None
    required: bool = False

    @property
    def type_name(self) -> str:
        return _TYPES[self.type][1]

    def fits(self, value: Any) -> bool:
        """Whether a value has the parameter's type; true and false are no numbers."""
        return isinstance(value, _TYPES[self.type][0]) and (self.type == "BOOLEAN" or not isinstance(value, bool))


def python_type(parameter: Parameter) -> type:
    """The type that kfp takes as an annotation."""
    return _TYPES[parameter.type][0][-1]


class Use(NamedTuple):
    """Something that a run does with a stage: which stage, and what its recipe and its settings are, for people."""

    stage: str
    recipe: str
    settings: str


USES = {
    "data": Use(
        "data",
        "Recipe of the data stage: a name in components/data/recipes, or a path inside the image.",
        'Settings laid over the data recipe, such as {"source": "hf://owner/name"}.',
    ),
    "sft_data": Use(
        "data",
        "Recipe of the data for SFT, which may be other data.",
        "Settings laid over the recipe of the data for SFT.",
    ),
    "model": Use(
        "model",
        "Recipe of the model stage, which fetches or makes the base model.",
        'Settings laid over the model recipe, such as {"source": "hf://owner/name"}.',
    ),
    "sft": Use(
        "sft",
        "Recipe of the supervised fine-tuning.",
        'Settings laid over the sft recipe, such as {"max_steps": 100}.',
    ),
    "evaluation": Use(
        "evaluation",
        "Recipe of the evaluation, the same for all models.",
        'Settings laid over the evaluation recipe, such as {"benchmarks": ["held_out"]}.',
    ),
}
REPORT_SETTINGS = Parameter("STRUCT", 'Settings of the report, such as {"title": "My run"}.', {})
GPU_TYPE = "nvidia.com/gpu"
_MACHINE = {
    "gpus": Parameter(
        "STRING", 'GPUs of each training stage, one process on each, as text; "0" trains on the CPU.', "0"
    ),
    "gpu_type": Parameter(
        "STRING", "Kubernetes resource that GPUs are counted in, such as nvidia.com/gpu or amd.com/gpu.", GPU_TYPE
    ),
    "cpu": Parameter("STRING", 'CPUs of each training stage, as text, such as "64".', "2"),
    "memory": Parameter("STRING", 'Memory of each training stage, /dev/shm included, such as "800Gi".', "8Gi"),
}
_EVALUATION_MACHINE = {
    "evaluation_gpus": Parameter("STRING", 'GPUs of each evaluation, as text; "0" evaluates on the CPU.', "0"),
    "evaluation_cpu": Parameter("STRING", "CPUs of each evaluation, as text.", "2"),
    "evaluation_memory": Parameter("STRING", "Memory of each evaluation.", "8Gi"),
}
_NODES = {
    "node_selector": Parameter(
        "STRUCT", 'Nodes that train and evaluate, such as {"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"}.', {}
    ),
    "tolerations": Parameter(
        "LIST",
        'Tolerations of the pods that do, such as [{"key": "nvidia.com/gpu", "operator": "Exists"}].',
        [],
    ),
}


def parameters_of(uses: dict[str, Use], evaluates: bool, reports: bool) -> dict[str, Parameter]:
    """The parameters of a run with these uses of stages, in the order in which a person reads them."""
    parameters: dict[str, Parameter] = {}
    for name, use in uses.items():
        parameters[f"{name}_recipe"] = Parameter("STRING", use.recipe, required=True)
        parameters[f"{name}_settings"] = Parameter("STRUCT", use.settings, {})
    if reports:
        parameters["report_settings"] = REPORT_SETTINGS
    return parameters | _MACHINE | (_EVALUATION_MACHINE if evaluates else {}) | _NODES


def check_value(name: str, parameter: Parameter, value: Any, where: str) -> None:
    """Refuses a value that the parameter cannot have.

    Raises:
        UserError: the type is another, or the value cannot be written as JSON, in which mappings travel.
    """
    if not parameter.fits(value):
        raise UserError(f"{where}: {name} = {value!r} is {type(value).__name__}, must be {parameter.type_name}")
    try:
        same = json.loads(json.dumps(value, allow_nan=False)) == value
    except (TypeError, ValueError) as error:  # YAML has more than JSON: dates, infinity
        raise UserError(f"{where}: {name} holds a value that JSON has not: {error}") from error
    if not same:
        raise UserError(f"{where}: {name} = {value!r} holds a key that is not text; put it in quotes")


def unknown(name: Any, known: Iterable[str], where: str, owner: str) -> UserError:
    """The error for a parameter that there is not, with the nearest that there is."""
    close = difflib.get_close_matches(str(name), known, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return UserError(f"{where}: unknown parameter {name!r} of {owner}; {hint}It takes: {', '.join(known)}")
