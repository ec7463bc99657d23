"""Rows to token ids, and which of them a stage learns."""
