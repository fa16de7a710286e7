"""`--mixed`: the shards that stay wider, so that the error at the model's outputs is at most a limit.

```
                 ranked by their own errors, the worst first
int4 everywhere  | block.007 | head | block.029 | block.000 | ...
8 bits for       '---- the fewest of the first that fit ----'
```
Each number of shards is tried in place: shards of the source, and of copies that are rounded as a whole, make one
model. A bisection takes as many passes as the number of shards has binary digits. Where 8 bits everywhere do not fit,
the first stay floats.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from pipeload.errors import ExportError
from pipeload.format.manifest import Manifest
from pipeload.notify import Notify
from pipeload_export.check.accuracy import accuracy_cases, output_error, with_no_past
from pipeload_export.check.shard_errors import Units, compare_shards, run_chosen
from pipeload_export.convert.how import How
from pipeload_export.convert.rounding import round_directory

__all__ = ["Mixed"]


class Mixed:
    """The shards of one directory, ranked by what their rounding does.

    Args:
        source: the directory, whose weights are the source's.
        manifest: its manifest.
        work: an existing folder, for copies of the directory.
        how: how weights are rounded; the shards that it keeps are kept.
        progress: called with the name of a step, the part done, and the whole.

    Raises:
        PipeloadError: a copy cannot be made, or does not run.
    """

    def __init__(self, source: Path, manifest: Manifest, work: Path, how: How, progress: Notify) -> None:
        self._how = how
        self._progress = progress
        floats = Units(source, manifest)
        self._copies = {"": _copy(source, work / "narrow", how, progress), "fp32": floats}
        if "int8" in how.levels:
            wide = replace(how, small=replace(how.small, bits=8))
            self._copies["int8"] = _copy(source, work / "int8", wide, progress)
        self._cases = with_no_past(manifest, accuracy_cases(source, manifest), unsplit=False)
        self._wanted, errors = compare_shards(floats, self._copies[""], self._cases, progress)
        worst_first = sorted(errors, key=lambda one: -one.max_rel_error)
        self._ranked = [one.shard for one in worst_first if one.max_rel_error and one.shard not in how.kept]

    def choose(self, limit: float) -> dict[str, str]:
        """The shards to keep wider, and their levels, for an error of at most `limit` in parts of an output's range.

        Raises:
            ExportError: only the source's weights would do.
        """
        ranked, kept = self._ranked, dict(self._how.kept)
        current = dict.fromkeys(self._copies["fp32"].shards, self._copies[""])
        for level in self._how.levels:
            wider = self._copies[level]
            count, error = self._fewest(current, wider, limit)
            kept |= dict.fromkeys(ranked[:count], level)
            if error <= limit and not (level == "fp32" and count == len(ranked)):
                return kept
            current |= dict.fromkeys(ranked, wider)
        raise ExportError(
            "Whichever shards are kept wider, rounding one of the others changes an output by more than "
            f"{limit:.2g} of its range, as --mixed asks for. Nothing was written. Allow more, or use the source's "
            "weights."
        )

    def _fewest(self, current: Mapping[str, Units], wider: Units, limit: float) -> tuple[int, float]:
        """The least number of the first shards with which the error fits, and the error; all of them if none does."""
        low, high, found = 0, len(self._ranked), self._error(current, wider, self._ranked)
        if found > limit:
            return high, found
        while low < high:
            middle = (low + high) // 2
            error = self._error(current, wider, self._ranked[:middle])
            if error <= limit:
                high, found = middle, error
            else:
                low = middle + 1
        return high, found

    def _error(self, current: Mapping[str, Units], wider: Units, names: Sequence[str]) -> float:
        """The worst error of all outputs, in parts of their ranges, with some shards of a wider copy."""
        found = run_chosen({**current, **dict.fromkeys(names, wider)}, self._cases, self._progress)
        return max(
            output_error(name, [one[name] for one in self._wanted], [one[name] for one in found]).max_rel_error
            for name in self._wanted[0]
        )


def _copy(source: Path, folder: Path, how: How, progress: Notify) -> Units:
    folder.mkdir()
    return Units(folder, round_directory(source, folder, how.small, kept=how.kept, progress=progress))
