"""A language model behind an OpenAI-compatible endpoint that grades answers.

Every reply of the judge is on disk before it is used, so that none is paid for twice; what it says is read from there.
The key comes from the environment and goes nowhere else.
"""

import logging
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai

from components.common.core.errors import UserError
from components.common.core.progress import progress
from components.evaluation.judged.journal import Journal, digest
from components.evaluation.judged_config import JudgedConfig

logger = logging.getLogger(__name__)

Reply = dict[str, Any]  # one choice of a chat completion: message, finish_reason, logprobs
Parse = Callable[[Reply], float]  # raises ValueError when the reply cannot be read


@dataclass(frozen=True)
class Grading:
    """One judgement to ask for."""

    id: str
    turn: int
    messages: list[dict[str, str]]


@dataclass(frozen=True)
class Judgement:
    """What came of it. `value` is None where no reply could be read or the endpoint refused; `error` says why."""

    id: str
    turn: int
    value: float | None
    error: str | None
    reply: Reply | None


class Judge:
    """Asks a model for judgements.

    Args:
        model: its name at the endpoint.
        config: the endpoint, the key's variable, retries, prices.
        options: of every request: temperature, max_tokens, logprobs.

    Attributes:
        usage: requests, tokens and cost (US dollars; None without prices) of all judgements asked for so far, those
            of earlier runs included.

    Raises:
        UserError: the key's variable is not set.
    """

    def __init__(self, model: str, config: JudgedConfig, options: dict[str, Any]) -> None:
        self.model = model
        self.config = config
        self.options = options
        self.client = openai.OpenAI(
            api_key=_key(config),
            base_url=config.judge_base_url or "https://api.openai.com/v1",
            max_retries=config.judge_retries,  # with exponential back-off, or as long as Retry-After says
            timeout=config.judge_timeout,
        )
        self._entries: list[dict[str, Any]] = []
        self._stopped = threading.Event()

    def check(self) -> Reply:
        """The reply to one request of one token, which shows that endpoint, key and model are as they should be.

        Raises:
            UserError: they are not; says which.
        """
        client = self.client.with_options(max_retries=min(2, self.config.judge_retries))
        messages = [{"role": "user", "content": "Reply with m."}]
        try:
            return self._complete(client, messages, self.options | {"max_tokens": 1})["reply"]
        except openai.OpenAIError as error:
            raise UserError(self._explain(error)) from error

    def ask(
        self, gradings: Sequence[Grading], parse: Parse, path: Path, description: str = "judgements"
    ) -> list[Judgement]:
        """A judgement of each grading, from the file or asked for now; in their order.

        A reply that cannot be read is asked for again `judge_reasks` times. Then it is an error of that judgement, as
        is a request that the endpoint refuses (a content filter, a prompt that is too long). Both are kept in the file.

        Raises:
            UserError: the judge cannot be reached any more, or refuses the key; what it said until then is kept.
        """
        journal = Journal(path)
        keys = [digest(self.model, self.options, g.id, g.turn, g.messages) for g in gradings]
        known: dict[str, list[dict[str, Any]]] = {key: [] for key in keys}
        for entry in journal.entries:
            known.get(entry["digest"], []).append(entry)
        open_ones = {k: g for k, g in zip(keys, gradings, strict=True) if not self._settled(known[k], parse)}
        done = len(keys) - len(open_ones)
        with progress(total=len(keys), initial=done, desc=description, unit="judgements") as bar:
            self._ask_all(open_ones, known, parse, journal, bar.update)
        self._entries += [entry for key in known for entry in known[key]]
        return [_judgement(grading, known[key], parse) for key, grading in zip(keys, gradings, strict=True)]

    @property
    def usage(self) -> dict[str, Any]:
        tokens_in, tokens_out = (sum(e[f"{way}_tokens"] for e in self._entries) for way in ("input", "output"))
        prices = self.config.judge_prices.get(self.model)
        cost = None if prices is None else (tokens_in * prices[0] + tokens_out * prices[1]) / 1e6
        return {
            "requests": len(self._entries),
            "input_tokens": tokens_in,
            "output_tokens": tokens_out,
            "cost_usd": cost,
        }

    def facts(self, judgements: Sequence[Judgement]) -> dict[str, Any]:
        """Who judged and how it went, for the results; warns of errors.

        Raises:
            UserError: not one judgement could be read.
        """
        errors = [j for j in judgements if j.value is None]
        if len(errors) == len(judgements):
            raise UserError(f"no judgement of {self.model} could be read; the first one: {errors[0].error}")
        if errors:
            logger.warning("%d of %d judgements are errors and count for nothing", len(errors), len(judgements))
        return {
            "model": self.model,
            "served_models": sorted({str(e["model"]) for e in self._entries if e["model"]}),
            "base_url": str(self.client.base_url),
            "options": self.options,
            "judgements": len(judgements),
            "errors": [{"id": j.id, "turn": j.turn, "error": j.error} for j in errors],
            "usage": self.usage,
        }

    def _ask_all(
        self,
        gradings: dict[str, Grading],
        known: dict[str, list[dict[str, Any]]],
        parse: Parse,
        journal: Journal,
        done: Callable[[], Any],
    ) -> None:
        with ThreadPoolExecutor(self.config.judge_concurrency) as pool:
            futures = [pool.submit(self._ask_one, k, g, known[k], parse, journal) for k, g in gradings.items()]
            try:
                for future in as_completed(futures):
                    future.result()
                    done()
            except openai.OpenAIError as error:
                raise UserError(f"{self._explain(error)}. Its judgements are kept in {journal.path}") from error
            finally:
                self._stopped.set()  # what is under way still gets its reply, and saves it
                pool.shutdown(cancel_futures=True)
        self._stopped.clear()

    def _ask_one(
        self, key: str, grading: Grading, entries: list[dict[str, Any]], parse: Parse, journal: Journal
    ) -> None:
        while not (self._settled(entries, parse) or self._stopped.is_set()):
            try:
                answer = self._complete(self.client, grading.messages, self.options)
            except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
                answer = {
                    "model": None,
                    "reply": None,
                    "error": _one_line(error),
                    "input_tokens": 0,
                    "output_tokens": 0,
                }
            entry = {"digest": key, "id": grading.id, "turn": grading.turn, **answer}
            journal.append([entry])
            entries.append(entry)

    def _settled(self, entries: list[dict[str, Any]], parse: Parse) -> bool:
        """Whether there is nothing more to ask: a reply was read, the endpoint refused, or it was asked often enough."""
        if not entries:
            return False
        refused = entries[-1]["reply"] is None
        return refused or len(entries) > self.config.judge_reasks or _read(entries[-1], parse)[0] is not None

    def _complete(self, client: openai.OpenAI, messages: Any, options: dict[str, Any]) -> dict[str, Any]:
        completion = client.chat.completions.create(model=self.model, messages=messages, **options)
        if not getattr(completion, "choices", None):  # a page of another server, which the client gives as text
            raise openai.OpenAIError("it answers with something else than a chat completion; check --judge_base_url")
        usage = completion.usage
        return {
            "model": completion.model,
            "reply": completion.choices[0].model_dump(mode="json", exclude_none=True),
            "error": None,
            "input_tokens": usage.prompt_tokens if usage else 0,
            "output_tokens": usage.completion_tokens if usage else 0,
        }

    def _explain(self, error: openai.OpenAIError) -> str:
        """One line on what is wrong with the judge. The reply of an endpoint that refuses a key may quote it: left out."""
        where = f"the judge {self.model} at {self.client.base_url}"
        if isinstance(error, openai.AuthenticationError | openai.PermissionDeniedError):
            return f"{where} refuses the key in {self.config.judge_key_variable} (HTTP {error.status_code})"
        if isinstance(error, openai.APITimeoutError):
            return f"{where} did not answer within {self.config.judge_timeout:g} s; raise judge_timeout, or look at it"
        if isinstance(error, openai.APIConnectionError):
            return f"{where} cannot be reached; check --judge_base_url and the network"
        if isinstance(error, openai.RateLimitError):
            return f"{where} turns requests away (HTTP 429: {_one_line(error)}); lower judge_concurrency, or come back later"
        return f"{where} fails: {_one_line(error)}"


def _key(config: JudgedConfig) -> str:
    if config.judge_key_variable is None:
        return "none"  # the client insists on one
    if not (key := os.environ.get(config.judge_key_variable, "").strip()):
        raise UserError(
            f"the judge needs a key in the environment variable {config.judge_key_variable}, which is not set; set it, "
            "or give --judge_key_variable none for an endpoint that wants no key"
        )
    return key


def _judgement(grading: Grading, entries: list[dict[str, Any]], parse: Parse) -> Judgement:
    value, error = _read(entries[-1], parse)
    return Judgement(grading.id, grading.turn, value, error, entries[-1]["reply"])


def _read(entry: dict[str, Any], parse: Parse) -> tuple[float | None, str | None]:
    """The value of a saved reply, or why it has none."""
    if entry["reply"] is None:
        return None, entry["error"]
    try:
        return parse(entry["reply"]), None
    except ValueError as error:
        return None, str(error)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
