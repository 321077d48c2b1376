"""How a report looks: one accent colour, system fonts, light and dark, down to 320 px wide, and on paper."""

STYLE = """
:root {
  --ground: #f7f7f5; --card: #ffffff; --line: #e2e1dc; --ink: #1d1f23; --soft: #5d626b; --accent: #1f5fa8; --wash: #eef3f9;
  --bad: #a3261b; --bad-wash: #fcefed;
  --c0: #0072b2; --c1: #d55e00; --c2: #009e73; --c3: #cc79a7; --c4: #b97a00; --c5: #3a9bd6; --c6: #4a4d52;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ground: #121417; --card: #1a1d21; --line: #2f343a; --ink: #e6e7e9; --soft: #a0a6af; --accent: #7db4ee; --wash: #1e2a38;
    --bad: #ff9c90; --bad-wash: #361c1a;
    --c0: #4fa9e2; --c1: #f58a45; --c2: #35c69b; --c3: #e3a1c5; --c4: #e9b949; --c5: #9bd2f7; --c6: #c5c8cd;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
body {
  margin: 0 auto; max-width: 75rem; padding: 2.5rem 1.75rem 3rem; background: var(--ground); color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  overflow-wrap: anywhere; font-variant-numeric: tabular-nums;
}
h1, h2, h3 { line-height: 1.2; letter-spacing: -0.012em; text-wrap: balance; margin: 0; }
h1 { font-size: 2rem; font-weight: 680; }
h2 { font-size: 1.3rem; font-weight: 650; margin: 3rem 0 1rem; padding-bottom: .45rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1.02rem; font-weight: 640; margin: 1.75rem 0 .6rem; }
p { margin: .6rem 0; }
a { color: var(--accent); }
.kicker { color: var(--accent); font-size: .82rem; font-weight: 640; letter-spacing: .04em; margin: 0 0 .35rem; }
.lead { color: var(--soft); margin: .5rem 0 0; max-width: 46rem; }
nav { display: flex; flex-wrap: wrap; gap: .3rem 1.25rem; margin-top: 1.5rem; font-size: .92rem; }
nav a { text-decoration: none; padding: .2rem 0; }
nav a:hover { text-decoration: underline; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }

dl { margin: 0; }
dd { margin: 0; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.4rem, 1fr)); gap: .75rem; margin-top: 1.5rem; }
.tiles > div { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: .75rem .95rem .8rem; }
.tiles dt { color: var(--soft); font-size: .8rem; }
.tiles dd { font-size: 1.38rem; font-weight: 620; letter-spacing: -0.015em; line-height: 1.3; margin-top: .1rem; }
.tiles small { color: var(--soft); font-size: .8rem; font-weight: 400; letter-spacing: 0; display: block; }
.pairs { display: flex; flex-wrap: wrap; gap: .1rem 1.1rem; color: var(--soft); font-size: .84rem; margin: .55rem 0 0; }
.pairs > div { display: flex; flex-wrap: wrap; gap: 0 .4rem; }
.pairs dd { color: var(--ink); }
.label { color: var(--soft); font-size: .84rem; margin: .55rem 0 0; }
.label + .pairs { margin-top: .1rem; }
.note, footer { color: var(--soft); font-size: .88rem; }
.warning { background: var(--bad-wash); color: var(--bad); border-radius: 10px; padding: .8rem 1.1rem; margin: 1.25rem 0 0; }
.warning ul { margin: .3rem 0 0; padding-left: 1.2rem; }
.notes { color: var(--soft); font-size: .88rem; padding-left: 1.2rem; }
.notes li { margin: .25rem 0; }

.scroll {
  overflow: auto; background: var(--card); border: 1px solid var(--line); border-radius: 10px; margin-top: 1rem;
  position: relative; width: fit-content; max-width: 100%;
}
.tall { max-height: 75vh; }
table { border-collapse: separate; border-spacing: 0; font-size: .92rem; }
caption { text-align: left; font-weight: 600; padding: .8rem 1rem .55rem; }
.quiet { padding: 0; height: 0; }
.quiet span { position: absolute !important; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
caption span { display: inline-block; position: sticky; left: 1rem; max-width: min(34rem, calc(100vw - 4.5rem)); }
th, td { padding: .42rem 1rem; text-align: left; vertical-align: baseline; border-top: 1px solid var(--line); }
th, td { max-width: 34rem; min-width: 3.5rem; overflow-wrap: break-word; }
td { overflow-wrap: anywhere; min-width: 6rem; }
tbody th { min-width: 5rem; }
td.n { overflow-wrap: break-word; min-width: 3.5rem; }
td .pairs { margin: 0; font-size: inherit; }
.beside { display: flex; flex-wrap: wrap; align-items: flex-start; gap: 0 1rem; }
.beside > .scroll { margin-top: 0; margin-bottom: 1rem; }
thead th {
  color: var(--soft); font-weight: 560; font-size: .82rem; position: sticky; top: 0; background: var(--card);
  border-bottom: 1px solid var(--line); border-top: 0;
}
tbody tr:first-child > * { border-top: 0; }
tbody th { font-weight: 500; }
tbody tr:hover > * { background: var(--wash); }
.n { text-align: right; white-space: nowrap; }
td strong { color: var(--accent); font-weight: 680; }

details { border: 1px solid var(--line); border-radius: 10px; background: var(--card); margin-top: .75rem; padding: 0 1rem; }
details[open] { padding-bottom: 1rem; }
summary { cursor: pointer; padding: .6rem 0; font-size: .92rem; font-weight: 560; }
summary::marker { color: var(--accent); }
details .scroll { margin-top: 0; border-radius: 8px; }
details details { background: none; }
pre {
  overflow: auto; max-height: 70vh; margin: .25rem 0 0;
  font: .8rem/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace;
  overflow-wrap: normal; tab-size: 4;
}

.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr)); gap: 1rem; }
figure { margin: 1rem 0 0; }
.grid figure { margin: 0; min-width: 0; }
figcaption { color: var(--soft); font-size: .88rem; margin-top: .5rem; }
.light { background: #fff; border: 1px solid var(--line); border-radius: 10px; padding: .75rem; width: fit-content; max-width: 100%; }
.light img { display: block; max-width: 100%; height: auto; }
.wide { overflow-x: auto; }
.chart { display: flex; flex-direction: column; }
.chart { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: .8rem .9rem .6rem; }
.chart figcaption { color: var(--ink); font-weight: 600; font-size: .95rem; margin: 0; }
.chart ul { list-style: none; display: flex; flex-wrap: wrap; gap: 0 1rem; padding: 0; margin: .2rem 0 .3rem; }
.chart ul { font-size: .82rem; color: var(--soft); }
.chart li { display: flex; align-items: center; gap: .4rem; min-width: 0; }
.chart li svg { width: 1.4rem; height: .6rem; flex: none; }
.chart li b { color: var(--ink); font-weight: 560; }
.chart > svg { display: block; width: 100%; height: auto; margin-top: auto; }
svg text { fill: var(--soft); font-size: 11px; font-family: inherit; }
svg .rule { stroke: var(--line); stroke-width: 1; }
svg .mark { fill: none; stroke-width: 1.8; stroke-linejoin: round; stroke-linecap: round; }
svg .dot { stroke: none; }
.c0 { stroke: var(--c0); fill: var(--c0); } .c1 { stroke: var(--c1); fill: var(--c1); } .c2 { stroke: var(--c2); fill: var(--c2); }
.c3 { stroke: var(--c3); fill: var(--c3); } .c4 { stroke: var(--c4); fill: var(--c4); } .c5 { stroke: var(--c5); fill: var(--c5); }
.c6 { stroke: var(--c6); fill: var(--c6); }
.d1 { stroke-dasharray: 6 3; } .d2 { stroke-dasharray: 2 3; } .d3 { stroke-dasharray: 8 3 2 3; }
footer { margin-top: 3.5rem; padding-top: 1rem; border-top: 1px solid var(--line); }

@media (max-width: 40rem) {
  body { padding: 1.5rem 1rem 2rem; }
  h1 { font-size: 1.5rem; }
  h2 { margin-top: 2.25rem; }
  .tiles { grid-template-columns: repeat(2, minmax(0, 1fr)); }
  .tiles dd { font-size: 1.2rem; }
  th, td, caption { padding-left: .8rem; padding-right: .8rem; }
  svg text { font-size: 12.5px; }
  .wide img { max-width: none; width: 40rem; }
}
@media print {
  :root { --ground: #fff; --card: #fff; --line: #ccc; --ink: #000; --soft: #444; --accent: #1f5fa8; }
  body { max-width: none; padding: 0; font-size: 10pt; }
  nav { display: none; }
  .scroll, .tall, pre { max-height: none; overflow: visible; }
  figure, tr, .tiles > div { break-inside: avoid; }
  h2, h3 { break-after: avoid; }
}
"""
