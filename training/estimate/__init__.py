"""Memory and time of a job, before it runs."""
