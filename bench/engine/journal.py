"""The trials of a search, stored so that an interrupted search can continue."""

import json
import time
from collections.abc import Mapping
from pathlib import Path

import msgspec

from bench.engine import knobs
from bench.engine.measured import Outcome, Trial
from bench.engine.score import Pace
from bench.engine.stand import Stand
from bench.errors import ResultError

JOURNAL = "journal.jsonl"


class Journal:
    """The trials of a search, one line each, so that an interrupted search can continue.

    Raises:
        ResultError: the folder has the journal of another search.
    """

    def __init__(self, folder: Path, about: Mapping[str, object]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / JOURNAL
        self._about = msgspec.to_builtins(about)
        self.pace: Pace | None = None
        self.limits: dict[str, int] = {}
        self.starts = 0
        self._outcomes: dict[tuple[str, int, int], Outcome] = {}
        if self._path.is_file():
            self._read()

    def begin(self, pace: Pace, limits: Mapping[str, int]) -> None:
        self._append({"about": self._about, "pace": pace, "limits": dict(limits)})

    def outcome(self, trial: Trial) -> Outcome | None:
        """What the journal has of a trial."""
        return self._outcomes.get(_place(trial))

    def add(self, trial: Trial, outcome: Outcome, stand: Stand) -> None:
        self.starts += stand.starts
        stand.starts = 0
        self._outcomes[_place(trial)] = outcome
        row = {"trial": trial, "outcome": outcome, "starts": self.starts, "at": time.time()}
        self._append(row)

    def _append(self, row: Mapping[str, object]) -> None:
        with open(self._path, "ab") as file:
            file.write(msgspec.json.encode(row) + b"\n")

    def _read(self) -> None:
        whole, newline, cut = self._path.read_text().rpartition("\n")
        if cut:  # Off, as it was written: what comes next must begin a line.
            self._path.write_text(whole + newline)
        for line in whole.splitlines():
            row = json.loads(line)
            if "about" in row:
                if row["about"] != self._about:
                    raise ResultError(f"{self._path}: is the journal of another search")
                self.pace = msgspec.convert(row["pace"], Pace)
                self.limits = row["limits"]
                continue
            trial = msgspec.convert(row["trial"], Trial)
            outcome = msgspec.convert(row["outcome"], Outcome)
            self._outcomes[_place(trial)] = outcome
            self.starts = row["starts"]


def _place(trial: Trial) -> tuple[str, int, int]:
    """The identity of a trial."""
    return knobs.key(trial.settings), trial.rung, trial.held_out
