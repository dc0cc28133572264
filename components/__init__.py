"""The stages of the pipeline. One folder is one image and one CLI: `python -m components.sapo --help`."""
