"""The banner that `serve` prints once it is ready: its URL, its models, and two examples to try."""

from app.lifecycle.served_models import ServedModels
from app.settings import Settings

_QUESTION = "感冒有什么症状？"
_MOST_NAMES = 10


def banner(settings: Settings, served: ServedModels, admin_key: str | None) -> str:
    """Return the banner. Its examples work when pasted into a shell or into Python."""
    url = f"http://{settings.host}:{settings.port}"
    adapters = [name for name, _ in served.named()]
    more = f" and {len(adapters) - _MOST_NAMES} more" if len(adapters) > _MOST_NAMES else ""
    model = adapters[0] if adapters else served.bases[0]
    key = "unused" if settings.is_loopback else "$XINGLIN_ADMIN_KEY"
    auth = "" if settings.is_loopback else ' -H "Authorization: Bearer $XINGLIN_ADMIN_KEY"'
    lines = [
        "",
        f"  Xinglin 杏林 is ready: {url}",
        f"  base model  {', '.join(served.bases)}",
        f"  adapters    {', '.join(adapters[:_MOST_NAMES]) + more or 'none yet'}",
        *([f"  admin key   {admin_key}"] if admin_key else []),
        "",
        f"curl {url}/v1/chat/completions -H 'Content-Type: application/json'{auth} \\",
        f"""  -d '{{"model": "{model}", "temperature": 0,"""
        f""" "messages": [{{"role": "user", "content": "{_QUESTION}"}}]}}'""",
        "",
        "from openai import OpenAI",
        f'client = OpenAI(base_url="{url}/v1", api_key="{key}")',
        "stream = client.chat.completions.create(",
        f'    model="{model}", temperature=0, stream=True,',
        f'    messages=[{{"role": "user", "content": "{_QUESTION}"}}],',
        ")",
        "for chunk in stream:",
        '    print(chunk.choices[0].delta.content or "", end="")',
        "",
    ]
    return "\n".join(lines)
