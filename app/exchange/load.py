"""The engine's load as a response header, for routers that request it."""

import json

from app.engine.stats import EngineStats

LOAD_FORMAT = "endpoint-load-metrics-format"
"""The request header that asks for the engine's load."""


def load_header(stats: EngineStats, asked: str) -> dict[str, str]:
    """Return an engine's load as a header in the format `asked`, TEXT or JSON; empty for any other format.

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
