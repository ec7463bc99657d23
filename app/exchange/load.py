"""How busy an engine is, told in a header to routers that ask for it."""

import json

from app.engine.stats import EngineStats

LOAD_FORMAT = "endpoint-load-metrics-format"
"""The header by which a client asks for the engine's load beside its answer."""


def load_header(stats: EngineStats, asked: str) -> dict[str, str]:
    """An engine's load as a header in the format `asked` for, TEXT or JSON; nothing for another.

    Open Request Cost Aggregation: https://github.com/cncf/xds/blob/main/xds/data/orca/v3/orca_load_report.proto
    """
    load = {"kv_cache_usage_perc": stats.kv_cache_usage, "num_requests_waiting": float(stats.waiting)}
    match asked.upper():
        case "TEXT":
            return {
                "endpoint-load-metrics": "TEXT "
                + ", ".join(f"named_metrics.{k}={v}" for k, v in load.items())
            }
        case "JSON":
            return {"endpoint-load-metrics": "JSON " + json.dumps({"named_metrics": load})}
    return {}
