"""One module for each stage, named like it: `run(config, run_dir, events)` makes the result folder."""
