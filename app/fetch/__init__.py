"""Bring an adapter from elsewhere into a local folder, in a process of its own: `python -m app.fetch`.

Nothing here imports a network library before a transfer has begun.
"""

from app.fetch.source import Source, checked_prefixes, is_listed, parse_source

__all__ = ["Source", "checked_prefixes", "is_listed", "parse_source"]
