"""Results: adapters, merged models, converted adapters."""
