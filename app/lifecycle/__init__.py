"""Which revision answers to which name: load, prove, point, drain, remove."""
