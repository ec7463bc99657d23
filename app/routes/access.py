"""Dependencies that guard a route. The endpoints that an engine answers check the key in a step of their own."""

from app.exchange.state import AppRequest


async def admin(request: AppRequest) -> None:
    """Require the admin key."""
    request.state["access"].require_admin(request)


async def chat(request: AppRequest) -> None:
    """Require the right to chat."""
    request.state["access"].require_chat(request)
