"""What two or more stages share: the CLI, the data format, locations, chat templates, KFP metadata."""
