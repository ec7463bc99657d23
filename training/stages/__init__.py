"""One module per stage, with its name: `train(config, run)` trains and returns the folder to publish."""
