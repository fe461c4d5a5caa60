"""One self-contained page about a comparison or a run: no network, no scripts; what is missing is said in a sentence."""

import json
import re
from collections.abc import Mapping
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from dmoe.report import svg
from dmoe.report.comparison import (
    GROUPS,
    MISSING,
    NO_RIVALS,
    ORACLE,
    Comparison,
    Line,
    Unit,
    counted,
    describe,
    details,
    headline,
    protocol_text,
    unit_of,
)
from dmoe.report.files import name_of
from dmoe.report.parts import Chart, Section, Table
from dmoe.report.rows import read_results
from dmoe.report.selection_page import selection_section
from dmoe.report.shown import Attention, Curve, Evidence, Example, config_text, curves_of, read_evidence, run_folders
from dmoe.report.statistics import WHAT_THE_INTERVAL_IS

HERE = Path(__file__).parent
DOMAINS_SHOWN = 30
LINES_SHOWN = svg.COLOURS - 2
"""Beside ours and the level of the baseline, which have styles of their own."""

LONGEST_CONFIG = 20_000

OURS, BASELINE, BEFORE = 0, 1, 2
"""Styles of the three that are met most."""

COSTS = {
    "training_cpu_seconds": ("training", "CPU s"),
    "adapt_ms": ("adapting", "ms"),
    "peak_mb": ("memory", "MB"),
    "predictions_per_second": ("predictions", "a second"),
}
"""Of each cost, what a column of it is called, and its unit."""

WHAT_ERM_IS = {
    "ERM": "“ERM” is plain supervised training, for as long as all training of Meta-DMoE together.",
    "ERM student": "“ERM student” is the plain student that meta-training starts from: it was trained for less time than the "
    "adapted one. A comparison has an ERM of equal cost.",
}

UNADAPTED = "One network, trained alone on all source domains and tested as it is: it does not adapt."

NOTES = {ORACLE: "a bound, not a rival: it is told what the others must find out"}


def build(folder: Path) -> str:
    """The page of a folder, as HTML.

    Raises:
        UserError: its ``results.jsonl`` is missing, or something in it is damaged.
    """
    comparison = Comparison(read_results(folder / "results.jsonl"))
    evidence, run = read_evidence(folder / "evidence.json"), run_folders(folder)[0]
    config = config_text(run)
    unit, dataset = unit_of(comparison.results), comparison.results.dataset
    adapts = not comparison.is_alone
    sections = [
        methods_section(comparison, unit),
        *([support_section(comparison, unit), protocols_section(comparison, unit)] if adapts else []),
        domains_section(comparison, unit),
        *([ablations_section(comparison, unit)] if comparison.results.ablations else []),
        *([attention_section(evidence.attention)] if adapts else []),
        *([selection_section(evidence.selection)] if evidence.selection else []),
        *([examples_section(evidence, comparison)] if adapts else []),
        curves_section({**(evidence.curves or {}), **curves_of(run)}, unit),
        trials_section(comparison, unit),
        published_section(dataset),
        notes_section(comparison),
        made_of_section(comparison, config),
    ]
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    style = Markup((HERE / "style.css").read_text(encoding="utf-8"))  # our own file
    title = f"{'Meta-DMoE' if comparison.ours else 'Methods' if adapts else comparison.methods[0]} on {dataset}"
    preset = re.search(r"^preset: (\w+)$", config or "", re.MULTILINE)
    title += f", preset {preset[1]}" if preset else ""
    return environment.get_template("page.html").render(title=title, said=headline(comparison), sections=sections, style=style)


def methods_section(comparison: Comparison, unit: Unit) -> Section:
    lines, baseline = comparison.lines, comparison.baseline
    costs = [name for name in COSTS if any(name in line.cost for line in lines)]
    head = ["method", "mean", "worst domain"]
    compared = baseline is not None and any(line.difference for line in lines)
    head += [f"difference to {baseline}"] if compared else []
    under = ["", unit.name, unit.name, *(["95 % interval"] if compared else []), *(COSTS[name][1] for name in costs)]
    rows = []
    for line in lines:
        difference = [unit.interval(line.difference)] if compared else []
        cost = [number_text(line.cost.get(name)) for name in costs]
        rows.append([line.name, unit.spread(line.mean), unit.spread(line.worst), *difference, *cost])
    notes = {line.name: NOTES.get(line.name, line.paper) for line in lines}
    table = Table([*head, *(COSTS[name][0] for name in costs)], rows, under, notes, _strong(comparison))
    seeds = f"Mean ± standard deviation over {counted(len(comparison.seeds), 'seed')}" if len(comparison.seeds) > 1 else "One seed"
    how = UNADAPTED if comparison.is_alone else f"{protocol_text(comparison.main).capitalize()}."
    text = [f"{seeds}; best first. {how}"]
    text += [] if costs else ["What the methods cost was not measured here."]
    return Section("methods", "All methods", text, tables=[("All methods", table)])


