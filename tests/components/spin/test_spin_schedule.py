"""Windows, learning rates and weights of each iteration, and what its trainer is told."""

import pytest

from components.common.training.preference import DPOSettings, ORPOSettings
from components.spin.config import SPINSettings
from components.spin.schedule import describe, first_steps, schedule, steps_of, trainer_settings


def test_schedule_of_the_paper():
    iterations = schedule(SPINSettings(bf16=False))
    assert [i.window for i in iterations] == [(0,), (0, 1), (1, 2), (2, 3)]
    assert [i.learning_rate for i in iterations] == [5e-7, 5e-7, 1e-7, 1e-7]
    assert [i.weight for i in iterations] == [0.1, 0.1, 0.1, 5.0]


@pytest.mark.parametrize(
    ("window", "expected"), [(1, [(0,), (1,), (2,), (3,)]), (9, [(0,), (0, 1), (0, 1, 2), (0, 1, 2, 3)])]
)
def test_other_windows(window, expected):
    assert [i.window for i in schedule(SPINSettings(window=window, bf16=False))] == expected


def test_orpo_takes_its_lambdas_and_no_beta():
    settings = SPINSettings(loss_type="orpo", orpo_lambdas=[0.1, 0.2, 0.3, 0.4], bf16=False)
    assert [i.weight for i in schedule(settings)] == [0.1, 0.2, 0.3, 0.4]


@pytest.mark.parametrize(("loss", "kind"), [("dpo", DPOSettings), ("orpo", ORPOSettings)])
def test_trainer_settings_carry_the_iterations_values(loss, kind, settings):
    config = settings(loss_type=loss, optim="adamw_torch", lr_scheduler_type="inverse_sqrt", warmup_steps=3, seed=7)
    for iteration in schedule(config):
        args = trainer_settings(config, iteration, "somewhere")
        assert isinstance(args, kind)
        assert (args.learning_rate, args.beta) == (iteration.learning_rate, iteration.weight)
        assert (args.num_train_epochs, args.max_length, args.seed, args.warmup_steps) == (2.0, 96, 7, 3)
        assert (str(args.optim.value), str(args.lr_scheduler_type.value)) == ("adamw_torch", "inverse_sqrt")
        assert (args.bf16, args.output_dir, args.gradient_checkpointing) == (False, "somewhere", False)


@pytest.mark.slow
@pytest.mark.parametrize(("batch", "accumulation", "epochs"), [(4, 1, 2.0), (5, 2, 3.0), (3, 4, 0.5), (64, 1, 1.0)])
def test_steps_are_those_that_the_trainer_takes(build, tmp_path, batch, accumulation, epochs):
    changed = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    run = build(tmp_path, epochs_per_iteration=epochs, iterations=1, learning_rates=[1e-3], betas=[0.1], **changed)
    run.run()
    assert run.inputs.files.result(0)["steps"] == steps_of(schedule(run.inputs.settings)[0], 12, run.inputs.settings)


def test_first_steps_count_over_the_run(settings):
    assert first_steps(12, settings()) == [0, 6, 18]


def test_plan_names_each_iterations_window_steps_and_values(settings):
    plan = describe(12, 3, "runs/sft", settings())
    assert plan[0] == "rows: 12 (3 dropped: prompt too long)"
    assert plan[2] == ("iteration 0: from runs/sft; responses of {0}: 12 pairs, 6 steps, learning rate 0.001, beta 0.1")
    assert plan[3] == (
        "iteration 1: from iteration 0; responses of {0, 1}: 24 pairs, 12 steps, learning rate 0.0005, beta 0.5"
    )
    assert plan[4] == "steps: 18 in all, on 1 process(es)"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"iterations": 3}, r"learning_rates = \[.*\]: must list 3 values, one an iteration"),
        ({"betas": [0.1]}, r"betas = \[0.1\]: must list 2 values"),
        ({"loss_type": "orpo", "orpo_lambdas": [0.1, 0.0]}, "orpo_lambdas = .*: must be above 0 in every iteration"),
        ({"window": 0}, "window = 0: must be 1 or more"),
        ({"train_rows": 0}, "train_rows = 0: must be 1 or more, or `none`"),
        ({"top_p": 0.0}, "top_p = 0.0: must be within"),
        ({"epochs_per_iteration": 0.0}, "epochs_per_iteration = 0.0: must be above 0"),
    ],
)
def test_settings_that_cannot_work(changed, message, settings):
    with pytest.raises(ValueError, match=message):
        settings(**changed)


def test_betas_do_not_matter_to_orpo(settings):
    assert settings(loss_type="orpo", betas=[]).betas == []
