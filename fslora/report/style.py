"""The style sheet of a report: one column on a phone, two beside each other on a desk."""

CSS = """
:root {
  --ink: #1a1a1a; --soft: #5c5c5c; --paper: #ffffff; --card: #f4f5f7; --line: #d9dce1;
  --accent: #0072b2; --warn: #fff3d6;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ink: #e8e8e8; --soft: #a8adb5; --paper: #15171a; --card: #202328; --line: #383c43;
    --accent: #7cc4f0; --warn: #40340f;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
  overflow-wrap: break-word; -webkit-text-size-adjust: 100%;
}
main { max-width: 68rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: .5rem 0; }
h1:not(:first-child) { margin-top: 3rem; }
h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
.note { background: var(--warn); padding: .6rem .9rem; border-radius: .5rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(13rem, 1fr)); gap: .75rem; }
.tiles div { background: var(--card); border-radius: .5rem; padding: .75rem 1rem; }
.tiles dt { color: var(--soft); font-size: .875rem; }
.tiles dd { margin: 0; color: var(--soft); font-size: .875rem; }
.tiles b { display: block; font-size: 1.5rem; line-height: 1.3; color: var(--accent); }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .4rem .6rem .4rem 0; }
th { color: var(--soft); font-size: .875rem; font-weight: 600; vertical-align: bottom; }
td { border-top: 1px solid var(--line); overflow-wrap: anywhere; }
td:first-child { overflow-wrap: normal; }
.rejected td:nth-child(2) { min-width: 7rem; }
.classes th:not(:first-child), .classes td:not(:first-child) { text-align: right; }
.wide { overflow-x: auto; }
.wide th, .wide td { overflow-wrap: normal; padding-right: .7rem; }
.wide td:not(:first-child) { white-space: nowrap; }
.wide th:not(:first-child), .wide td:not(:first-child) { text-align: right; }
.wide th:first-child, .wide td:first-child {
  position: sticky; left: 0; background: var(--paper) padding-box; font-weight: 600;
  min-width: 6rem;
}
.pictures { display: grid; gap: 1rem; margin: 2rem 0; align-items: start; }
figure { margin: 0; background: var(--card); border-radius: .5rem; overflow: hidden; }
figure img { display: block; width: 100%; height: auto; background: #fff; }
figcaption { padding: .6rem .9rem; font-size: .9375rem; }
pre {
  background: var(--card); border-radius: .5rem; padding: .75rem 1rem; overflow-x: auto;
  font: .8125rem/1.5 ui-monospace, Menlo, Consolas, monospace; overflow-wrap: normal;
}
details { margin: 1.5rem 0; border-top: 1px solid var(--line); padding-top: .75rem; }
summary { cursor: pointer; font-size: 1.15rem; font-weight: 600; }
@media (min-width: 50rem) { .pictures { grid-template-columns: 1fr 1fr; } }
@media (max-width: 49.99rem) {
  .wide td:first-child { min-width: 7rem; max-width: 7rem; overflow-wrap: anywhere; }
  .classes thead { display: none; }
  .classes, .classes tbody, .classes tr { display: block; }
  .classes tr { background: var(--card); border-radius: .5rem; }
  .classes tr { padding: .5rem 1rem; margin: .75rem 0; }
  .classes td { display: flex; justify-content: space-between; padding: .15rem 0; border: 0; }
  .classes td::before { content: attr(data-head); color: var(--soft); }
  .classes td:first-child { font-weight: 600; }
}
"""
