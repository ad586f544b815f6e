"""What a measurement says beside its target."""

from __future__ import annotations

from dataclasses import dataclass

CEILING_SHARE = 0.92
"""A target asks for at most this share of what the machine can do at all."""


@dataclass(frozen=True, slots=True)
class Row:
    """More is better. `ratio` is value / peer; `ok` where that reaches `target`, or without a peer the value does.

    Where a ceiling is known, `target` is the lower of the one that was set and what the ceiling leaves; `detail` has
    the arithmetic. A row with target 0 stands for the record.
    """

    name: str
    value: float
    unit: str
    peer: float | None
    ratio: float | None
    target: float
    ok: bool
    detail: str = ""

    @classmethod
    def of(
        cls,
        name: str,
        value: float,
        unit: str,
        target: float,
        peer: float | None = None,
        *,
        ceiling: float | None = None,
        detail: str = "",
    ) -> Row:
        """`ceiling`, in `unit`: the most that the machine allows."""
        ratio = None if peer is None else value / peer
        details = [detail] if detail else []
        if ceiling is not None and target > 0:
            allowed = CEILING_SHARE * ceiling / (1.0 if peer is None else peer)
            against = "" if peer is None else f" / {peer:,.4g}"
            details.append(
                f"target = min({target:g}, {CEILING_SHARE} x {ceiling:,.4g}{against} {unit} = {allowed:.4g}); "
                f"{100 * value / ceiling:.0f} % of the ceiling"
            )
            target = min(target, allowed)
        elif target == 0:
            details.append("for the record")
        return cls(
            name, value, unit, peer, ratio, target, (value if ratio is None else ratio) >= target, "; ".join(details)
        )
