"""The HTTP routes for clients and operators."""
