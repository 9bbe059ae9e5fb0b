"""report.html: the whole comparison in one file that needs nothing else."""

from __future__ import annotations

import base64
import math
from html import escape
from pathlib import Path
from string import Template

from fastsel.compare.plots import Figure, figures, render
from fastsel.compare.runner import Comparison
from fastsel.compare.settings import machine, versions
from fastsel.compare.store import FIGURES, write_bytes
from fastsel.compare.summary import DIVERGED, FASTER, SLOWER
from fastsel.compare.table import caption, cells, goal_line, headers, notes, warnings

_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="generator" content="fastsel compare">
<meta name="color-scheme" content="light dark">
<title>$title</title>
<style>
:root { --back: #ffffff; --ink: #1f2328; --dim: #59636e; --line: #d8dee4; --card: #f6f8fa;
  --good: #116329; --bad: #b3261e; --warn: #8a5a00; }
@media (prefers-color-scheme: dark) { :root { --back: #0d1117; --ink: #e6edf3; --dim: #9aa4af;
  --line: #30363d; --card: #161b22; --good: #56d364; --bad: #ff8078; --warn: #e3b341; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; }
main { max-width: 72rem; margin: 0 auto; padding: 2rem 1.1rem 4rem; }
h1 { font-size: 1.65rem; line-height: 1.2; margin: 0 0 .3rem; }
h2 { font-size: 1.15rem; margin: 2.4rem 0 .8rem; }
p { margin: .5rem 0; }
.dim { color: var(--dim); }
.conclusion { font-size: 1.15rem; background: var(--card); border-left: 4px solid #0072b2;
  border-radius: 6px; padding: .9rem 1.1rem; margin: 1.3rem 0; }
.warning { color: var(--warn); }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 8px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums;
  font-size: .86rem; }
th, td { padding: .5rem .55rem; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
thead th { color: var(--dim); font-weight: 600; white-space: normal; vertical-align: bottom; }
tbody tr:last-child td, tbody tr:last-child th { border-bottom: 0; }
th:first-child, tbody th + td, thead th:nth-child(2) { text-align: left; }
tbody th + td { white-space: normal; min-width: 8rem; }
tbody th { position: sticky; left: 0; background: var(--back); white-space: normal;
  min-width: 7rem; }
.good { color: var(--good); font-weight: 600; } .bad { color: var(--bad); font-weight: 600; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr));
  gap: 1rem; }
figure { margin: 0; border: 1px solid var(--line); border-radius: 8px; overflow: hidden; }
img { display: block; width: 100%; height: auto; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1.2rem; margin: 0; }
dt { color: var(--dim); } dd { margin: 0; overflow-wrap: anywhere; }
li { margin: .3rem 0; } ul { padding-left: 1.2rem; }
</style>
</head>
<body>
<main>
<h1>$title</h1>
<p class="dim">$caption</p>
<p class="conclusion">$conclusion</p>
$warnings
<h2>Table</h2>
<div class="scroll" tabindex="0" role="region" aria-label="Table of strategies">
<table><thead><tr>$head</tr></thead><tbody>
$rows
</tbody></table></div>
$notes
<p class="dim">$goal Means over seeds, ± the standard deviation; to the goal over the runs that
reached it. Choosing: share of the training seconds spent on preparing, scoring and choosing. Step
vs plain: step time relative to the plain step on the whole batch. Time vs uniform: training seconds
to the goal relative to uniform, paired by seed, with the 95&nbsp;% interval.</p>
<h2>Curves</h2>
<div class="figures">
$figures
</div>
<p class="dim">Lines are means over seeds, bands reach from the lowest to the highest
seed.$switch</p>
<h2>How to read the verdict</h2>
<ul>
<li><b>faster than uniform</b>: clearly fewer training seconds to the goal (the whole interval below
1, and 5&nbsp;% at least), on every seed, without ending clearly worse.</li>
<li><b>slower than uniform</b>: clearly more seconds to the goal.</li>
<li><b>no clear difference</b>: the seeds do not agree well enough, or differ too little.</li>
<li><b>did not reach the goal</b>: no run came down to the goal within its budget.</li>
</ul>
<p>A strategy pays only if it is also clearly faster than <b>full</b>, the plain step on the whole
batch: the sentence at the top says so.</p>
<p>Within a seed all strategies start from the same weights, see the same batches in the same order
and have the same budget, optimizer and learning rate. The clock counts loading, scoring, choosing,
training, and what a strategy prepares before its first step, never evaluation.</p>
<h2>Data, settings, machine</h2>
<dl>
$facts
</dl>
</main>
</body>
</html>
""")

_SWITCH = (
    " The switch chooses while the share of the batch's gradient norm that the chosen rows carry "
    "exceeds the time of a selective step over that of a plain one."
)
_CLASSES = {FASTER: "good", SLOWER: "bad", DIVERGED: "bad"}


def write_report(comparison: Comparison) -> Path:
    """Draw the curves as PNG files and write report.html beside results.json.

    The report holds its images (in light and dark) and loads nothing from anywhere.

    Args:
        comparison: What `compare` returned.

    Returns:
        Path of report.html.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    shown = []
    left_over = set(FIGURES)
    for figure in figures(comparison) if comparison.runs else []:
        light, dark = (render(figure, comparison, theme) for theme in ("light", "dark"))
        write_bytes(comparison.out / f"{figure.stem}.png", light)
        left_over.remove(f"{figure.stem}.png")
        shown.append(_figure(figure, light, dark))
    for name in left_over:  # of an earlier call that had more to show
        (comparison.out / name).unlink(missing_ok=True)
    switched = any(run.switch for run in comparison.runs)
    names = headers(comparison)
    text = _PAGE.substitute(
        title=escape(f"Which strategy pays on {comparison.data.name}?"),
        caption=escape(caption(comparison)),
        conclusion=escape(comparison.conclusion),
        warnings="\n".join(f'<p class="warning">{escape(w)}</p>' for w in warnings(comparison)),
        head="".join(f'<th scope="col">{escape(name)}</th>' for name in names),
        rows="\n".join(_row(comparison, i) for i in range(len(comparison.rows))),
        notes="\n".join(f'<p class="dim">{escape(note)}</p>' for note in notes(comparison)),
        goal=escape(goal_line(comparison)),
        switch=_SWITCH if switched else "",
        figures="\n".join(shown),
        facts="\n".join(
            f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>"
            for key, value in _facts(comparison).items()
        ),
    )
    path = comparison.out / "report.html"
    write_bytes(path, text.encode())
    return path


def _row(comparison: Comparison, index: int) -> str:
    row = comparison.rows[index]
    name, verdict, *values = map(escape, cells(comparison, row))
    style = _CLASSES.get(row.verdict.split(" (")[0], "")
    columns = "".join(f"<td>{value}</td>" for value in values)
    return f'<tr><th scope="row">{name}</th><td class="{style}">{verdict}</td>{columns}</tr>'


def _figure(figure: Figure, light: bytes, dark: bytes) -> str:
    sources = [f"data:image/png;base64,{base64.b64encode(png).decode()}" for png in (light, dark)]
    return (
        f'<figure><picture><source media="(prefers-color-scheme: dark)" srcset="{sources[1]}">'
        f'<img src="{sources[0]}" alt="{escape(figure.title)}"></picture></figure>'
    )


def _facts(comparison: Comparison) -> dict[str, str]:
    data, settings = comparison.data, comparison.settings.to_json()
    facts = {"data": data.note}
    if data.classes:
        names = ", ".join(data.classes[:20]) + (" ..." if len(data.classes) > 20 else "")
        facts["classes"] = f"{len(data.classes)}: {names}"
    else:
        facts["target"] = f"mean {data.target_mean:.4g}, standard deviation {data.target_std:.4g}"
    facts["input"] = " x ".join(map(str, data.train_inputs.shape[1:])) + (
        f" ({math.prod(data.train_inputs.shape[1:])} numbers)" if data.is_image else " columns"
    )
    for key, value in settings.items():
        facts[key.replace("_", " ")] = (
            ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        )
    facts.update({f"machine: {key}": value for key, value in machine().items()})
    facts.update({f"{key} version": value for key, value in versions().items()})
    facts["data fingerprint"] = comparison.fingerprint
    return facts