def support_section(comparison: Comparison, unit: Unit) -> Section:
    title, curves = "How many unlabeled images it takes", comparison.by_support()
    if not curves:
        only = f"Every method was tested with {comparison.main.support_size} unlabeled images of a domain, and no other number."
        return Section("support", title, [only])
    baseline, ours = comparison.baseline, comparison.ours
    others = [name for name in comparison.methods if name in curves and name not in (baseline, ours)]
    others.sort(key=lambda name: name in NO_RIVALS)
    styles = {ours: OURS} if ours is not None and ours in curves else {}
    styles |= {name: number for number, name in enumerate(others[:LINES_SHOWN], start=BEFORE)}
    names = list(styles)
    known = next((line.mean for line in comparison.lines if line.name == baseline), None)
    levels = {f"{baseline} at {comparison.main.support_size}": (known.mean, BASELINE)} if baseline and known else {}
    series = [
        svg.Series(name, [(size, one.mean, one.deviation) for size, one in curves[name].items()], styles[name]) for name in names
    ]
    if not series:
        return Section("support", title, ["Only the baseline was tested with several numbers of images."])
    axes = svg.Axes("unlabeled images of the domain", unit.name, unit.number, log2=True, levels=levels)
    legend = [(svg.key(one.style, kind="line"), one.name) for one in series]
    legend += [(svg.key(style, kind="level"), name) for name, (_, style) in levels.items()]
    sizes = sorted({size for curve in curves.values() for size in curve})
    rows = [[name, *(unit.spread(curve.get(size)) for size in sizes)] for name, curve in curves.items()]
    table = Table(["method", *(str(size) for size in sizes)], rows, strong=_strong(comparison))
    text = [
        f"Mean {unit.name} over {counted(len(comparison.domains), 'domain')}; bars: standard deviation over seeds. "
        "The axis is logarithmic."
    ]
    left = len(others[LINES_SHOWN:])
    text += [f"{counted(left, 'more method')} in the table only."] if left else []
    return Section("support", title, text, [Chart(svg.lines(series, axes), legend)], folded=[("The same as a table", table)])


def protocols_section(comparison: Comparison, unit: Unit) -> Section:
    title, protocols, cells = "Other ways of testing", comparison.protocols(), comparison.by_protocol()
    if not cells:
        return Section("protocols", title, [f"All numbers are by one protocol: {describe(comparison.main)}."])
    head, under = ["method", *(protocol.name for protocol in protocols)], ["", *map(details, protocols)]
    table = Table(head, [[name, *map(unit.spread, line)] for name, line in cells.items()], under, strong=_strong(comparison))
    how = Table(["protocol", "what it is"], [[protocol_text(p), describe(p)] for p in protocols])
    text = [f"Mean {unit.name}, ± standard deviation over seeds. Numbers of different columns answer different questions."]
    return Section("protocols", title, text, tables=[("Methods by protocols", table)], folded=[("What the protocols are", how)])


def domains_section(comparison: Comparison, unit: Unit) -> Section:
    title, found = "Domain by domain", comparison.by_domain()
    if not found or not comparison.domains:
        return Section("domains", title, ["The numbers of single domains are not known."])
    places = {comparison.baseline: BASELINE, comparison.before: BEFORE, comparison.ours: OURS}
    styles = [places[name] for name in found]
    shown = [domain for domain in comparison.domains if any(domain in values for values in found.values())]
    if not shown:
        return Section("domains", title, ["The numbers of single domains are not known."])
    groups = {domain: [values.get(domain) for values in found.values()] for domain in shown[:DOMAINS_SHOWN]}
    picture = svg.bars(groups, series=list(found), styles=styles, label=unit.name, say=unit.number)
    legend = [(svg.key(style, kind="bar"), name) for name, style in zip(found, styles, strict=True)]
    some = f"The first {DOMAINS_SHOWN} of {len(shown)} domains; the table has all. " if len(shown) > DOMAINS_SHOWN else ""
    order = f"In each group from top to bottom: {', '.join(found)}."
    lines = " Thin lines: 95 % t interval of the mean over seeds." if len(comparison.seeds) > 1 else ""
    rows = [[domain, *(_value(values.get(domain), unit) for values in found.values())] for domain in shown]
    head = ["domain", *found]
    if comparison.ours in found and comparison.baseline in found:
        head.append("difference")
        ours, others = found[str(comparison.ours)], found[str(comparison.baseline)]
        rows = [[*row, _difference(ours.get(row[0]), others.get(row[0]), unit)] for row in rows]
    return Section(
        "domains", title, [f"{some}{order}{lines}"], [Chart(picture, legend)], folded=[("The same as a table", Table(head, rows))]
    )


