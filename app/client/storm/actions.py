"""The operator of a storm: random admin actions on adapters under load."""

import asyncio
import random
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from time import perf_counter

from adapters import DEFAULT_ALIAS
from app.client.storm.client import Answer, CallFailed, Client
from app.client.storm.judge import Timeline
from app.client.storm.ledger import Ledger
from app.client.storm.variants import Original, variant

WHY = "swap-storm"

_KEPT = 6
"""Revisions of a name that pruning keeps; earlier ones are chosen from these."""
_PRUNE_EVERY = 10
_SESSIONS = 4
_SHARE_SECONDS = 0.3
"""How long a shadow runs, and how long a session waits between two requests."""
_MOST_REFUSALS = 10
_NOT_THERE = "HTTP 404 model_not_found"

Ask = Callable[[str, str | None], Coroutine[None, None, Answer]]
"""Send one question to a model, with or without a session id; the answer is recorded."""


@dataclass
class Adapter:
    """One name whose aliases the operator moves."""

    name: str
    current: str = ""
    """The revision of `default`; empty if there is none."""
    published: list[str] = field(default_factory=list)
    """Revisions in the store, oldest first."""
    publications: int = 0

    @property
    def path(self) -> str:
        """The adapter's URL path."""
        return f"/v1/adapters/{self.name}"


