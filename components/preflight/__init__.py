"""preflight: what a run needs and lacks, looked at before any GPU is used."""
