"""The life of a served revision: load, prove, point, drain, remove."""
