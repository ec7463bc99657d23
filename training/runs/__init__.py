"""One run of a job: its folder, its events, its processes, and the pipeline of several."""
