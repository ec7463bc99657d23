"""Runs of jobs: folder, events, processes, and pipelines of several jobs."""
