"""Fetches an adapter from a source into a local folder, in a separate process: `python -m app.fetch`.

No module here imports a network library before a transfer begins.
"""

from app.fetch.source import Source, checked_prefixes, is_listed, parse_source

__all__ = ["Source", "checked_prefixes", "is_listed", "parse_source"]
