"""One module for each stage, named like it: `train(config, run)` trains, and returns the folder to publish."""
