"""Produces adapters: a job (one YAML file) becomes a run, and a run that succeeds is published."""
