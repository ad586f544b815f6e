"""Attainment curves as a picture. Needs matplotlib: `pip install penstock-server[plot]`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.serve.report import METRICS, Json
from core.errors import ConfigError

PANELS = ("ttft", "itl", "max_itl", "e2el")


def plot(results: Sequence[Json], path: Path) -> None:
    """One panel a metric, one line a result: which share of the sample was within x ms. `ConfigError` without
    matplotlib, or where the file can't be written."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        fix = "needs matplotlib: pip install 'penstock-server[plot]'"
        raise ConfigError("plot", str(path), fix) from error
    figure = Figure(figsize=(11, 7), layout="constrained")
    FigureCanvasAgg(figure)
    for place, metric in enumerate(PANELS, start=1):
        axes = figure.add_subplot(2, 2, place)
        for number, result in enumerate(results):
            values = result["attainment_curves_ms"][metric]
            best = 100 * result["completed"] / max(1, result["completed"] + result["failed"])  # failures attain nothing
            shares = [best * share / max(1, len(values) - 1) for share in range(len(values))]
            axes.step(values, shares, where="post", label=str(result.get("label") or f"run {number + 1}"))
        limits = {r["goodput_slos_ms"][metric] for r in results if metric in r.get("goodput_slos_ms", {})}
        for limit in limits:
            axes.axvline(limit, color="grey", linestyle="--", linewidth=1)
        axes.set_title(METRICS[metric])
        axes.set_xlabel("ms")
        axes.set_ylabel("% within")
        axes.set_ylim(0, 101)
        if any(value > 0 for result in results for value in result["attainment_curves_ms"][metric]):
            axes.set_xscale("log")
        axes.grid(alpha=0.3)
    figure.axes[0].legend()
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise ConfigError("plot", str(path), f"can't be written: {error}") from error
