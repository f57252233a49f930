"""What `vhostfc bench` found: figures of each run, their medians, and the ratio of two back ends; JSON and text."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from vhostfc.frontend.load import Latency, LoadResult
from vhostfc.frontend.options import BenchOptions
from vhostfc.frontend.probe import size_text
from vhostfc.frontend.scan import UnitInfo


@dataclass(frozen=True, slots=True)
class Run:
    """One run.

    backend: CPU seconds of the back end by thread in the measured part, None where it cannot be known.  copy:
    nanoseconds of a bare copy, just before and after it.
    """

    load: LoadResult
    backend: dict[str, float] | None
    copy: float | None = None

    @property
    def iops(self) -> float:
        return self.load.commands / self.load.seconds if self.load.seconds else 0.0

    @property
    def bytes_per_s(self) -> float:
        moved = self.load.read_bytes + self.load.write_bytes
        return moved / self.load.seconds if self.load.seconds else 0.0

    @property
    def backend_cpu(self) -> float | None:
        """CPU seconds, all threads."""
        return None if self.backend is None else sum(self.backend.values())

    def cores(self, cpu: float | None) -> float | None:
        return None if cpu is None or not self.load.seconds else cpu / self.load.seconds

    def per_command(self, cpu: float | None) -> float | None:
        """Nanoseconds."""
        return None if cpu is None or not self.load.commands else cpu / self.load.commands * 1e9


def _median(runs: Sequence[Run], figure: Callable[[Run], float | None]) -> float | None:
    values = [value for value in map(figure, runs) if value is not None]
    return statistics.median(values) if values else None


def _round(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)


def _latency(runs: Sequence[Run], side: Callable[[LoadResult], Latency]) -> dict[str, float]:
    """Microseconds: the median over the runs of each figure."""
    sides = [side(run.load) for run in runs]
    values = {
        "mean": [each.mean for each in sides],
        "min": [float(each.least) for each in sides],
        "p50": [each.percentile(50) for each in sides],
        "p99": [each.percentile(99) for each in sides],
        "p999": [each.percentile(99.9) for each in sides],
        "max": [float(each.most) for each in sides],
    }
    return {name: round(statistics.median(found) / 1000, 3) for name, found in values.items()}


@dataclass(frozen=True, slots=True)
class BenchResult:
    """What was measured.

    runs: the measured parts; checks: what --verify ran before and after them.  region: (first block, blocks) used.
    null: the same workload on the null path.
    """

    socket: Path
    unit: UnitInfo
    options: BenchOptions
    region: tuple[int, int]
    runs: tuple[Run, ...]
    checks: LoadResult | None = None
    null: tuple[Run, ...] | None = None

    @property
    def load(self) -> LoadResult:
        """All that was done, in the measured parts and for --verify."""
        return sum((run.load for run in self.runs), self.checks or LoadResult())

    @property
    def iops(self) -> float:
        return _median(self.runs, lambda run: run.iops) or 0.0

    @property
    def bytes_per_s(self) -> float:
        return _median(self.runs, lambda run: run.bytes_per_s) or 0.0

    @property
    def latency_us(self) -> dict[str, float]:
        return _latency(self.runs, lambda load: load.latency)

    @property
    def backend_ns(self) -> float | None:
        """Nanoseconds of the back end's CPU a command."""
        return _median(self.runs, lambda run: run.per_command(run.backend_cpu))

    @property
    def driver_ns(self) -> float | None:
        """The same of the driver's threads."""
        return _median(self.runs, lambda run: run.per_command(run.load.cpu_seconds))

    @property
    def copy(self) -> float | None:
        """Nanoseconds of a bare copy."""
        return _median(self.runs, lambda run: run.copy)

    @property
    def to_copy(self) -> float | None:
        """The back end's CPU a command in bare copies, run by run."""
        return _median(self.runs, lambda run: _ratio(run.per_command(run.backend_cpu), run.copy))

    @property
    def errors(self) -> int:
        return self.load.errors

    @property
    def first_error(self) -> str | None:
        first = self.load.first
        return str(first) if first is not None else None

    def _threads_ns(self) -> dict[str, float]:
        def of(name: str, run: Run) -> float | None:
            return run.per_command((run.backend or {}).get(name))

        names = dict.fromkeys(name for run in self.runs if run.backend for name in run.backend)
        found = {name: _median(self.runs, partial(of, name)) for name in names}
        return {name: round(value, 1) for name, value in found.items() if value is not None and value >= 0.05}

    def as_json(self) -> dict[str, Any]:
        """For `--json`: rates per second, latencies in microseconds, CPU in cores; medians over the runs."""
        load = self.load
        measured = sum((run.load for run in self.runs), LoadResult())
        options = self.options
        data: dict[str, Any] = {
            "unit": {"target": self.unit.target, "lun": self.unit.lun, "naa": self.unit.naa},
            "rw": options.rw,
            "block_size": options.block_size,
            "iodepth": options.iodepth,
            "queues": options.queues,
            "packed": options.packed,
            "poll": options.poll,
            "seconds": round(sum(run.load.seconds for run in self.runs), 6),
            "commands": measured.commands,
            "iops": round(self.iops, 1),
            "bytes_per_s": round(self.bytes_per_s),
            "errors": self.errors,
            "retries": load.retries,
            "latency_us": self.latency_us,
            "cpu": {
                "driver": _round(_median(self.runs, lambda run: run.cores(run.load.cpu_seconds)), 3),
                "backend": _round(_median(self.runs, lambda run: run.cores(run.backend_cpu)), 3),
                "driver_ns_per_command": _round(self.driver_ns, 1),
                "backend_ns_per_command": _round(self.backend_ns, 1),
                "backend_threads_ns_per_command": self._threads_ns(),
            },
            "kicks_per_command": _per_command(measured.kicks, measured),
            "waits_per_command": _per_command(measured.waits, measured),
            "runs": [
                {
                    "iops": round(run.iops, 1),
                    "p50_us": round(run.load.latency.percentile(50) / 1000, 3),
                    "driver_ns_per_command": _round(run.per_command(run.load.cpu_seconds), 1),
                    "backend_ns_per_command": _round(run.per_command(run.backend_cpu), 1),
                }
                for run in self.runs
            ],
        }
        if measured.read_commands and measured.write_commands:
            sides = (
                ("read", measured.read_commands, _latency(self.runs, lambda load: load.reads)),
                ("write", measured.write_commands, _latency(self.runs, lambda load: load.writes)),
            )
            data |= {name: {"commands": commands, "latency_us": latency} for name, commands, latency in sides}
        if options.verify:
            data["verified_blocks"] = load.verified
        if self.null is not None:
            data["null_path"] = null_json(self.null)
        if self.copy is not None:
            data["bare_copy_ns"] = round(self.copy, 1)
            data["backend_to_bare_copy"] = _round(self.to_copy, 3)
        if self.errors:
            data["error_kinds"] = load.kinds
            data["first_error"] = self.first_error
        return data

    def as_text(self) -> str:
        """For people."""
        options = self.options
        ways = [word for on, word in ((options.packed, "packed rings"), (options.poll, "polling")) if on]
        seconds = sum(run.load.seconds for run in self.runs)
        lines = [
            f"{options.rw} of {size_text(options.block_size)}, {options.queues} x {options.iodepth} in flight, on unit"
            f" {self.unit.address} ({size_text(self.region[1] * self.unit.block_size)} of it)"
            + "".join(f", {way}" for way in ways),
            f"{self.iops:,.0f} commands/s, {size_text(self.bytes_per_s)}/s over {seconds:.2f} s" + _spread(self.runs),
            "latency us: " + ", ".join(f"{name} {value:,.1f}" for name, value in self.latency_us.items()),
            f"CPU: driver {_cores(self.runs, lambda run: run.load.cpu_seconds)},"
            f" back end {_cores(self.runs, lambda run: run.backend_cpu)}",
        ]
        threads = self._threads_ns()
        if len(threads) > 1:
            each = ", ".join(f"{name} {value:,g}" for name, value in threads.items())
            lines.append(f"back end, ns a command: {each}")
        if self.null is not None:
            lines.append(null_text(self.null))
        if self.copy is not None:
            ratio = self.to_copy
            times = f"; the back end takes {ratio:.2f} times that" if ratio else ""
            lines.append(f"bare copy: {self.copy:,.0f} ns{times}")
        if options.verify:
            lines.append(f"verified: {self.load.verified:,} blocks")
        if self.errors:
            kinds = ", ".join(f"{kind}: {n}" for kind, n in self.load.kinds.items())
            lines.append(f"ERRORS: {self.errors:,} ({kinds})")
            lines.append(f"first: {self.first_error}")
        return "\n".join(lines)


