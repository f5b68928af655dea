"""What a user did, kept up to date event by event: the stored features of the view user_activity.

The rules are those of `penstock.features`, which makes the same of a whole log; a test holds them equal. Nothing here
depends on the order in which events arrive, so late ones may come at any time.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

HISTORY_LENGTH = 50
WINDOW_HOURS = 7 * 24
TAGS_PER_ACTION = 3
UNKNOWN_AUTHOR = -1
KINDS = {"click": 1, "long_view": 2, "like": 4, "profile_enter": 8}
"""Label → its bit in action_kinds."""

_COUNTED = ("click", "long_view", "like")
_HOUR_MS = 3_600_000


@dataclass
class Activity:
    """One user's activity.

    Attributes:
        history: (time_ms, item) of the last long views, oldest first.
        actions: (time_ms, item, kinds, author, tags) of the last actions, oldest first.
        hours: (hour, scenario) → impressions, clicks, long views, likes.
        sequence: the last feedback record that is in it.
    """

    history: list[tuple[int, int]] = field(default_factory=list)
    actions: list[tuple[int, int, int, int, tuple[int, ...]]] = field(default_factory=list)
    hours: dict[tuple[int, int], list[int]] = field(default_factory=dict)
    sequence: int = 0

    @staticmethod
    def of(stored: Mapping[str, Sequence[int] | int]) -> Activity:
        """From the stored features, by name."""

        def column(name: str) -> list[int]:
            values = stored[name]
            assert not isinstance(values, int)
            return [int(value) for value in values]

        tags = column("action_tags")
        places = range(0, len(tags), TAGS_PER_ACTION)
        counts = zip(
            *(column(f"hour_{name}") for name in ("impressions", "clicks", "long_views", "likes")), strict=True
        )
        sequence = stored["feedback_sequence"]
        return Activity(
            history=list(zip(column("history_times"), column("history_items"), strict=True)),
            actions=list(
                zip(
                    *(column(f"action_{name}") for name in ("times", "items", "kinds", "authors")),
                    (tuple(tags[place : place + TAGS_PER_ACTION]) for place in places),
                    strict=True,
                )
            ),
            hours={
                (hour, scenario): list(count)
                for hour, scenario, count in zip(column("hour_starts"), column("hour_scenarios"), counts, strict=True)
            },
            sequence=int(sequence),  # type: ignore[arg-type]
        )

    def stored(self) -> dict[str, list[int] | int]:
        """The stored features, by name."""
        hours = sorted(self.hours.items())
        times, items, kinds, authors, tags = ([action[place] for action in self.actions] for place in range(5))
        names = ("impressions", "clicks", "long_views", "likes")
        return {
            "history_items": [item for _, item in self.history],
            "history_times": [time for time, _ in self.history],
            "action_items": items,  # type: ignore[dict-item]
            "action_times": times,  # type: ignore[dict-item]
            "action_kinds": kinds,  # type: ignore[dict-item]
            "action_authors": authors,  # type: ignore[dict-item]
            "action_tags": [tag for of_action in tags for tag in of_action],  # type: ignore[union-attr]
            "hour_starts": [hour for (hour, _), _ in hours],
            "hour_scenarios": [scenario for (_, scenario), _ in hours],
            **{f"hour_{name}": [counts[place] for _, counts in hours] for place, name in enumerate(names)},
            "feedback_sequence": self.sequence,
        }

    def show(self, time_ms: int, scenario: int, impressions: int = 1) -> None:
        """Some items were shown at a time."""
        hour = time_ms // _HOUR_MS
        newest = max((known for known, _ in self.hours), default=hour)
        if hour < newest - WINDOW_HOURS:
            return
        self.hours.setdefault((hour, scenario), [0, 0, 0, 0])[0] += impressions
        if hour > newest:
            self.hours = {key: counts for key, counts in self.hours.items() if key[0] >= hour - WINDOW_HOURS}

    def act(
        self,
        time_ms: int,
        scenario: int,
        item: int,
        author: int,
        tags: Sequence[int],
        done: Sequence[str],
        new: Sequence[str],
    ) -> None:
        """The user did something with an item that was shown.

        Args:
            time_ms: when it was shown.
            tags: the item's tags; the first ones are kept.
            done: all labels that hold by now.
            new: those of them that were not told before.
        """
        counts = self.hours.get((time_ms // _HOUR_MS, scenario))
        if counts is not None:
            for place, label in enumerate(_COUNTED, 1):
                counts[place] += label in new
        if "long_view" in new:
            _insert(self.history, (time_ms, item))
        kinds = sum(KINDS[label] for label in done)
        known = next((place for place, action in enumerate(self.actions) if action[:2] == (time_ms, item)), None)
        kept = (*tags[:TAGS_PER_ACTION], *[-1] * (TAGS_PER_ACTION - len(tags)))
        action = (time_ms, item, kinds, author, kept)
        if known is not None:
            self.actions[known] = action
        elif len(done) == len(new):  # else it was told of before, and has been pushed out since
            _insert(self.actions, action)


def _insert(kept: list, entry: tuple) -> None:  # type: ignore[type-arg]
    """Adds an entry in order of (time, item), and lets the oldest go."""
    place = bisect_right(kept, entry[:2], key=lambda known: known[:2])
    kept.insert(place, entry)
    if len(kept) > HISTORY_LENGTH:
        del kept[0]
