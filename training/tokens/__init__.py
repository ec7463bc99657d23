"""Tokenization of rows, and the masks of tokens with loss."""
