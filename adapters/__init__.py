"""The contract between training and serving: what an adapter is, and the store that keeps it."""

from adapters.archive import unpack
from adapters.diff import RevisionDiff, diff, render
from adapters.errors import (
    AdapterError,
    AdapterNotFound,
    AliasMoved,
    InvalidAdapter,
    InvalidRef,
    NothingToRollBack,
    StoreDamaged,
)
from adapters.fingerprint import fingerprint
from adapters.golden import GOLDEN_FILE, GoldenPrompt, read_golden, write_golden
from adapters.log import LogEntry
from adapters.manifest import PROVENANCE_FILE, Manifest, Provenance, Rounding
from adapters.ref import DEFAULT_ALIAS, AdapterRef
from adapters.store import AdapterStore
from adapters.traffic import CANARY, SHADOW, Traffic, is_in_share
from adapters.validate import AdapterFacts, BaseModelFacts, validate

__all__ = [
    "CANARY",
    "DEFAULT_ALIAS",
    "GOLDEN_FILE",
    "PROVENANCE_FILE",
    "SHADOW",
    "AdapterError",
    "AdapterFacts",
    "AdapterNotFound",
    "AdapterRef",
    "AdapterStore",
    "AliasMoved",
    "BaseModelFacts",
    "GoldenPrompt",
    "InvalidAdapter",
    "InvalidRef",
    "LogEntry",
    "Manifest",
    "NothingToRollBack",
    "Provenance",
    "RevisionDiff",
    "Rounding",
    "StoreDamaged",
    "Traffic",
    "diff",
    "fingerprint",
    "is_in_share",
    "read_golden",
    "render",
    "unpack",
    "validate",
    "write_golden",
]
