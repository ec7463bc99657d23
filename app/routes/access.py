"""Who may use a route: dependencies for all but the endpoints that an engine answers."""

from app.exchange.state import AppRequest


async def admin(request: AppRequest) -> None:
    """Only with the admin key."""
    request.state["access"].require_admin(request)


async def chat(request: AppRequest) -> None:
    """Whoever may chat."""
    request.state["access"].require_chat(request)
