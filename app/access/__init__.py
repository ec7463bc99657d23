"""Who may ask, and how many at a time."""
