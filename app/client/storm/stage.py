"""Set up a storm and clean up after it."""

import asyncio
import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

from adapters import AdapterStore
from app.client.storm.actions import WHY, Adapter, Operator
from app.client.storm.client import CallFailed, Client
from app.client.storm.judge import BASE, Timeline
from app.client.storm.ledger import Ledger
from app.client.storm.variants import NAME, Original, find_originals

Messages = list[dict[str, str]]

_QUESTIONS = 6
_GONE, _CROWD = f"{NAME}gone", f"{NAME}crowd"
_MOST_CROWD = 40
_MOST_CROWD_BYTES = 2 << 30
_DRAIN_SECONDS = 10


_HINTS = {
    0: "no service answers: start one, or set --url ({})",
    401: "the admin key is wrong: set XINGLIN_ADMIN_KEY to the service's",
    503: "the service is not ready: wait until GET /readyz returns 200 ({})",
}


class CannotStart(Exception):
    """A prerequisite is missing; the message says how to fix it."""


@dataclass(frozen=True)
class Stage:
    """The adapters, questions and references of a storm."""

    base_model: str
    questions: list[Messages]
    references: dict[str, list[str]]
    """The text for each question, by original or BASE."""
    adapters: list[Adapter]
    gone: Adapter
    crowd: list[str]


async def find(client: Client, store: AdapterStore, ledger: Ledger) -> tuple[str, list[Original]]:
    """Return the base model's name and one or two originals; check the service and the key.

    Removes the leftovers of an earlier storm. Raises CannotStart.
    """
    try:
        await _remove_leftovers(client)
        await _prune_all(client, f"{NAME}0")  # checks the admin key
        models = (await client.call("GET", "/v1/models"))["data"]
        base_model = str(next(model["id"] for model in models if not model["parent"]))
        hello = {"model": base_model, "messages": [{"role": "user", "content": "1"}], "max_tokens": 1}
        fingerprint = str((await client.call("POST", "/v1/chat/completions", hello))["system_fingerprint"])
    except CallFailed as error:
        raise CannotStart(_HINTS.get(error.status, "{}").format(error)) from error
    originals = list(itertools.islice(find_originals(store, fingerprint.rpartition("@")[2]), 2))
    if not originals:
        raise CannotStart(
            f"the store has no chat adapter of {base_model} with golden prompts: publish one, or set --data-dir to "
            "the service's data directory"
        )
    if len(originals) == 1:
        ledger.notes.append(
            f"only {originals[0].ref} can be copied: all revisions have equal answers, and only x-adapter-revision "
            "tells them apart"
        )
    return base_model, originals


async def build(
    client: Client,
    operator: Operator,
    base_model: str,
    originals: Sequence[Original],
    timeline: Timeline,
    ledger: Ledger,
    *,
    adapters: int,
    on_step: Callable[[str], None],
) -> Stage:
    """Publish the adapters to swap, and get the references: answers without other load. Raises CannotStart."""
    made = [Adapter(f"{NAME}{number}") for number in range(adapters)]
    gone, crowd = Adapter(_GONE), Adapter(_CROWD)
    questions = questions_of(originals)
    references: dict[str, list[str]] = {}
    try:
        on_step("references")
        references[BASE] = await heard_alone(client, base_model, questions)
        for index, original in enumerate(originals):
            await operator.publish(made[0], made_of=index)
            references[original.ref] = await heard_alone(client, made[0].name, questions)
        questions, references = telling(questions, references, ledger)
        on_step("adapters")
        for adapter, of in zip([*made[1:], gone], itertools.cycle(range(len(originals))), strict=False):
            await operator.publish(adapter, made_of=of)
        names = []
        limit = (await client.call("GET", "/v1/adapters"))["engines"][0]["max_resident"]
        size = max(file.stat().st_size for original in originals for file in original.folder.iterdir())
        if limit > _MOST_CROWD or limit * size > _MOST_CROWD_BYTES:
            ledger.notes.append(
                f"evictions were not tested: the service holds {limit} adapters, too many to exceed"
            )
            limit = 0
        for number in range(limit):
            on_step(f"adapters to evict {number + 1} of {limit}")
            alias = f"c{number:02}"
            began = perf_counter()
            revision = await operator.publish(crowd, alias, made_of=number % len(originals))
            timeline.begin(f"{_CROWD}@{alias}", revision, began)
            names.append(f"{_CROWD}@{alias}")
    except CallFailed as error:
        raise CannotStart(str(error)) from error
    return Stage(base_model, questions, references, made, gone, names)


