"""The frame of the training report: one HTML file that asks nothing of any network.

In: a title and the markup of the body. Out: the whole page with its style sheet, for light and dark
screens of 400 px and more, and for paper. Its policy forbids scripts and all that is not inline.
"""

from html import escape

_STYLE = """\
:root { color-scheme: light dark; --paper: #ffffff; --ink: #1b1f24; --quiet: #59626c;
  --hair: #d5dae0; --soft: #f4f6f8; --warn: #8a4b00; --warn-soft: #fff4e0; --good: #1a6b3c;
  --bad: #a3261c; --c0: #1f5fbf; --c1: #b3540a; --c2: #2b7a4b; --c3: #86359c; --c4: #5f6770; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171a; --ink: #e6e9ec; --quiet: #a3adb7;
  --hair: #363d44; --soft: #1d2226; --warn: #ffbf66; --warn-soft: #33270f; --good: #6fd09a;
  --bad: #ff9a8f; --c0: #7db3ff; --c1: #ffab66; --c2: #6fd09a; --c3: #d99bf2; --c4: #a9b2bb; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 24px 16px 48px; max-width: 1160px; background: var(--paper);
  color: var(--ink); font: 16px/1.5 system-ui, sans-serif; font-variant-numeric: tabular-nums; }
h1 { font-size: 28px; line-height: 1.2; margin: 0 0 8px; overflow-wrap: anywhere; }
h2 { font-size: 20px; margin: 40px 0 8px; padding-top: 16px; border-top: 1px solid var(--hair); }
h3 { font-size: 14px; margin: 0 0 6px; font-weight: 600; overflow-wrap: anywhere; }
p { margin: 8px 0; max-width: 76ch; }
.lead { font-size: 17px; }
.note, .unit, .small, figcaption p { color: var(--quiet); font-size: 14px; font-weight: 400; }
.warnings { list-style: none; margin: 16px 0; padding: 0; }
.warnings li { border-left: 4px solid var(--warn); background: var(--warn-soft);
  padding: 8px 12px; margin: 8px 0; max-width: 90ch; overflow-wrap: anywhere; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(148px, 1fr)); gap: 8px;
  margin: 16px 0; }
.facts div { background: var(--soft); border-radius: 6px; padding: 10px 12px; }
.facts dt { font-size: 12px; color: var(--quiet); }
.facts dd { margin: 0; font-size: 20px; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(340px, 100%), 1fr));
  gap: 24px; }
figure { margin: 0; min-width: 0; }
figcaption { font-weight: 600; font-size: 14px; margin-bottom: 4px; }
.chart { width: 100%; height: auto; display: block; }
.chart text { font: 11px system-ui, sans-serif; fill: var(--quiet); }
.chart .grid { stroke: var(--hair); stroke-width: 1; }
.chart .axis { stroke: var(--quiet); stroke-width: 1; }
.chart .mark { stroke: var(--quiet); stroke-width: 1; stroke-dasharray: 2 3; }
.line { fill: none; stroke-width: 2; stroke-linejoin: round; }
.area { stroke-width: 1.5; fill-opacity: 0.14; }
.spot { fill: transparent; }
.dot, .spot { pointer-events: all; }
.line.s0, .area.s0 { stroke: var(--c0); } .line.s1, .area.s1 { stroke: var(--c1); }
.line.s2, .area.s2 { stroke: var(--c2); } .line.s3, .area.s3 { stroke: var(--c3); }
.line.s4, .area.s4 { stroke: var(--c4); } .line.s5 { stroke: var(--c0); }
.line.s1, .area.s1 { stroke-dasharray: 7 3; } .line.s2, .area.s2 { stroke-dasharray: 2 3; }
.line.s3 { stroke-dasharray: 9 3 2 3; } .line.s4 { stroke-dasharray: 1 4; }
.line.s5 { stroke-dasharray: 12 5; }
.area.s0, .dot.s0 { fill: var(--c0); } .area.s1, .dot.s1 { fill: var(--c1); }
.area.s2, .dot.s2 { fill: var(--c2); } .dot.s3 { fill: var(--c3); } .dot.s4 { fill: var(--c4); }
.dot.s5 { fill: var(--c0); }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: 2px 16px; margin: 4px 0 0;
  padding: 0; font-size: 13px; }
.legend + .charts { margin-top: 12px; }
.key { width: 24px; height: 10px; margin-right: 6px; vertical-align: middle; }
.number { color: var(--quiet); }
.anchors { display: grid; gap: 16px; }
.anchor { display: grid; grid-template-columns: 104px minmax(0, 1fr); gap: 4px 16px;
  border: 1px solid var(--hair); border-radius: 6px; padding: 12px; break-inside: avoid; }
.anchor h3 { grid-column: 1 / -1; }
.anchor > img { width: 104px; height: 104px; border-radius: 6px; }
.rows { display: flex; flex-wrap: wrap; gap: 8px 24px; }
.row h4 { font-size: 12px; font-weight: 400; color: var(--quiet); margin: 0 0 4px; }
.tiles { list-style: none; margin: 0; padding: 0; display: flex; flex-wrap: wrap; gap: 8px; }
.tile { width: 72px; font-size: 12px; line-height: 1.35; }
.tile img { width: 72px; height: 72px; display: block; border-radius: 6px; padding: 2px;
  border: 2px dashed var(--hair); }
.tile.chosen img { border: 2px solid var(--c0); }
.tile span { display: block; white-space: nowrap; overflow: hidden; text-overflow: ellipsis; }
.same { color: var(--good); } .other { color: var(--bad); }
table { border-collapse: collapse; font-size: 14px; width: 100%; max-width: 900px; }
th, td { text-align: left; padding: 4px 12px 4px 0; border-bottom: 1px solid var(--hair);
  vertical-align: top; overflow-wrap: anywhere; }
th { font-weight: 600; }
pre { background: var(--soft); border-radius: 6px; padding: 12px; font-size: 13px;
  overflow-x: auto; white-space: pre-wrap; overflow-wrap: anywhere; }
code { font-size: 0.92em; }
summary { cursor: pointer; padding: 4px 0; }
summary:focus-visible { outline: 2px solid var(--c0); }
@media (max-width: 560px) { .anchor { grid-template-columns: 72px minmax(0, 1fr); gap: 4px 12px; }
  .anchor > img { width: 72px; height: 72px; } .tile, .tile img { width: 64px; }
  .tile img { height: 64px; } h1 { font-size: 24px; } }
@media print { :root { --paper: #ffffff; --ink: #000000; --quiet: #444444; --hair: #bbbbbb;
  --soft: #ffffff; --warn-soft: #ffffff; --warn: #6b3a00; --good: #14532d; --bad: #8b1a12;
  --c0: #1f5fbf; --c1: #b3540a; --c2: #2b7a4b; --c3: #86359c; --c4: #5f6770; }
  body { max-width: none; padding: 0; font-size: 11pt; } figure { break-inside: avoid; }
  .tile img, .anchor > img, .area { print-color-adjust: exact; } }
"""

_PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
{body}</body>
</html>
"""


def html_page(title: str, body: str) -> str:
    """The whole document; `body` is markup already, in which all foreign text was escaped."""
    return _PAGE.format(title=escape(title), style=_STYLE, body=body)
