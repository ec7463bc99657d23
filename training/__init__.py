"""Trains adapters: a job (one YAML file) becomes a run; a successful run is published."""

import os

# Idle OpenMP threads sleep. By default they spin for some milliseconds after each piece of work; beside any other load
# that takes the core from the thread that all others wait for, and training runs at a hundredth of the speed. OpenMP
# reads this once, when torch is imported. A value set by the user stays.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
