"""A model's answers to a benchmark's prompts, written batch by batch to a file that an interrupted run goes on with.

An answer is known by its prompt's id and turn and by a digest of all that decides on it: the model, the messages, the
sampling settings. A run finds the answers it lacks; if there are none, no engine is started.
"""

import dataclasses
import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypedDict

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from components.common.core.conversations import Message
from components.common.core.errors import UserError
from components.common.core.progress import progress
from components.common.generation.engines import ENGINES, EngineName, EngineSettings, check_engine, open_engine
from components.common.generation.protocol import Sampler, SamplingSettings, request_seed
from components.common.models.chat_templates import encode_prompt
from components.common.models.loading import load_tokenizer, model_digest, stop_ids
from components.common.storage.locations import existing_path
from components.evaluation.config import EvaluationConfig
from components.evaluation.context import Context, window
from components.evaluation.judged.journal import Journal, digest, read_entries

logger = logging.getLogger(__name__)

MANY_AT_LIMIT = 0.05  # share of answers that do not end by themselves from which on stop tokens are suspected
ANSWERS = "answers.jsonl"


@dataclass(frozen=True)
class Request:
    """One answer to write: `messages` end with the user's; `turn` counts from 1."""

    id: str
    turn: int
    messages: list[Message]
    temperature: float


class Answer(TypedDict):
    """One line of answers.jsonl. `cut`: tokens that the prompt lost for the window; `ended`: by a stop token."""

    id: str
    turn: int
    digest: str
    output: str
    tokens: int
    ended: bool
    cut: int


@dataclass(frozen=True)
class GenerationSettings:
    """What decides on answers beside the prompt. `max_length`: window of prompt and answer in tokens."""

    engine: EngineName
    dtype: Literal["float32", "bfloat16"]
    max_new_tokens: int
    max_length: int
    seed: int


