"""What all.sh has measured, as a table for a terminal and as a page with plots that needs nothing else.

Knows only what is in all.json: whoever has that file can make both again.
"""

import html
import math

OURS = "twistlockd"
FLOORS = ["fdatasync", "quorum", "sqlite FULL", "sqlite NORMAL"]


def digits(value):
    """Three digits that count."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def with_spread(part):
    if len(part["all"]) == 1:
        return digits(part["median"])
    return f"{digits(part['median'])} ({digits(part['min'])}-{digits(part['max'])})"


def rows(found):
    """The lines of the table of writes: number of clients by number of clients, a system each."""
    counts = sorted({int(clients) for system in found["systems"].values() for clients in system["writes"]})
    for clients in counts:
        ours = found["systems"].get(OURS, {}).get("writes", {}).get(str(clients))
        for name, system in found["systems"].items():
            part = system["writes"].get(str(clients))
            if part:
                ratio = f"{ours['rate']['median'] / part['rate']['median']:.2f}" if ours else "-"
                yield [str(clients), name, with_spread(part["rate"]), with_spread(part["p50"]), with_spread(part["p99"]),
                       str(part["failed"]), ratio]


HEADINGS = ["clients", "", "writes/s", "p50 ms", "p99 ms", "failed", "ours : its"]


def takeover_rows(found):
    ours = (found["systems"].get(OURS) or {}).get("takeover_ms")
    for name, system in found["systems"].items():
        part = system["takeover_ms"]
        if part:
            yield [name, with_spread(part), f"{part['median'] / ours['median']:,.1f}" if ours else "-"]


TAKEOVER_HEADINGS = ["", "takeover ms", "its : ours"]


def commit_ratio(found):
    """The COMMIT alone beside that of local SQLite, in the mean: the daemon keeps a sum."""
    def part(name):
        return found["systems"].get(name, {}).get("writes", {}).get("1", {}).get("commit")

    ours, local = part(OURS), part("sqlite FULL")
    if not ours or not local:
        return ""
    return (f"COMMIT alone, one client, mean: {OURS} {with_spread(ours)} ms, local SQLite FULL {with_spread(local)} ms, "
            f"ratio {ours['median'] / local['median']:.2f}")


def table(headings, lines):
    """Columns as wide as what is in them: names to the left, the rest to the right."""
    lines = [headings, *lines]
    wide = [max(len(line[column]) for line in lines) for column in range(len(headings))]
    names = headings.index("")
    for line in lines:
        cells = [cell.ljust(wide[column]) if column == names else cell.rjust(wide[column]) for column, cell in enumerate(line)]
        yield "  ".join(cells).rstrip()


def conditions_text(conditions):
    return ("{rounds} rounds of {seconds} s, {date}, {processors} processors ({processor}), {disk}; load before and after: "
            "{load_before:.2f}, {load_after:.2f}").format(**conditions)


def print_report(found):
    print(f"Median of {conditions_text(found['conditions'])}")
    print("\n".join(table(HEADINGS, rows(found))))
    lines = list(takeover_rows(found))
    if lines:
        print("\n".join(["", *table(TAKEOVER_HEADINGS, lines)]))
    if commit_ratio(found):
        print(f"\n{commit_ratio(found)}")
    for name, text in found["scripts"].items():
        print(f"\nscripts/bench/{name}.sh:\n{text}")
    for title in ["skipped", "failed"]:
        for name, reason in found[title].items():
            print(f"{title}: {name}: {reason}")


# The page. Everything is in it; colours follow the reader's choice of light or dark.
STYLE = """
:root {
  color-scheme: light dark;
  --text: #1c232b; --dim: #66717d; --line: #d9dee3; --ours: #1769aa; --peer: #8794a1; --floor: #c3cad1; --page: #fff;
}
@media (prefers-color-scheme: dark) {
  :root { --text: #e4e8ec; --dim: #97a3af; --line: #36404a; --ours: #5aaae6; --peer: #7b8895; --floor: #4b5661; --page: #14191e }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--text); background: var(--page); max-width: 920px;
  margin: 2em auto; padding: 0 1em }
h1 { font-size: 1.5em }
h2 { font-size: 1.15em; margin-top: 2em }
p, li { max-width: 75ch }
.dim { color: var(--dim) }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .87em }
td, th { padding: .2em .8em; text-align: right; border-bottom: 1px solid var(--line) }
.name { text-align: left }
tr.ours { color: var(--ours); font-weight: 600 }
div.wide, pre { overflow-x: auto }
svg { width: 100%; height: auto; display: block }
svg text { font: 12px system-ui, sans-serif; fill: var(--text) }
svg .dim { fill: var(--dim) }
.ours { fill: var(--ours) }
.peer { fill: var(--peer) }
.floor { fill: var(--floor) }
.rule { stroke: var(--line) }
.span { stroke: var(--text) }
"""
WIDTH, LEFT, RIGHT, ROW = 880, 110, 170, 24


def kind(name):
    if name == OURS:
        return "ours"
    return "floor" if name in FLOORS else "peer"


def svg(title, lines, draw, ticks, place):
    """A plot with a line for each system: its name, what `draw` makes of it at its height, and a note to the right."""
    height = ROW * len(lines) + 28
    out = [f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{html.escape(title)}">']
    for tick in ticks:
        x = place(tick)
        out.append(f'<line class="rule" x1="{x:.1f}" x2="{x:.1f}" y1="4" y2="{height - 20}"/>')
        out.append(f'<text class="dim" x="{x:.1f}" y="{height - 5}" text-anchor="middle">{tick:,g}</text>')
    for number, (name, *values) in enumerate(lines):
        y = ROW * number + 16
        out.append(f'<text x="{LEFT - 10}" y="{y + 4}" text-anchor="end">{html.escape(name)}</text>')
        marks, note = draw(name, y, *values)
        out += marks
        out.append(f'<text x="{WIDTH - RIGHT + 12}" y="{y + 4}">{html.escape(note)}</text>')
    return "\n".join([*out, "</svg>"])


def linear(top):
    step = 10 ** math.floor(math.log10(top))
    step = step / 2 if top / step < 3 else step
    return [step * number for number in range(int(top / step) + 1)], lambda value: LEFT + (WIDTH - LEFT - RIGHT) * value / top


def logarithmic(low, high):
    low, high = math.floor(math.log10(low)), math.ceil(math.log10(high))
    high += low == high
    scale = (WIDTH - LEFT - RIGHT) / (high - low)
    return [10.0**power for power in range(low, high + 1)], lambda value: LEFT + (math.log10(value) - low) * scale


def rates(lines):
    """Bars of writes a second, with the span of the rounds."""
    ticks, place = linear(max(part["rate"]["max"] for _, part in lines))

    def draw(name, y, part):
        rate = part["rate"]
        bar = f'<rect class="{kind(name)}" x="{LEFT}" y="{y - 7}" width="{place(rate["median"]) - LEFT:.1f}" height="14"/>'
        span = f'<line class="span" x1="{place(rate["min"]):.1f}" x2="{place(rate["max"]):.1f}" y1="{y}" y2="{y}"/>'
        return [bar, span], f"{digits(rate['median'])}/s"

    return svg("writes a second", lines, draw, ticks, place)


def latencies(lines):
    """From p50 (full) to p99 (small), on a logarithmic scale."""
    every = [part[key]["median"] for _, part in lines for key in ["p50", "p99"]]
    ticks, place = logarithmic(min(every), max(every))

    def draw(name, y, part):
        low, high = place(part["p50"]["median"]), place(part["p99"]["median"])
        marks = [f'<line class="span" x1="{low:.1f}" x2="{high:.1f}" y1="{y}" y2="{y}"/>',
                 f'<circle class="{kind(name)}" cx="{low:.1f}" cy="{y}" r="6"/>',
                 f'<circle class="{kind(name)}" cx="{high:.1f}" cy="{y}" r="3"/>']
        return marks, f"{digits(part['p50']['median'])} / {digits(part['p99']['median'])} ms"

    return svg("latencies in milliseconds", lines, draw, ticks, place)


def takeovers(lines):
    """A dot for each takeover, on a logarithmic scale."""
    every = [value for _, part in lines for value in part["all"]]
    ticks, place = logarithmic(min(every), max(every))

    def draw(name, y, part):
        dot = f'<circle class="{kind(name)}" cy="{y}" r="5" fill-opacity="0.7"'
        return [f'{dot} cx="{place(value):.1f}"/>' for value in part["all"]], f"{digits(part['median'])} ms"

    return svg("takeovers in milliseconds", lines, draw, ticks, place)


def html_table(headings, lines):
    names = headings.index("")

    def row(tag, line):
        ours = " class=ours" if line[names] == OURS else ""
        cells = [f'<{tag}{" class=name" if column == names else ""}>{html.escape(text)}' for column, text in enumerate(line)]
        return f"<tr{ours}>" + "".join(cells)

    return "\n".join(["<div class=wide><table>", row("th", headings), *(row("td", line) for line in lines), "</table></div>"])


def plots(found):
    """All plots, those of writes with each number of clients."""
    counts = sorted({int(clients) for system in found["systems"].values() for clients in system["writes"]})
    for title, draw in [("Writes a second (the line: lowest to highest round)", rates),
                        ("Latency, p50 (large) to p99 (small), logarithmic", latencies)]:
        yield f"<h2>{title}</h2>"
        for clients in counts:
            parts = [(name, system["writes"].get(str(clients))) for name, system in found["systems"].items()]
            yield f"<h3>{clients} client{'s' * (clients > 1)}</h3>" + draw([line for line in parts if line[1]])
    spans = [(name, system["takeover_ms"]) for name, system in found["systems"].items() if system["takeover_ms"]]
    if spans:
        yield "<h2>Takeover: from kill -9 of the primary to the next acknowledged write, logarithmic</h2>" + takeovers(spans)
        yield ("<p class=dim>Each system has its default time-outs. The kernel tells the others at once that a process has ended; "
               "the loss of a whole host is only noticed by time-outs.</p>")
        yield html_table(TAKEOVER_HEADINGS, takeover_rows(found))


def page(found):
    conditions = html.escape(conditions_text(found["conditions"]))
    out = ["<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>",
           f"<title>Twistlock HA beside others</title><style>{STYLE}</style><h1>Twistlock HA beside others</h1>",
           f"<p class=dim>Median of {conditions}. All members of all systems share this machine and its disk, and have no network "
           "between them: compare figures of one run with each other only.</p>", *plots(found), "<h2>Figures</h2>",
           html_table(HEADINGS, rows(found)), f"<p>{html.escape(commit_ratio(found))}</p><h2>What a write is</h2><ul>"]
    for name, system in found["systems"].items():
        about, version = html.escape(system["about"]), html.escape(system["version"])
        out.append(f"<li><b>{html.escape(name)}</b> {about} <span class=dim>{version}</span>")
    for title in ["skipped", "failed"]:
        out += [f"<li><b>{html.escape(name)}</b> {title}: {html.escape(reason)}" for name, reason in found[title].items()]
    out.append("</ul>")
    out += [f"<h2>scripts/bench/{name}.sh</h2><pre>{html.escape(text)}</pre>" for name, text in found["scripts"].items()]
    return "\n".join(out) + "</html>\n"