def merge(results: Sequence[BenchResult], options: BenchOptions) -> BenchResult:
    """Results of single runs of one back end as one of many."""
    checks = [result.checks for result in results if result.checks is not None]
    return BenchResult(
        results[0].socket, results[0].unit, options, results[0].region,
        tuple(run for result in results for run in result.runs),
        sum(checks, LoadResult()) if checks else None,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two back ends under one workload, run in turn."""

    first: BenchResult
    second: BenchResult

    @property
    def errors(self) -> int:
        return self.first.errors + self.second.errors

    def ratios(self) -> dict[str, float | None]:
        """second / first, each the median over the pairs of runs."""
        figures: dict[str, Callable[[Run], float | None]] = {
            "iops": lambda run: run.iops,
            "p50": lambda run: run.load.latency.percentile(50),
            "p99": lambda run: run.load.latency.percentile(99),
            "backend_ns_per_command": lambda run: run.per_command(run.backend_cpu),
            "driver_ns_per_command": lambda run: run.per_command(run.load.cpu_seconds),
        }
        found: dict[str, float | None] = {}
        for name, figure in figures.items():
            pairs = [(figure(a), figure(b)) for a, b in zip(self.first.runs, self.second.runs, strict=True)]
            ratios = [b / a for a, b in pairs if a and b is not None]
            found[name] = round(statistics.median(ratios), 3) if ratios else None
        return found

    def as_json(self) -> dict[str, Any]:
        first, second = ({"socket": str(each.socket), **each.as_json()} for each in (self.first, self.second))
        return {"a": first, "b": second, "b_to_a": self.ratios(), "errors": self.errors}

    def as_text(self) -> str:
        names = {
            "iops": "commands/s",
            "p50": "latency p50",
            "p99": "latency p99",
            "backend_ns_per_command": "back end's CPU a command",
            "driver_ns_per_command": "driver's CPU a command",
        }
        ratios = ", ".join(f"{names[key]} {value:g}" for key, value in self.ratios().items() if value is not None)
        return "\n".join(
            [
                f"A: {self.first.socket}",
                self.first.as_text(),
                f"B: {self.second.socket}",
                self.second.as_text(),
                f"B / A: {ratios}",
            ]
        )


def null_json(runs: Sequence[Run]) -> dict[str, Any]:
    """The null path's figures."""
    return {
        "iops": _round(_median(runs, lambda run: run.iops), 1),
        "driver_ns_per_command": _round(_median(runs, lambda run: run.per_command(run.load.cpu_seconds)), 1),
        "latency_us": _latency(runs, lambda load: load.latency),
        "errors": sum(run.load.errors for run in runs),
    }


def null_text(runs: Sequence[Run]) -> str:
    """The same for people."""
    figures = null_json(runs)
    return (
        f"null path: {figures['iops']:,.0f} commands/s, {figures['driver_ns_per_command']:,.0f} ns of the driver a"
        f" command, latency p50 {figures['latency_us']['p50']:,.2f} us"
    )


def _per_command(count: int, load: LoadResult) -> float:
    return round(count / load.commands, 4) if load.commands else 0.0


def _ratio(value: float | None, to: float | None) -> float | None:
    return None if value is None or not to else value / to


def _spread(runs: Sequence[Run]) -> str:
    if len(runs) < 2:
        return ""
    rates = [run.iops for run in runs]
    return f", median of {len(runs)} runs ({min(rates):,.0f} to {max(rates):,.0f})"


def _cores(runs: Sequence[Run], cpu: Callable[[Run], float | None]) -> str:
    share = _median(runs, lambda run: run.cores(cpu(run)))
    each = _median(runs, lambda run: run.per_command(cpu(run)))
    if share is None:
        return "unknown"
    return f"{share:.2f} cores" + (f" ({each:,.0f} ns a command)" if each is not None else "")
