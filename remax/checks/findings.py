"""What an examination finds: one check with its result, figure and remedy; the report of all; distances over ranks."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field

from torch import Tensor

from utils.distributed import gather_objects
from utils.run import UserError

OK, WARNING, FAILURE, SKIPPED = "ok", "warning", "failure", "skipped"

# Mean difference, in nats, that two computations of the same log-probs may have: rounding, of logits of size 10 to 30.
TOLERANCE = {"fp32": 1e-3, "fp16": 0.02, "bf16": 0.1}
EXACT = 1e-3  # where nothing but the order of sums may differ, also in bf16


@dataclass(frozen=True)
class Finding:
    """One check: what was looked at, how it went, the figure in words and as numbers, and what to do about it."""

    check: str
    result: str
    figure: str
    remedy: str = ""
    numbers: dict[str, float] = field(default_factory=dict)


def finding(check: str, good: bool, figure: str, remedy: str, bad: str = FAILURE, **numbers: float) -> Finding:
    """`good` decides between ok and `bad`; only what is not ok shows its remedy."""
    return Finding(check, OK if good else bad, figure, "" if good else remedy, numbers)


@dataclass(frozen=True)
class Report:
    """All findings, the same on every rank."""

    findings: list[Finding]

    @property
    def failures(self) -> list[Finding]:
        """What forbids training."""
        return [found for found in self.findings if found.result == FAILURE]

    def table(self) -> str:
        """One line for each check, and below it what to do when it is not ok."""
        width = max(len(found.check) for found in self.findings)
        lines = [f"{'check':<{width}}  {'result':<7}  figure"]
        for found in self.findings:
            result = found.result.upper() if found.result == FAILURE else found.result
            lines.append(f"{found.check:<{width}}  {result:<7}  {found.figure}")
            if found.remedy:
                lines.append(f"{'':<{width}}  remedy:  {found.remedy}")
        return "\n".join(lines)

    def json(self) -> str:
        return json.dumps({"healthy": not self.failures, "findings": [asdict(found) for found in self.findings]})

    def refuse_failures(self) -> None:
        """Does nothing for a healthy report.

        Raises:
            UserError: Names every failed check and its remedy.
        """
        if self.failures:
            what = "; ".join(f"{found.check}: {found.figure}. {found.remedy}" for found in self.failures)
            raise UserError(f"the examination failed (--skip_doctor trains all the same). {what}")


@dataclass(frozen=True)
class Gap:
    """Distance between two computations of the same numbers, over all ranks."""

    mean: float
    largest: float
    count: int

    def __str__(self) -> str:
        return f"mean {self.mean:.2g}, largest {self.largest:.2g}"


def gap(a: Tensor, b: Tensor, mask: Tensor | None = None) -> Gap:
    """The distance between two tensors of one shape, where `mask` is True."""
    distance = (a.double() - b.double()).abs()
    return combine(distance[mask] if mask is not None else distance)


def combine(distance: Tensor) -> Gap:
    """This rank's distances together with those of the other ranks."""
    parts = gather_objects((float(distance.sum()), float(distance.max()), distance.numel()))
    sums, largest, counts = zip(*parts, strict=True)
    return Gap(sum(sums) / sum(counts), max(largest), sum(counts))