class Generator:
    """Answers prompts with a model. Enter it as a context: the engine starts with the first answer that is missing.

    Args:
        model: a Hugging Face directory.
        settings: what decides on the answers.
        path: the file of answers.
        batch_size: prompts handed to the engine together; each batch is saved when it is done.
        loaded: gives the model, on its device, to an engine that serves in place; none: it is loaded from the directory.
        gpu_memory_utilization: share of the GPU's memory, of an engine that takes one.
    """

    def __init__(
        self,
        model: str,
        settings: GenerationSettings,
        path: Path,
        batch_size: int,
        loaded: Callable[[], PreTrainedModel] | None = None,
        gpu_memory_utilization: float = 0.9,
    ) -> None:
        self.model = model
        self.settings = settings
        self.loaded = loaded
        self.tokenizer = load_tokenizer(model)
        self.stop_ids = stop_ids(model, self.tokenizer) | template_stop_ids(self.tokenizer)
        self.journal = Journal(path)
        self.engine = EngineSettings(
            name=settings.engine,
            dtype=settings.dtype,
            max_length=settings.max_length,
            batch_size=batch_size,
            gpu_memory_utilization=gpu_memory_utilization,
        )
        self._identity = [dataclasses.asdict(settings), model_digest(Path(model)), sorted(self.stop_ids)]
        self._first_ids: list[int] = []
        self._sampler: Sampler | None = None
        self._open = ExitStack()

    def __enter__(self) -> "Generator":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._sampler = None
        self._open.close()

    def answer(self, requests: Sequence[Request], description: str = "answers") -> list[Answer]:
        """An answer to each request, from the file or generated now; in the order of the requests.

        Batches are of one temperature, longest prompt first, so that the largest fails at once if it does not fit.
        """
        wanted = [self._digest(request) for request in requests]
        known = {entry["digest"]: entry for entry in self.journal.entries}
        prompts = [encode_prompt(self.tokenizer, request.messages) for request in requests]
        self._first_ids = self._first_ids or prompts[0][:8]
        missing = [i for i, key in enumerate(wanted) if key not in known]
        missing.sort(key=lambda i: (requests[i].temperature, -len(prompts[i])))
        with progress(
            total=len(requests), initial=len(requests) - len(missing), desc=description, unit="answers"
        ) as bar:
            while missing:
                alike = [i for i in missing if requests[i].temperature == requests[missing[0]].temperature]
                batch = alike[: self.engine.batch_size]
                written = self._generate([(requests[i], wanted[i], prompts[i]) for i in batch])
                known |= {answer["digest"]: dict(answer) for answer in written}
                missing = missing[len(batch) :]
                bar.update(len(batch))
        return [as_answer(known[key]) for key in wanted]

    def facts(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """How the answers came about, for the results; warns where they look wrong.

        Raises:
            UserError: every answer is empty.
        """
        stops = sorted(self.stop_ids)
        facts = answer_facts(answers) | {
            "settings": dataclasses.asdict(self.settings),
            "stop_ids": stops,
            "stop_tokens": self.tokenizer.convert_ids_to_tokens(stops),
            "first_token_ids": self._first_ids,
            "has_bos": bool(self._first_ids) and self._first_ids[0] == self.tokenizer.bos_token_id,
            "engine_version": ENGINES[self.settings.engine].version(),
        }
        if facts["at_limit"] > MANY_AT_LIMIT:
            logger.warning(
                "%.0f%% of the answers hit the limit of %d tokens without an end of turn; stop tokens may be missing: "
                "generation stops at %s",
                *(100 * facts["at_limit"], self.settings.max_new_tokens, " ".join(facts["stop_tokens"])),
            )
        if facts["cut_prompts"]:
            logger.warning("%d prompts did not fit the window and lost their beginning", facts["cut_prompts"])
        return facts

    def _digest(self, request: Request) -> str:
        return digest(self._identity, request.id, request.turn, request.messages, request.temperature)

    def _generate(self, batch: list[tuple[Request, str, list[int]]]) -> list[Answer]:
        """Answers to requests of one temperature, saved."""
        sampler, settings = self._sampler or self._start(), self.settings
        sampler.settings = dataclasses.replace(sampler.settings, temperature=batch[0][0].temperature)
        prompts = [prompt[-prompt_window(settings) :] for _, _, prompt in batch]
        limits = [min(settings.max_new_tokens, settings.max_length - len(prompt)) for prompt in prompts]
        seeds = [request_seed(settings.seed, request.id, request.turn) for request, _, _ in batch]
        answers = []
        for (request, key, whole), prompt, tokens in zip(
            batch, prompts, sampler.generate(prompts, limits, seeds), strict=True
        ):
            ended = bool(tokens) and tokens[-1] in self.stop_ids
            text = str(self.tokenizer.decode(tokens[:-1] if ended else tokens, skip_special_tokens=True)).strip()
            answer = Answer(
                id=request.id,
                turn=request.turn,
                digest=key,
                output=text,
                tokens=len(tokens),
                ended=ended,
                cut=len(whole) - len(prompt),
            )
            answers.append(answer)
        self.journal.append([dict(answer) for answer in answers])
        return answers

    def _start(self) -> Sampler:
        drawing = SamplingSettings(temperature=0.0, top_k=0, top_p=1.0, stop_ids=self.stop_ids)
        loaded = self.loaded() if self.loaded and ENGINES[self.engine.name].serves_in_place else None
        opened = open_engine(self.model, self.tokenizer, self.engine, drawing, loaded)
        self._sampler = self._open.enter_context(opened)
        return self._sampler


def open_generator(config: EvaluationConfig, context: Context, max_new_tokens: int) -> Generator:
    """The generator of a benchmark, as the stage's settings say."""
    settings = GenerationSettings(
        engine=config.engine,
        dtype="bfloat16" if context.dtype == "bfloat16" else "float32",
        max_new_tokens=max_new_tokens,
        max_length=window(config),
        seed=config.seed,
    )
    engine = ENGINES[config.engine]
    if not engine.serves_in_place:
        context.free()
    return Generator(
        config.model,
        settings,
        context.folder / ANSWERS,
        max(config.batch_size, engine.least_batch),
        loaded=lambda: context.model(config.model),
        gpu_memory_utilization=config.gpu_memory_utilization,
    )


def check_generation(config: EvaluationConfig) -> None:
    """Raises UserError when answers cannot be generated: no model, no chat template, no engine."""
    load_tokenizer(config.model)
    window(config)
    check_engine(config.engine)


def prompt_window(settings: GenerationSettings) -> int:
    """Most tokens of a prompt; a longer one keeps its end. The answer gets its full length, or half of a small window."""
    return settings.max_length - min(settings.max_new_tokens, settings.max_length // 2)


def template_stop_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The special token that the chat template puts after an assistant's message; none where it puts plain text.

    It can differ from the tokenizer's end of sequence, and a model that was trained on the template ends with it.
    """
    mark = "answer"
    messages: list[Any] = [{"role": "user", "content": "question"}, {"role": "assistant", "content": mark}]
    text = str(tokenizer.apply_chat_template(messages, tokenize=False))
    after = tokenizer(text[text.rindex(mark) + len(mark) :].lstrip(), add_special_tokens=False)["input_ids"]
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    return frozenset(after[:1]) & special


def as_answer(entry: dict[str, Any]) -> Answer:
    return Answer(**{name: entry[name] for name in Answer.__annotations__})  # type: ignore[typeddict-item]


def answer_facts(answers: Sequence[Answer]) -> dict[str, Any]:
    """Counts over answers.

    Raises:
        UserError: every answer is empty, so there is nothing to judge.
    """
    empty = sum(not answer["output"] for answer in answers)
    if empty == len(answers):
        raise UserError(
            f"all {empty} answers are empty; nothing was sent to the judge. Look at the model and its template"
        )
    return {
        "answers": len(answers),
        "empty_answers": empty,
        "mean_tokens": sum(answer["tokens"] for answer in answers) / len(answers),
        "at_limit": sum(not answer["ended"] for answer in answers) / len(answers),
        "cut_prompts": sum(answer["cut"] > 0 for answer in answers),
    }


def read_answers(location: str, setting: str, wanted: Sequence[tuple[str, int]]) -> list[Answer]:
    """The answers of a file to these (id, turn), whatever they were generated with; the last one where there are several.

    Raises:
        UserError: the file is missing, empty or damaged, or lacks an answer.
    """
    path = existing_path(location, setting)
    path = path / ANSWERS if path.is_dir() else path
    entries = read_entries(path)
    if not entries:
        raise UserError(f"--{setting} {path}: holds no answers; give answers.jsonl of a run that generated them")
    try:
        known = {(entry["id"], entry["turn"]): as_answer(entry) for entry in entries}
    except KeyError as error:
        raise UserError(f"--{setting} {path}: an entry has no {error}; give answers.jsonl of this stage") from error
    if missing := [key for key in wanted if key not in known]:
        shown = ", ".join(f"{name} turn {turn}" for name, turn in missing[:3])
        raise UserError(f"--{setting} {path}: lacks {len(missing)} of {len(wanted)} answers ({shown}, ...)")
    return [known[key] for key in wanted]
