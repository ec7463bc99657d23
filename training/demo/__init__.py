"""The demo: a bundled bilingual corpus, and the jobs that make a base model and two adapters from it."""
