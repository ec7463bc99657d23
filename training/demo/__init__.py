"""The demo: a bundled bilingual corpus, and the jobs that train a base model and four adapters on it."""