def ablations_section(comparison: Comparison, unit: Unit) -> Section:
    whole = next((line for line in comparison.lines if line.name == comparison.ours), None)
    tables = []
    for group, lines in comparison.ablations().items():
        head = ["setting", "mean", "worst domain", f"difference to {comparison.ours}"]
        found = [*lines, Line(f"{whole.name}, as above", whole.mean, whole.worst, None, {})] if whole is not None else lines
        rows = [[one.name, unit.spread(one.mean), unit.spread(one.worst), unit.interval(one.difference)] for one in found]
        tables.append((GROUPS.get(group, group), Table(head, rows, ["", unit.name, unit.name, "95 % interval"])))
    return Section("ablations", "What each part is worth", ["One thing changed at a time, everything else equal."], tables=tables)


def attention_section(attention: Attention | None) -> Section:
    title = "What the aggregator attends to"
    if attention is None:
        return Section("attention", title, ["Not known: there is no evidence.json that says it, or the run has no aggregator."])
    columns = [str(number) for number in range(1, len(attention.experts) + 1)]
    rows, values = attention.domains[:DOMAINS_SHOWN], attention.weights[:DOMAINS_SHOWN]
    label = "attention to each expert by target domain, in percent"
    picture = svg.heat_map(values, rows=rows, columns=columns, label=label, say=lambda value: f"{100 * value:.0f}")
    even = 100 / len(columns)
    text = [
        "Share of the attention that falls on each expert (columns), in percent, for images of each target domain (rows); mean "
        f"over images, heads, blocks and asking tokens. Even attention would be {even:.0f} everywhere."
    ]
    learned = Table(["expert", "learned from"], [[number, name] for number, name in zip(columns, attention.experts, strict=True)])
    return Section("attention", title, text, [Chart(picture)], folded=[("What each expert learned from", learned)])


def examples_section(evidence: Evidence, comparison: Comparison) -> Section:
    title = "Images, before and after"
    if not evidence.examples:
        return Section("examples", title, ["There are no example images: evidence.json is missing or has none."])
    by_domain: dict[str, list[Example]] = {}
    for one in evidence.examples:
        by_domain.setdefault(one.domain, []).append(one)
    text = [
        "Under each image what the plain student says → what the adapted one says, ✓ right or ✗ wrong. Half of the images of a "
        "domain are the first whose verdict changed, for better or worse; the others are the first that did not change."
    ]
    return Section("examples", title, text, examples=by_domain)


def curves_section(curves: Mapping[str, Curve], unit: Unit) -> Section:
    title = "Training"
    groups: dict[str, dict[str, Curve]] = {}
    for stage, curve in curves.items():
        if curve:
            group, _, one = stage.rpartition("/")
            groups.setdefault(group or stage, {})[one] = curve
    if not groups:
        return Section("training", title, ["Training curves are not known: neither evidence.json nor a run folder has them."])
    scores = [score for curve in curves.values() for _, score in curve]
    charts = []
    for group, stages in groups.items():
        series = [
            svg.Series(name, [(step, score, None) for step, score in sorted(curve)], number % svg.COLOURS)
            for number, (name, curve) in enumerate(stages.items())
        ]
        name = group if len(stages) == 1 else f"{group}: {len(stages)} lines"
        axes = svg.Axes("step", unit.name, unit.number, y_range=(min(scores), max(scores)))
        charts.append(Chart(svg.lines(series, axes, width=280, height=200, kind="small"), title=name))
    text = [
        "Score on the validation domains by training step; the weights of the best step were kept. All axes have the same range."
    ]
    return Section("training", title, text, charts)


