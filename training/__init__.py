"""Produces adapters: a job (one YAML file) becomes a run, and a run that succeeds is published."""

import os

# A thread that has nothing to do sleeps. By default it spins for some milliseconds after every piece of work, which
# beside any other load takes the core from the thread that everybody waits for: a hundredth of the speed. OpenMP reads
# this once, when torch is imported. What the user has set stays.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
