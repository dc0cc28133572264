"""SPIN with an engine that it does not know by name."""

from spin_runs import equal_weights


def test_spin_runs_with_an_engine_that_is_an_entry(build, tmp_path, third_engine):
    build(tmp_path / "hf").run()
    run = build(tmp_path / "third", sampler="third")
    run.run()
    assert len(third_engine) == 2 and all(engine.closed and engine.batches for engine in third_engine)
    for index in range(2):
        assert equal_weights(
            run.inputs.files.model(index),
            tmp_path / "hf" / run.inputs.files.model(index).relative_to(tmp_path / "third"),
        )
