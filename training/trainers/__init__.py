"""What TRL's trainers share here: the loop, its callbacks and its trackers."""