async def clear(client: Client, *, adapters: int) -> list[str] | None:
    """Remove everything that a storm with this many adapters made.

    Returns the leaked refs: those that the engine still holds though no alias needs them; None if the service cannot
    tell.
    """
    try:
        names = {
            *await _remove_aliases(client),
            *(f"{NAME}{number}" for number in range(adapters)),
            _GONE,
            _CROWD,
        }
        for _ in range(_DRAIN_SECONDS * 4):
            leaked = _unpointed(await client.call("GET", "/v1/adapters"))
            if not leaked:
                break
            await asyncio.sleep(0.25)
        for name in names:
            await _prune_all(client, name)
    except CallFailed:
        return None
    return leaked


async def _prune_all(client: Client, name: str) -> None:
    """Remove all revisions without an alias; ignore an unknown name. Raises CallFailed."""
    try:
        await client.call("POST", f"/v1/adapters/{name}/prune", {"keep": 0, "why": WHY})
    except CallFailed as error:
        if error.status != 404:
            raise


def _unpointed(listed: dict[str, Any]) -> list[str] | None:
    """Return the refs that the engine holds but that no alias uses now or would use after a rollback."""
    if listed["engines"][0]["held"] is None:
        return None
    wanted = {
        f"{entry['name']}@{entry[which]}" for entry in listed["data"] for which in ("actual", "rollback_to")
    }
    return [ref for ref in listed["engines"][0]["held"] if ref not in wanted]


async def _remove_aliases(client: Client) -> set[str]:
    """Remove all aliases of storms; return their adapters' names. Raises CallFailed."""
    listed = (await client.call("GET", "/v1/adapters"))["data"]
    mine = [entry for entry in listed if entry["name"].startswith(NAME)]
    for entry in mine:
        await client.call("DELETE", f"/v1/adapters/{entry['name']}/aliases/{entry['alias']}?why={WHY}")
    return {entry["name"] for entry in mine}


async def _remove_leftovers(client: Client) -> None:
    """Remove the leftovers of a killed storm. Raises CannotStart if an adapter is not a storm's."""
    listed = (await client.call("GET", "/v1/adapters"))["data"]
    for name in sorted({entry["name"] for entry in listed if entry["name"].startswith(NAME)}):
        log = (await client.call("GET", f"/v1/adapters/{name}"))["log"]
        if any(entry["action"] == "publish" and entry["why"] != WHY for entry in log):
            raise CannotStart(f"the adapter {name} was not made by a storm but has a storm's name: rename it")
    await clear(client, adapters=0)


async def heard_alone(client: Client, model: str, questions: Sequence[Messages]) -> list[str]:
    texts = []
    for number, question in enumerate(questions):
        answer = await client.ask(model, number, question)
        if answer.failure:
            raise CannotStart(f"{model} does not answer: {answer.failure}")
        texts.append(answer.text)
    return texts


def questions_of(originals: Sequence[Original]) -> list[Messages]:
    """Return some of each original's golden prompts, ASCII and other."""
    by_kind: list[list[Messages]] = []
    for original in originals:
        prompts = original.prompts()
        for is_ascii in (False, True):
            by_kind.append([one for one in prompts if one[-1]["content"].isascii() == is_ascii])
    mixed = [one for together in itertools.zip_longest(*by_kind) for one in together if one]
    return mixed[:_QUESTIONS]


def telling(
    questions: list[Messages], references: dict[str, list[str]], ledger: Ledger
) -> tuple[list[Messages], dict[str, list[str]]]:
    """Return only the questions that all models answer differently, if there are any."""
    told = [
        at for at, texts in enumerate(zip(*references.values(), strict=True)) if len({*texts}) == len(texts)
    ]
    if not told:
        ledger.notes.append(
            "the originals have equal answers: the text cannot tell a wrong revision from the right one"
        )
        return questions, references
    return [questions[at] for at in told], {
        who: [texts[at] for at in told] for who, texts in references.items()
    }


def seeded(seed: int, what: str) -> random.Random:
    """Return a random generator that depends only on `seed` and its use `what`."""
    return random.Random(f"{seed} {what}")  # noqa: S311 - not for secrets