class Operator:
    """Performs the actions.

    `adapters` are swapped under load. `gone` gets no load: its alias is removed and pointed again. `crowd` are aliases
    whose revisions, together with the others, exceed what the engine holds: requests for them cause evictions.
    """

    def __init__(
        self, client: Client, originals: Sequence[Original], timeline: Timeline, ledger: Ledger,
        chance: random.Random, ask: Ask,
    ) -> None:  # fmt: skip
        self._client = client
        self._originals = originals
        self._timeline = timeline
        self._ledger = ledger
        self._chance = chance
        self._ask = ask
        self._refused_in_a_row = 0
        self._asked_of_crowd = 0
        self._asking: set[asyncio.Task[None]] = set()

    async def run(
        self,
        swaps: int,
        adapters: Sequence[Adapter],
        gone: Adapter,
        crowd: Sequence[str],
        stop: asyncio.Event,
        on_swap: Callable[[], None],
    ) -> None:
        """Act until `swaps` alias moves are done, `stop` is set, or the service refuses too many calls in a row."""
        targets: list[Adapter | None] = [*adapters, gone, *([None] if crowd else [])]
        weights = [3.0] * len(adapters) + [1.0, 2.0][: len(targets) - len(adapters)]
        while self._ledger.swaps < swaps and not stop.is_set():
            first, second = self._chance.choices(targets, weights, k=2)
            at_once = first is not second and self._chance.random() < 0.2
            chosen = [first, second] if at_once else [first]
            await asyncio.gather(*(self._act(target, gone, crowd) for target in chosen))
            self._ledger.actions["two at once"] += at_once
            on_swap()
            if self._refused_in_a_row >= _MOST_REFUSALS:
                self._ledger.notes.append(f"ended early: {_MOST_REFUSALS} calls in a row were refused")
                break
        await asyncio.gather(*self._asking)

    async def publish(
        self, adapter: Adapter, alias: str | None = DEFAULT_ALIAS, made_of: int | None = None
    ) -> str:
        """Publish a new revision whose answers differ from the current one's, and point `alias` at it.

        `made_of`: the index of its original. Raises CallFailed.
        """
        index = self._other(adapter) if made_of is None else made_of
        original = self._originals[index]
        archive = await asyncio.to_thread(variant, original, random.Random(self._chance.random()))  # noqa: S311
        began = perf_counter()
        revision = await self._client.publish(adapter.name, archive, alias=alias, why=WHY)
        if revision not in adapter.published:  # a tiny adapter has few variants
            adapter.published.append(revision)
        adapter.publications += 1
        self._timeline.made_of[revision] = original.ref
        if alias == DEFAULT_ALIAS:
            self._settle(adapter, revision, began)
        return revision

    # One action each

    async def _act(self, target: Adapter | None, gone: Adapter, crowd: Sequence[str]) -> None:
        try:
            if target is None:
                await self._evict(crowd)
            elif target is gone:
                await self._remove_and_return(target)
            else:
                actions = [self._publish, self._earlier, self._roll_back, self._canary, self._shadow]
                (action,) = self._chance.choices(actions, [4, 3, 2, 2, 1])
                await action(target)
                await self._prune(target)
        except CallFailed as error:
            self._ledger.refusals.append(str(error))
            self._refused_in_a_row += 1
            await asyncio.sleep(0.5)
            await self._look(target)
        else:
            self._refused_in_a_row = 0

    async def _publish(self, adapter: Adapter) -> None:
        began = perf_counter()
        await self.publish(adapter)
        self._took("publish to ready", perf_counter() - began)
        self._moved("publish")
        self._time_first_token(adapter, "ready to first token")

    async def _earlier(self, adapter: Adapter, action: str = "point at an earlier one") -> None:
        revision = self._another(adapter)
        if revision is None:
            return await self._publish(adapter)
        began = perf_counter()
        self._timeline.begin(adapter.name, revision, began)
        await self._client.call(
            "PUT", f"{adapter.path}/aliases/{DEFAULT_ALIAS}", {"revision": revision, "why": WHY}
        )
        self._took("load to ready", perf_counter() - began)
        self._settle(adapter, revision, began)
        self._moved(action)
        self._time_first_token(adapter, "ready to first token")
        return None

    async def _roll_back(self, adapter: Adapter) -> None:
        began = perf_counter()
        try:
            reply = await self._client.call(
                "POST", f"{adapter.path}/rollback", {"alias": DEFAULT_ALIAS, "why": WHY}
            )
        except CallFailed as error:
            if error.code != "nothing_to_roll_back":  # expected if the previous revision was pruned
                raise
            return await self._publish(adapter)
        self._took("rollback to ready", perf_counter() - began)
        self._settle(adapter, str(reply["revision"]), began)
        self._moved("roll back")
        self._time_first_token(adapter, "rollback to first answer", since=began)
        return None

    async def _canary(self, adapter: Adapter) -> None:
        revision = self._another(adapter) or await self.publish(adapter, alias=None)
        percent = round(self._chance.uniform(5, 95), 1)
        self._timeline.begin(adapter.name, revision, perf_counter())
        share = {"revision": revision, "percent": percent, "why": WHY}
        await self._client.call("PUT", f"{adapter.path}/canary", share)
        self._moved("start a canary")
        await self._check_sides(adapter)
        if self._chance.random() < 0.5:
            began = perf_counter()
            await self._client.call("POST", f"{adapter.path}/canary/promote", {"why": WHY})
            self._settle(adapter, revision, began)
            self._moved("promote a canary")
        else:
            await self._client.call("DELETE", f"{adapter.path}/canary")
            self._timeline.end(adapter.name, revision, perf_counter())
            self._moved("abort a canary")

    async def _check_sides(self, adapter: Adapter) -> None:
        """Check that sessions stay on their side while the share is unchanged."""
        sessions = [f"{adapter.name}-{self._chance.getrandbits(32)}" for _ in range(_SESSIONS)]
        asked = [asyncio.create_task(self._ask(adapter.name, session)) for session in sessions]
        await asyncio.sleep(_SHARE_SECONDS)
        asked += [asyncio.create_task(self._ask(adapter.name, session)) for session in sessions]
        revisions = [answer.revision for answer in await asyncio.gather(*asked)]
        self._ledger.changed_sides += sum(
            before != after
            for before, after in zip(revisions[:_SESSIONS], revisions[_SESSIONS:], strict=True)
            if before and after
        )

    async def _shadow(self, adapter: Adapter) -> None:
        revision = self._another(adapter) or await self.publish(adapter, alias=None)
        share = {"revision": revision, "percent": 50, "why": WHY}
        await self._client.call("PUT", f"{adapter.path}/shadow", share)
        self._moved("start a shadow")
        await asyncio.sleep(_SHARE_SECONDS)
        await self._client.call("DELETE", f"{adapter.path}/shadow")
        self._moved("end a shadow")

    async def _remove_and_return(self, gone: Adapter) -> None:
        await asyncio.gather(*self._asking)  # one of these may request it
        if gone.current:
            await self._client.call("DELETE", f"{gone.path}/aliases/{DEFAULT_ALIAS}")
            self._timeline.end(gone.name, gone.current, perf_counter())
            gone.current = ""
            self._moved("remove an alias")
        answer = await self._client.ask(gone.name, 0, [{"role": "user", "content": "?"}])
        self._ledger.answered_unpointed += answer.failure != _NOT_THERE
        if len(gone.published) < _KEPT:
            await self.publish(gone)
            self._moved("point again")
        else:
            await self._earlier(gone, "point again")

    async def _evict(self, crowd: Sequence[str]) -> None:
        """Request the least recently used alias, whose revision was evicted: loading it evicts another one."""
        model = crowd[self._asked_of_crowd % len(crowd)]
        self._asked_of_crowd += 1
        answer = await self._ask(model, None)
        if answer.tokens_at:
            self._took("evicted: request to first token", answer.tokens_at[0] - answer.sent)
        self._ledger.actions["ask one of the crowd"] += 1

    async def _prune(self, adapter: Adapter) -> None:
        if adapter.publications < _PRUNE_EVERY:
            return
        adapter.publications = 0
        reply = await self._client.call("POST", f"{adapter.path}/prune", {"keep": _KEPT, "why": WHY})
        adapter.published = [one for one in adapter.published if one not in reply["removed"]]

    # Shared

    def _settle(self, adapter: Adapter, revision: str, began: float) -> None:
        """Record that `default` moved to `revision` at some time between `began` and now."""
        self._timeline.begin(adapter.name, revision, began)
        if adapter.current and adapter.current != revision:
            self._timeline.end(adapter.name, adapter.current, perf_counter())
        adapter.current = revision

    def _time_first_token(self, adapter: Adapter, what: str, since: float | None = None) -> None:
        """Send a request and record, in the background, the time to the current revision's first token."""
        revision = adapter.current

        async def first_token() -> None:
            answer = await self._ask(adapter.name, None)
            if answer.revision == revision and answer.tokens_at:
                self._took(what, answer.tokens_at[0] - (answer.sent if since is None else since))

        task = asyncio.create_task(first_token())
        self._asking.add(task)
        task.add_done_callback(self._asking.discard)

    async def _look(self, adapter: Adapter | None) -> None:
        """Recover from a refused call: end a canary or shadow left over, and read where `default` points."""
        if adapter is None:
            return
        try:
            aliases = (await self._client.call("GET", adapter.path))["aliases"]
            for alias in ("canary", "shadow"):
                if alias in aliases:
                    await self._client.call("DELETE", f"{adapter.path}/{alias}")
        except CallFailed:
            return  # the refusal is already counted
        if DEFAULT_ALIAS in aliases:
            self._settle(adapter, aliases[DEFAULT_ALIAS], perf_counter())
        else:
            adapter.current = ""

    def _other(self, adapter: Adapter) -> int:
        """Return the index of an original that the current revision was not made of, or 0."""
        present = self._timeline.made_of.get(adapter.current)
        others = [index for index, original in enumerate(self._originals) if original.ref != present]
        return others[0] if others else 0

    def _another(self, adapter: Adapter) -> str | None:
        """Return another published revision, preferably one whose answers differ from the current one's."""
        made_of = self._timeline.made_of
        unused = [one for one in adapter.published if one != adapter.current]
        telling = [one for one in unused if made_of[one] != made_of.get(adapter.current)]
        return self._chance.choice(telling or unused) if unused else None

    def _took(self, what: str, seconds: float) -> None:
        self._ledger.seconds[what].append(seconds)

    def _moved(self, action: str) -> None:
        self._ledger.swaps += 1
        self._ledger.actions[action] += 1
