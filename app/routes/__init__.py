"""What clients and operators can ask for over HTTP."""
