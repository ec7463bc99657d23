"""Access control: keys, and the limit of concurrent requests."""
