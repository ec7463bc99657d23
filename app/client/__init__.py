"""Programs that ask a service."""