def trials_section(comparison: Comparison, unit: Unit) -> Section:
    title, tried = "Settings that were tried", comparison.trials()
    if not tried:
        return Section(
            "trials", title, ["No trials of settings are recorded here: every method ran with the settings it was given."]
        )
    head = ["method", "settings tried", "chosen", f"its mean {unit.name} there"]
    rows = []
    for one in tried:
        score = dict(one.scores).get(one.chosen)
        rows.append([one.method, str(len(one.scores)), one.chosen or MISSING, unit.spread(score)])
    folded = [
        (
            f"{one.method}: all {len(one.scores)}",
            Table(["settings", f"mean {unit.name}"], [[s, unit.spread(v)] for s, v in one.scores]),
        )
        for one in tried
    ]
    splits = ", ".join(dict.fromkeys(one.split for one in tried))
    seeds = sorted({seed for one in tried for seed in one.seeds})
    with_seeds = f"{'seed' if len(seeds) == 1 else 'seeds'} {', '.join(map(str, seeds))}"
    text = [
        f"Settings were compared on {splits} domains only, with {with_seeds}; the target domains of the tables above chose nothing."
        " Of what is trained, the best after short trainings were trained for longer, and the score is that of the longer one."
    ]
    return Section("trials", title, text, tables=[("Chosen settings", Table(head, rows))], folded=folded)


def published_section(dataset: str) -> Section:
    title = "Published numbers"
    content = json.loads((HERE / "published.json").read_text(encoding="utf-8"))
    tables = [one for one in content["tables"] if dataset in one["datasets"]]
    if not tables:
        return Section("published", title, [f"No published numbers of {dataset} are known to this page."])
    text = ["Published, not run here: other networks, other budgets, other machines. They are not comparable line by line."]
    shown = []
    for one in tables:
        source = f"Published, not run here: {one['source']}. {one['note']}".strip()
        shown.append((one["title"], Table(["method", *one["columns"]], one["rows"], source=source)))
    return Section("published", title, text, tables=shown)


def notes_section(comparison: Comparison) -> Section:
    results, seeds = comparison.results, comparison.seeds
    tried = {one.method: len(one.scores) for one in comparison.trials()}
    choices = ", ".join(f"{method} {count}" for method, count in tried.items())
    text = [
        UNADAPTED if comparison.is_alone else f"Protocol of the tables unless they say otherwise: {describe(comparison.main)}.",
        f"{counted(len(seeds), 'seed')} ({', '.join(map(str, seeds))}) on {counted(len(comparison.domains), 'domain')} of the "
        f"split “{results.tests[0].split}”. All seeds share the data and the domains; a seed changes weights and batches.",
        *([WHAT_ERM_IS[comparison.baseline]] if comparison.baseline and not comparison.is_alone else []),
        WHAT_THE_INTERVAL_IS,
        "Intervals are of one comparison each; where many methods are compared, some will lie outside by chance. “The best other "
        "method” is picked by the numbers shown here, which flatters it a little.",
        "“Worst domain” is that of each seed, then averaged.",
        f"Settings tried, by method: {choices}. Methods not named ran with one."
        if tried
        else "No search for settings is recorded.",
    ]
    return Section("notes", "How to read this", text)


def made_of_section(comparison: Comparison, config: str | None) -> Section:
    rows = [row for row in comparison.results.tests if row.facts]
    facts = rows[-1].facts if rows else {}
    others = len({json.dumps(row.facts.get("data")) for row in rows} - {json.dumps(facts.get("data"))})
    raw: dict[str, str] = {}
    if "data" in facts:
        raw["Fingerprint of the data"] = name_of(facts["data"])
    if isinstance(facts.get("versions"), Mapping):
        raw["Versions"] = "\n".join(f"{name_of(key)} {name_of(value)}" for key, value in facts["versions"].items())
    if config is None and "config" in facts:
        config = json.dumps(facts["config"], indent=1)
    if config is not None:
        text = "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in config)
        raw["Configuration of the first seed"] = text[:LONGEST_CONFIG] + (" …" if len(text) > LONGEST_CONFIG else "")
    said = [] if raw else ["Neither configuration nor versions are recorded here."]
    said += [f"Careful: {counted(others, 'row')} of other data are among the results."] if others else []
    return Section("made-of", "What it was made with", said, raw=raw)


def number_text(value: float | None) -> str:
    """Three digits that say something."""
    if value is None:
        return MISSING
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _value(one: tuple[float, float | None] | None, unit: Unit) -> str:
    if one is None:
        return MISSING
    return unit.number(one[0]) if one[1] is None else f"{unit.number(one[0])} ± {unit.number(one[1])}"


def _difference(one: tuple[float, float | None] | None, other: tuple[float, float | None] | None, unit: Unit) -> str:
    return MISSING if one is None or other is None else unit.signed(one[0] - other[0])


def _strong(comparison: Comparison) -> list[str]:
    return [comparison.ours] if comparison.ours else []
