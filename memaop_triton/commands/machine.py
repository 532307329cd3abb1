"""`env`."""

from __future__ import annotations

import typer

from memaop_triton.commands import machine_facts
from memaop_triton.commands.common import JsonPath, write_json


def env(json_path: JsonPath = None) -> None:
    """What this machine is, which implementation runs on it, and why: for a bug report."""
    report = machine_facts.describe()
    typer.echo(as_text(report))
    if json_path is not None:
        write_json(json_path, report)
        typer.echo(f"wrote {json_path}")


def as_text(report: machine_facts.Report) -> str:
    """One fact a line, below the titles of the sections."""
    lines = []
    for title, facts in report.items():
        lines.append(f"{title}:")
        width = max(map(len, facts), default=0)
        lines += [f"  {name:{width}}  {fact}" for name, fact in facts.items()]
    return "\n".join(lines)
