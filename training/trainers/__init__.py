"""Code shared by all stages that use TRL: the training loop, its callbacks and trackers."""
