"""Compute figures from a ledger, and print them as a table."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from app.client.storm.judge import Judge
from app.client.storm.ledger import Ledger, Samples

Figures = dict[str, Any]

_TIMES = (
    "publish to ready",
    "load to ready",
    "ready to first token",
    "rollback to ready",
    "rollback to first answer",
    "evicted: request to first token",
)
_KINDS = {"failed": "failed", "wrong_revision": "by a wrong revision", "unlike_any": "matching no reference"}
_SERIES = re.compile(r'^xinglin_adapter_load_seconds_bucket\{le="([^"]+)",to="(\w+)"\} (\S+)$', re.M)
_COUNTER = r"^{name}(?:\{{[^}}]*\}})? (\S+)$"


def spread(seconds: Iterable[float]) -> dict[str, float | int | None]:
    """Return count, p50, p99 and maximum; times in milliseconds."""
    values = np.fromiter(seconds, float)
    if not len(values):
        return {"count": 0, "p50_ms": None, "p99_ms": None, "max_ms": None}
    p50, p99 = np.percentile(values, [50, 99])
    shown = {"p50_ms": p50, "p99_ms": p99, "max_ms": values.max()}
    return {"count": len(values), **{name: round(float(value) * 1000, 2) for name, value in shown.items()}}


def from_buckets(before: str, after: str, to: str) -> dict[str, float | int | None]:
    """Return count, p50 and p99 of xinglin_adapter_load_seconds between two readings of /metrics.

    Interpolates within the histogram's buckets.
    """
    counts: dict[float, float] = {}
    for text, sign in ((before, -1), (after, 1)):
        for edge, series, count in _SERIES.findall(text):
            if series == to:
                counts[float(edge)] = counts.get(float(edge), 0) + sign * float(count)
    edges = sorted(counts)
    total = counts[edges[-1]] if edges else 0
    if total <= 0:  # no loads, or the service died
        return {"count": 0, "p50_ms": None, "p99_ms": None}

    def quantile(share: float) -> float:
        below = lower = 0.0
        for edge in edges:
            if counts[edge] >= share * total:
                if edge == float("inf"):
                    return lower * 1000
                part = (share * total - below) / (counts[edge] - below)
                return round((lower + part * (edge - lower)) * 1000, 2)
            below, lower = counts[edge], edge
        return lower * 1000

    return {"count": int(total), "p50_ms": quantile(0.5), "p99_ms": quantile(0.99)}


def counted(before: str, after: str, name: str) -> int:
    """Return the increase of a counter between two readings of /metrics, summed over its labels."""
    pattern = re.compile(_COUNTER.format(name=re.escape(name)), re.M)
    grew = sum(map(float, pattern.findall(after))) - sum(map(float, pattern.findall(before)))
    return max(0, round(grew))  # a service that died returns none


def figures(ledger: Ledger, judge: Judge, metrics: tuple[str, str], leaked: Sequence[str] | None) -> Figures:
    """Return all figures of the report. `metrics`: before and after; `leaked`: None if it could not be checked."""
    verdicts = {phase: Counter(map(judge.verdict, ledger.in_phase(phase))) for phase in ("calm", "storm")}
    gaps = {phase: _phase(samples) for phase, samples in (("calm", ledger.calm), ("storm", ledger.storm))}
    return {
        "swaps": ledger.swaps,
        "swaps_by_action": dict(sorted(ledger.actions.items())),
        "seconds": {
            "calm": round(ledger.storm_began - ledger.calm_began, 1),
            "storm": round(ledger.storm_ended - ledger.storm_began, 1),
        },
        "answers": {
            phase: {
                "requests": found.total(), "failed": found["failed"], "wrong_revision": found["wrong revision"],
                "unlike_any": found["unlike any"],
            }
            for phase, found in verdicts.items()
        },
        "failures": dict(Counter(one.failure for one in ledger.answers if one.failure).most_common(10)),
        "answered_without_alias": ledger.answered_unpointed,
        "sessions_that_changed_sides": ledger.changed_sides,
        "refused_calls": len(ledger.refusals),
        "refusals": dict(Counter(ledger.refusals).most_common(5)),
        "leaked": None if leaked is None else list(leaked),
        **gaps,
        "engine_step_ms": gaps["calm"]["token_gap"]["p50_ms"],
        "meter_lag": spread(ledger.lags),
        "times": {what: spread(ledger.seconds.get(what, ())) for what in _TIMES},
        "service": {
            "load": from_buckets(*metrics, "load"),
            "load and proof": from_buckets(*metrics, "ready"),
            "evictions": counted(*metrics, "xinglin_adapter_evictions_total"),
            "engine_restarts": counted(*metrics, "xinglin_engine_starts_total"),
        },
        "notes": ledger.notes,
    }  # fmt: skip


def _phase(samples: Samples) -> dict[str, Any]:
    return {"token_gap": spread(samples.gaps), "first_token": spread(samples.first_tokens)}


def hurt(found: Mapping[str, Any]) -> list[str]:
    """Return the failed checks: every count that is not zero but must be. Empty if all passed."""
    answers = {
        f"{count} answers {_KINDS[kind]} in the {phase}"
        for phase, kinds in found["answers"].items()
        for kind, count in kinds.items()
        if kind != "requests" and count
    }
    rest = {
        "requests answered without an alias": found["answered_without_alias"],
        "sessions that changed sides of a canary": found["sessions_that_changed_sides"],
        "admin calls refused": found["refused_calls"],
        "revisions leaked": len(found["leaked"] or ()),
        "engine restarts": found["service"]["engine_restarts"],
    }
    problems = sorted(answers) + [f"{count} {what}" for what, count in rest.items() if count]
    if found["leaked"] is None:
        problems.append("leaks could not be checked: the service did not list what its engine holds")
    if not found["answers"]["storm"]["requests"]:
        problems.append("no requests in the storm")
    return problems


def table(found: Mapping[str, Any]) -> str:
    """Return the figures as a table for the terminal."""
    calm, storm, answers = found["calm"], found["storm"], found["answers"]
    lines = [
        f"{'':34}{'calm':>12}{'storm':>12}",
        *(
            f"{label:34}{answers['calm'][kind]:>12}{answers['storm'][kind]:>12}"
            for label, kind in (
                ("answers", "requests"), *((f"  {label}", kind) for kind, label in _KINDS.items()),
            )
        ),
        *(
            f"{f'{label} {column}, ms':34}{_ms(calm[key][f'{column}_ms'])}{_ms(storm[key][f'{column}_ms'])}"
            for label, key, columns in (
                ("token gap", "token_gap", ("p50", "p99", "max")),
                ("first token", "first_token", ("p50", "p99")),
            )
            for column in columns
        ),
        "",
        f"{'swaps':34}{found['swaps']:>12}   in {found['seconds']['storm']} s",
        f"{'p99 token gap, storm - calm, ms':34}{_ms(_added(calm, storm))}   an engine step takes "
        f"{_ms(found['engine_step_ms']).strip()}",
        f"{'lag of this client, ms':34}{_ms(found['meter_lag']['p99_ms'])}   p99; max "
        f"{_ms(found['meter_lag']['max_ms']).strip()}",
        "",
        f"{'':34}{'p50':>12}{'p99':>12}{'count':>8}",
        *(_row(f"{what}, ms", times) for what, times in found["times"].items()),
        *(_row(f"service: {what}, ms (buckets)", found["service"][what]) for what in ("load", "load and proof")),
        "",
        f"evictions {found['service']['evictions']}, leaked "
        f"{'unknown' if found['leaked'] is None else len(found['leaked'])}, sessions that changed sides "
        f"{found['sessions_that_changed_sides']}, refused calls {found['refused_calls']}",
        ", ".join(f"{action} {count}" for action, count in found["swaps_by_action"].items()),
        *(f"note: {note}" for note in found["notes"]),
        *(f"{count} times: {what}" for what, count in {**found["failures"], **found["refusals"]}.items()),
        *(f"leaked: {ref}" for ref in found["leaked"] or ()),
    ]  # fmt: skip
    problems = hurt(found)
    return "\n".join([*lines, "", f"FAIL: {'; '.join(problems)}" if problems else "PASS"])


def _ms(value: float | None) -> str:
    return f"{'-' if value is None else f'{value:.1f}':>12}"


def _row(label: str, times: Mapping[str, Any]) -> str:
    return f"{label:34}{_ms(times['p50_ms'])}{_ms(times['p99_ms'])}{times['count']:>8}"


def _added(calm: Mapping[str, Any], storm: Mapping[str, Any]) -> float | None:
    before, after = calm["token_gap"]["p99_ms"], storm["token_gap"]["p99_ms"]
    return None if before is None or after is None else after - before
