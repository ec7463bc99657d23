"""Estimates the memory of a job before it runs."""
