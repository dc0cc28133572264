"""Settings of a run of seconds on the micro model; each test file says what else it wants."""

SMALL = {
    "max_steps": 6,
    "per_device_train_batch_size": 4,
    "max_length": 96,
    "segment_length": 6,
    "max_new_tokens": 6,
    "replay_buffer_size": 12,
    "logging_steps": 1,
    "report_to": "none",
    "save_strategy": "no",
    "use_cpu": True,
    "disable_tqdm": True,
}
