"""Responses come out the same however often their generation was interrupted, and as the engine draws them."""

import pytest

from components.common.core.errors import UserError
from components.common.generation.protocol import request_seed
from components.common.models.loading import stop_ids
from components.spin.generation import generate, generation_order, is_complete, read_pairs, statistics
from components.spin.samplers import open_sampler


class RecordingSampler:
    """Answers each prompt with its seed and length; notes what it was asked."""

    version = 0

    def __init__(self) -> None:
        self.batches: list[list[list[int]]] = []
        self.limits: list[int] = []

    def generate(self, prompts, max_new_tokens, seeds):
        self.batches.append(prompts)
        self.limits += max_new_tokens
        return [[seed, len(prompt)] for prompt, seed in zip(prompts, seeds, strict=True)]

    def load(self, weights, version): ...


def rows(count: int) -> list[dict]:
    return [{"id": f"row-{i}", "prompt_ids": [1] * (1 + i * 7 % 5), "chosen_ids": [2, 3]} for i in range(count)]


def test_every_row_gets_its_own_response(settings, tmp_path):
    data, sampler = rows(12), RecordingSampler()
    generate(sampler, data, tmp_path / "g.jsonl", 3, settings(seed=9))
    pairs = read_pairs(tmp_path / "g.jsonl", data)
    assert [pair["id"] for pair in pairs] == [row["id"] for row in data]
    assert [pair["rejected_ids"] for pair in pairs] == [
        [request_seed(9, 3, row["id"]), len(row["prompt_ids"])] for row in data
    ]
    lengths = [len(prompt) for batch in sampler.batches for prompt in batch]
    assert lengths == sorted(lengths, reverse=True)
    assert [len(batch) for batch in sampler.batches] == [5, 5, 2]


def test_a_response_fits_the_window(settings, tmp_path):
    sampler = RecordingSampler()
    generate(sampler, rows(5), tmp_path / "g.jsonl", 0, settings(max_length=6, max_new_tokens=3))
    assert sorted(sampler.limits) == [1, 2, 3, 3, 3]


@pytest.mark.parametrize("cut", [1, 40, 150, 400, 451])
def test_goes_on_after_the_last_whole_batch(cut, settings, tmp_path):
    data = rows(12)
    generate(RecordingSampler(), data, tmp_path / "whole.jsonl", 0, settings())
    whole = (tmp_path / "whole.jsonl").read_bytes()
    (tmp_path / "cut.jsonl").write_bytes(whole[:-cut])
    assert not is_complete(tmp_path / "cut.jsonl", data)
    sampler = RecordingSampler()
    generate(sampler, data, tmp_path / "cut.jsonl", 0, settings())
    assert (tmp_path / "cut.jsonl").read_bytes() == whole
    left = whole[:-cut].count(b"\n") // 5 * 5
    assert sum(map(len, sampler.batches)) == 12 - left


def test_nothing_is_left_to_do(settings, tmp_path):
    data, sampler = rows(12), RecordingSampler()
    generate(RecordingSampler(), data, tmp_path / "g.jsonl", 0, settings())
    generate(sampler, data, tmp_path / "g.jsonl", 0, settings())
    assert sampler.batches == []


def test_real_responses_depend_on_seed_and_iteration_and_end_with_a_stop_token(build, tmp_path):
    run = build(tmp_path, max_new_tokens=30)
    stops = stop_ids(run.inputs.model, run.inputs.tokenizer)
    drawn = {}
    with open_sampler(run.inputs.model, run.inputs.tokenizer, run.inputs.settings) as sampler:
        for name, iteration in (("first", 0), ("again", 0), ("next", 1)):
            path = tmp_path / f"{name}.jsonl"
            generate(sampler, run.inputs.train_rows, path, iteration, run.inputs.settings)
            drawn[name] = [pair["rejected_ids"] for pair in read_pairs(path, run.inputs.train_rows)]
    assert drawn["first"] == drawn["again"]
    assert drawn["first"] != drawn["next"]
    for response in drawn["first"]:
        assert len(response) == 30 or response[-1] in stops
        assert stops.isdisjoint(response[:-1])


def test_file_of_other_rows_or_with_a_broken_line(settings, tmp_path):
    path, data = tmp_path / "g.jsonl", rows(12)
    generate(RecordingSampler(), data, path, 0, settings())
    with pytest.raises(UserError, match=r"is damaged \(its ids are not those of the rows\)"):
        read_pairs(path, data[:11])
    path.write_text(path.read_text().replace("row-3", '"'))
    with pytest.raises(UserError, match="is damaged"):
        read_pairs(path, data)


def test_statistics_count_identical_responses_and_ends():
    pairs = [
        {"prompt_ids": [1], "chosen_ids": [5, 9], "rejected_ids": [5, 9]},
        {"prompt_ids": [1], "chosen_ids": [5, 9], "rejected_ids": [5, 6, 7, 8]},
    ]
    assert statistics(pairs, frozenset({9})) == {
        "tokens/generated": 6,
        "generated/mean_length": 3.0,
        "generated/identical": 1,
        "generated/ended_share": 0.5,
    }


def test_order_is_stable():
    assert generation_order(rows(6)) == [2, 4, 1, 3, 0, 5]
